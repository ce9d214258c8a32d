//! Flags that every command shares, and what they mean together.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::flag_values::{Reserved, parse_dns_name, parse_node_ip, parse_reserved};
use crate::{
    dataplane::AddressRules,
    model::{
        ids::{Family, PerFamily},
        kernel::Timeouts,
        node::{MarkMask, NodeConfig, nth_address, parse_port_range},
    },
    reconcile::Settings,
    state::State,
};

/// How netfilter is programmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum RendererChoice {
    /// What the host itself uses: iptables (of the flavour that holds its rules) where it is
    /// installed, nftables otherwise.
    Auto,
    /// iptables with ipsets, of the flavour that holds the host's rules.
    Iptables,
    /// iptables with ipsets, through iptables-nft.
    IptablesNft,
    /// iptables with ipsets, through iptables-legacy.
    IptablesLegacy,
    /// One nftables table.
    Nftables,
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of every command. Each can also be set by `MESHLB_…` or in the file that --config names.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// YAML file with any of these flags, e.g. `vip-cidr: [10.200.0.0/16]`. Flags and variables win.
    #[arg(long, global = true, env = "MESHLB_CONFIG", value_name = "FILE", help_heading = "Node")]
    pub config: Option<PathBuf>,
    /// This node's name: endpoints with this nodeName are local [default: the host name]
    #[arg(
        long,
        global = true,
        env = "MESHLB_NODE",
        value_name = "NAME",
        value_parser = parse_dns_name,
        help_heading = "Node"
    )]
    pub node: Option<String>,
    /// This node's own address, at most one per family [default: the default route's source address]
    #[arg(
        long,
        global = true,
        env = "MESHLB_NODE_IP",
        value_name = "IP",
        value_delimiter = ',',
        value_parser = parse_node_ip,
        help_heading = "Node"
    )]
    pub node_ip: Vec<IpAddr>,
    /// This node's topology zone, for services that prefer near endpoints [default: the Node's label
    /// topology.kubernetes.io/zone; in a folder none]
    #[arg(
        long,
        global = true,
        env = "MESHLB_TOPOLOGY_ZONE",
        value_name = "ZONE",
        value_parser = clap::builder::NonEmptyStringValueParser::new(),
        help_heading = "Node"
    )]
    pub topology_zone: Option<String>,
    /// Range that virtual IPs come from, at most one per family. Its first address is the ingress
    /// address, its second the DNS address.
    #[arg(
        long,
        global = true,
        env = "MESHLB_VIP_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        default_value = "10.200.0.0/16,fd00:200::/112",
        help_heading = "Services"
    )]
    pub vip_cidr: Vec<IpNet>,
    /// Published ports without a number of their own come from here.
    #[arg(
        long, global = true, env = "MESHLB_PUBLISH_RANGE", value_name = "FIRST-LAST",
        default_value = "30000-32767", value_parser = parse_port_range, help_heading = "Services"
    )]
    pub publish_range: RangeInclusive<u16>,
    /// Node addresses that published ports answer on, as CIDRs [default: all but loopback, link-local,
    /// VIP ranges and addresses on dummy links]
    #[arg(
        long,
        global = true,
        env = "MESHLB_PUBLISH_ADDRESSES",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Services"
    )]
    pub publish_addresses: Vec<IpNet>,
    /// Ports that can't be published; `none` for none.
    #[arg(
        long,
        global = true,
        env = "MESHLB_PUBLISH_RESERVED",
        value_name = "PORTS",
        value_delimiter = ',',
        default_value = "22,179,2379-2380,4789/udp,6443,8472/udp,10248-10259",
        value_parser = parse_reserved,
        help_heading = "Services"
    )]
    pub publish_reserved: Vec<Reserved>,
    /// How the API server is reached [default: KUBECONFIG, ~/.kube/config, or the pod's service account]
    #[arg(long, global = true, env = "MESHLB_KUBECONFIG", value_name = "FILE", help_heading = "Services")]
    pub kubeconfig: Option<PathBuf>,
    /// How netfilter is programmed.
    #[arg(
        long,
        global = true,
        env = "MESHLB_RENDERER",
        value_enum,
        default_value = "auto",
        help_heading = "Kernel"
    )]
    pub renderer: RendererChoice,
    /// Bits of the packet mark that are ours: at least 10 neighbouring ones that nobody else uses.
    #[arg(
        long, global = true, env = "MESHLB_MARK_MASK", value_name = "BITS", default_value = "0x3fff",
        value_parser = parse_mask, help_heading = "Kernel"
    )]
    pub mark_mask: MarkMask,
    /// How long IPVS keeps idle connections: TCP, TCP after FIN, UDP, in seconds; `keep` leaves the kernel's.
    /// Longer than the kernel's TCP keepalive (7200 s), so that an idle connection that is alive stays.
    #[arg(
        long, global = true, env = "MESHLB_IPVS_TIMEOUTS", value_name = "TCP,FIN,UDP",
        default_value = "10800,120,300", value_parser = parse_timeouts, help_heading = "Kernel"
    )]
    pub ipvs_timeouts: TimeoutChoice,
    /// Where sysctls are written; a container mounts the host's /proc/sys elsewhere.
    #[arg(
        long,
        global = true,
        env = "MESHLB_PROC_SYS",
        value_name = "DIR",
        default_value = "/proc/sys",
        help_heading = "Kernel"
    )]
    pub proc_sys: PathBuf,
    /// Allocations are kept here across restarts.
    #[arg(
        long,
        global = true,
        env = "MESHLB_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/meshlb",
        help_heading = "Process"
    )]
    pub state_dir: PathBuf,
    /// Locks and sockets.
    #[arg(
        long,
        global = true,
        env = "MESHLB_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/meshlb",
        help_heading = "Process"
    )]
    pub run_dir: PathBuf,
    /// Where the agent serves /metrics, /livez and /readyz; `off` for nowhere.
    #[arg(
        long, global = true, env = "MESHLB_METRICS_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:9477",
        value_parser = parse_listen, help_heading = "Process"
    )]
    pub metrics_listen: Listen,
    /// How often the whole kernel state is read and compared, in seconds, besides the cheap look each second.
    #[arg(long, global = true, env = "MESHLB_RESYNC", value_name = "SECONDS", default_value = "300", value_parser = parse_seconds, help_heading = "Process")]
    pub resync: Duration,
    /// error, warn, info, debug or trace, or a filter such as `meshlb::plan=debug`.
    #[arg(long, global = true, env = "MESHLB_LOG_LEVEL", default_value = "info", help_heading = "Process")]
    pub log_level: String,
    /// How log lines look.
    #[arg(
        long,
        global = true,
        env = "MESHLB_LOG_FORMAT",
        value_enum,
        default_value = "text",
        help_heading = "Process"
    )]
    pub log_format: LogFormat,
    /// The DNS server's.
    #[command(flatten)]
    pub dns: super::dns::DnsOptions,
    /// Values of [`REMEMBERED`], as text.
    #[arg(skip)]
    pub remembered: BTreeMap<String, String>,
}

/// Flags that decide what is programmed and that the state keeps as they were given. (Others it has in fields of their own.)
const REMEMBERED: [&str; 10] = [
    "node_ip",
    "topology_zone",
    "publish_addresses",
    "publish_range",
    "publish_reserved",
    "zone",
    "dns_upstream",
    "dns_forward",
    "dns_allow",
    "dns_rate",
];

/// The values of [`REMEMBERED`] that a command line has, given or by default.
pub fn remembered(matches: &clap::ArgMatches) -> BTreeMap<String, String> {
    let text = |id: &str| {
        let values = matches.get_raw(id)?;
        Some(values.map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(","))
    };
    REMEMBERED.iter().filter_map(|id| Some(((*id).to_owned(), text(id)?))).collect()
}

/// IPVS timeouts, or the kernel's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeoutChoice(pub Option<Timeouts>);

/// A listen address, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listen(pub Option<SocketAddr>);

fn parse_mask(s: &str) -> Result<MarkMask, String> {
    let bits = match s.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => s.parse(),
    };
    MarkMask::new(bits.map_err(|e| e.to_string())?)
}

fn parse_timeouts(s: &str) -> Result<TimeoutChoice, String> {
    if s == "keep" {
        return Ok(TimeoutChoice(None));
    }
    let parts: Result<Vec<u32>, _> = s.split(',').map(|p| p.trim().parse()).collect();
    match parts.as_deref() {
        Ok(&[tcp, tcp_fin, udp]) if tcp > 0 && tcp_fin > 0 && udp > 0 => {
            Ok(TimeoutChoice(Some(Timeouts { tcp, tcp_fin, udp })))
        }
        _ => Err("three numbers of seconds TCP,FIN,UDP, or `keep`".into()),
    }
}

fn parse_listen(s: &str) -> Result<Listen, String> {
    if s == "off" {
        return Ok(Listen(None));
    }
    let full = if s.starts_with(':') { format!("[::]{s}") } else { s.to_owned() };
    full.parse().map(|a| Listen(Some(a))).map_err(|_| "ADDRESS:PORT, :PORT or `off`".into())
}

fn parse_seconds(s: &str) -> Result<Duration, String> {
    let seconds: f64 = s.trim_end_matches('s').parse().map_err(|_| "a number of seconds".to_owned())?;
    if !(1.0..=86_400.0).contains(&seconds) {
        return Err("between 1 and 86400 seconds".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

impl Options {
    /// Puts the flags together and checks what they mean to each other.
    ///
    /// # Errors
    /// A text that names the flag.
    pub fn settings(&self) -> Result<Settings> {
        let name = match &self.node {
            Some(name) => name.clone(),
            // In lower case, as kubelet has it.
            None => nix::unistd::gethostname()
                .ok()
                .and_then(|name| parse_dns_name(&name.into_string().ok()?.to_lowercase()).ok())
                .context("this host has no name that a node could have: give --node")?,
        };
        let mut ranges = PerFamily::default();
        for range in &self.vip_cidr {
            let family = Family::of(&range.addr());
            let range = range.trunc();
            if ranges.get(family).is_some() {
                bail!("--vip-cidr: two {family} ranges; give at most one per family");
            }
            if matches!(range, IpNet::V6(r) if r.network().to_ipv4_mapped().is_some()) {
                bail!("--vip-cidr {range}: an IPv4 range in IPv6 notation; write it as IPv4");
            }
            if range.prefix_len() == 0 {
                bail!("--vip-cidr {range}: too large; a /16 for IPv4 and a /112 for IPv6 are usual");
            }
            let not_given = match family {
                Family::V4 => "the network, ingress, DNS and broadcast addresses are never given out",
                Family::V6 => "the network, ingress and DNS addresses are never given out",
            };
            if nth_address(&range, 3).is_none_or(|first| family == Family::V4 && first == range.broadcast()) {
                bail!(
                    "--vip-cidr {range}: no address is left for virtual IPs ({not_given}); \
                     a /16 for IPv4 and a /112 for IPv6 are usual"
                );
            }
            let first = range.network();
            let never = match first {
                IpAddr::V4(a) => {
                    a.is_loopback() || a.is_multicast() || a.is_link_local() || a.octets()[0] == 0
                }
                IpAddr::V6(a) => {
                    a.is_loopback() || a.is_multicast() || a.is_unicast_link_local() || a.is_unspecified()
                }
            };
            if never {
                bail!(
                    "--vip-cidr {range}: not a range for virtual IPs (loopback, multicast, link-local or unspecified)"
                );
            }
            if let Some(own) = self.node_ip.iter().find(|ip| range.contains(*ip)) {
                bail!(
                    "--vip-cidr {range} holds this node's own address {own}: it would not be reachable any more"
                );
            }
            ranges.set(family, Some(range));
        }
        if ranges.is_empty() {
            bail!("--vip-cidr: give at least one range");
        }
        let mut node_ips = PerFamily::default();
        for ip in &self.node_ip {
            let family = Family::of(ip);
            if node_ips.get(family).is_some() {
                bail!("--node-ip: two {family} addresses; give at most one per family");
            }
            node_ips.set(family, Some(*ip));
        }
        let reserved: Vec<_> = self.publish_reserved.iter().filter_map(|r| r.0.clone()).collect();
        if !reserved.is_empty() && reserved.len() < self.publish_reserved.len() {
            bail!("--publish-reserved: `none` stands alone");
        }
        let node = NodeConfig {
            name: name.into(),
            ranges,
            publish_range: self.publish_range.clone(),
            reserved,
            mask: self.mark_mask,
            zone: self.topology_zone.as_deref().map(Into::into),
        };
        self.dns.config(ranges)?;
        let addresses = AddressRules { node_ips, publish_addresses: self.publish_addresses.clone(), ranges };
        Ok(Settings { node, addresses, timeouts: self.ipvs_timeouts.0 })
    }
}

/// A command line whose defaults come from a YAML file: a mapping from flag names to values, lists for
/// flags that take several.
///
/// # Errors
/// The file can't be read, is no mapping, or names a flag that does not exist.
pub fn with_config_file(mut command: clap::Command, file: &std::path::Path) -> Result<clap::Command> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--config {}", file.display()))?;
    // `off` is a value of flags, no boolean as it was in YAML 1.1.
    let mut yaml = serde_saphyr::Options::default();
    yaml.strict_booleans = true;
    let values: BTreeMap<String, serde_json::Value> = serde_saphyr::from_str_with_options(&text, yaml)
        .with_context(|| format!("--config {}", file.display()))?;
    for (name, value) in values {
        let text = match value {
            serde_json::Value::Null => bail!("--config {}: {name} has no value", file.display()),
            // Nothing is what a list is that was not given, but for this one.
            serde_json::Value::Array(items) if items.is_empty() && name == "publish-reserved" => {
                "none".to_owned()
            }
            serde_json::Value::Array(items)
                if items.is_empty() && command.get_arguments().any(|a| a.get_long() == Some(&name)) =>
            {
                continue;
            }
            serde_json::Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(","),
            other => scalar(&other),
        };
        let flag = |command: &clap::Command| {
            command.get_arguments().find(|a| a.get_long() == Some(&name)).map(|a| a.get_id().clone())
        };
        if let Some(id) = flag(&command).filter(|id| id != "config") {
            command = command.mut_arg(id, |arg| arg.default_value(text));
        } else if let Some(id) = command.find_subcommand("agent").and_then(flag) {
            // The file is an agent's, mostly.
            command = command.mut_subcommand("agent", |agent| {
                agent.mut_arg(id, |arg| arg.required(false).default_value(text))
            });
        } else {
            bail!("--config {}: no flag is called {name:?}", file.display());
        }
    }
    Ok(command)
}

/// A command line whose defaults are what the agent, or the last `apply`, ran with here.
pub fn with_state(mut command: clap::Command, state: &State) -> clap::Command {
    let ranges: Vec<String> = state.ranges.iter().map(|(_, range)| range.to_string()).collect();
    let timeouts = state.ipvs_timeouts.map_or_else(|| "keep".to_owned(), |(ours, _)| ours.to_string());
    let kubeconfig = state.kubeconfig.as_ref().map_or_else(String::new, |f| f.display().to_string());
    let listen = if state.dns_listen.is_empty() && !state.node.is_empty() {
        "off".to_owned()
    } else {
        state.dns_listen.join(",")
    };
    let mask = if state.mark_mask == 0 { String::new() } else { format!("{:#x}", state.mark_mask) };
    for (id, value) in [
        ("node", state.node.clone()),
        ("vip_cidr", ranges.join(",")),
        ("mark_mask", mask),
        ("renderer", state.renderer.clone()),
        ("kubeconfig", kubeconfig),
        ("dns_listen", listen),
        ("ipvs_timeouts", if state.node.is_empty() { String::new() } else { timeouts }),
    ] {
        if !value.is_empty() {
            command = command.mut_arg(id, |arg| arg.default_value(value));
        }
    }
    for (id, value) in &state.flags {
        // A file of another version may name one that this one does not have.
        if let Some(known) = REMEMBERED.iter().find(|known| *known == id) {
            command = command.mut_arg(known, |arg| arg.default_value(value.clone()));
        }
    }
    command
}

fn scalar(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cli::Cli;

    /// What a command line is refused with; empty for one that is right.
    fn refused(flags: &[&str]) -> String {
        let node: &[&str] = if flags.contains(&"--node") { &[] } else { &["--node", "n1"] };
        let line = ["meshlb"].iter().chain(node).chain(flags).chain(&["show"]);
        match Cli::try_parse_from(line) {
            Ok(cli) => cli.options.settings().err().map_or_else(String::new, |e| e.to_string()),
            Err(e) => e.to_string().lines().next().unwrap_or_default().to_owned(),
        }
    }

    #[test]
    fn off_in_a_file_is_the_flags_value() {
        use clap::{CommandFactory as _, FromArgMatches as _};
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.yaml");
        std::fs::write(&file, "metrics-listen: off\ndns-listen: off\nnode: no\nnode-ip: []\n").unwrap();
        let command = super::with_config_file(Cli::command(), &file).unwrap();
        let cli = Cli::from_arg_matches(&command.get_matches_from(["meshlb", "show"])).unwrap();
        assert_eq!(cli.options.metrics_listen.0, None);
        assert_eq!(cli.options.dns.dns_listen, ["off"]);
        assert_eq!(cli.options.settings().unwrap().node.name.as_ref(), "no");
    }

    #[test]
    fn ranges_that_cut_a_node_off_are_refused() {
        for (cidr, why) in [
            ("10.200.0.0/16,10.201.0.0/16", "two IPv4 ranges; give at most one per family"),
            ("10.200.0.0/30", "no address is left for virtual IPs"),
            ("10.200.0.0/31", "no address is left for virtual IPs"),
            ("10.200.0.1/32", "no address is left for virtual IPs"),
            ("fd00::/127", "no address is left for virtual IPs"),
            ("::ffff:10.0.0.0/104", "an IPv4 range in IPv6 notation"),
            ("0.0.0.0/0", "too large"),
            ("127.0.0.0/8", "not a range for virtual IPs"),
            ("169.254.0.0/16", "not a range for virtual IPs"),
            ("224.0.0.0/8", "not a range for virtual IPs"),
            ("fe80::/64", "not a range for virtual IPs"),
            ("192.168.0.0/16", "holds this node's own address 192.168.50.1"),
        ] {
            let said = refused(&["--node-ip", "192.168.50.1", "--vip-cidr", cidr]);
            assert!(said.starts_with("--vip-cidr") && said.contains(why), "{cidr}: {said}");
        }
        assert_eq!(refused(&["--node-ip", "192.168.50.1,fd00:50::1", "--vip-cidr", "10.9.0.0/16"]), "");
        assert_eq!(refused(&["--vip-cidr", "10.9.0.0/29,fd00::/126"]), "");
    }

    #[test]
    fn every_flag_that_is_wrong_is_named() {
        for (flags, why) in [
            (["--node-ip", "10.0.0.1,10.0.0.2"], "--node-ip: two IPv4 addresses"),
            (["--mark-mask", "0xff"], "--mark-mask"),
            (["--mark-mask", "0x5555"], "--mark-mask"),
            (["--ipvs-timeouts", "0,1,2"], "--ipvs-timeouts"),
            (["--metrics-listen", "nowhere"], "--metrics-listen"),
            (["--resync", "0"], "--resync"),
            (["--publish-range", "5-1"], "--publish-range"),
            (["--publish-reserved", "70000"], "--publish-reserved"),
            (["--publish-reserved", "22,none"], "--publish-reserved: `none` stands alone"),
            (["--node-ip", "0.0.0.0"], "--node-ip"),
            (["--node-ip", "::"], "--node-ip"),
            (["--node-ip", "127.0.0.1"], "--node-ip"),
            (["--node-ip", "::1"], "--node-ip"),
            (["--node-ip", "224.0.0.1"], "--node-ip"),
            (["--node-ip", "ff02::1"], "--node-ip"),
            (["--node-ip", "255.255.255.255"], "--node-ip"),
            (["--node-ip", "::ffff:10.0.0.1"], "--node-ip"),
            (["--node", ""], "--node"),
            (["--node", "N1"], "--node"),
            (["--node", "n1..x"], "--node"),
            (["--node", "n1-"], "--node"),
            (["--zone", ""], "--zone"),
            (["--zone", "Foo.bar"], "--zone"),
            (["--zone", "foo..bar"], "--zone"),
            (["--zone", "foo_bar"], "--zone"),
        ] {
            let said = refused(&flags);
            assert!(said.contains(why), "{flags:?}: {said}");
        }
        assert_eq!(refused(&["--ipvs-timeouts", "keep", "--metrics-listen", "off"]), "");
        assert_eq!(refused(&["--zone", "mesh", "--node", "n1.example"]), "");
    }
}
