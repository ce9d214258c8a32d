//! Looks, before anything is programmed, whether this node can do it. Changes nothing.

use std::{collections::BTreeSet, fmt};

use super::{AddressRules, Error, Host};
use crate::model::{ids::Family, node::NodeFacts};

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something will not work for some traffic.
    Warning,
    /// Nothing will work.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// One thing that was found, and what to do about it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// One line for people.
    pub message: String,
}

/// What [`check`] needs to know besides the host itself.
pub struct Subject<'a> {
    /// VIP ranges and `--node-ip`.
    pub rules: &'a AddressRules,
    /// The result of opening IPVS.
    pub ipvs: Result<(), Error>,
    /// Contents of /proc/self/status; see [`own_status`].
    pub status: &'a str,
    /// From [`super::host::LinuxHost::ra_dependent_links`].
    pub ra_links: &'a [String],
    /// Whether the program is going to write. `plan` and `show` do without rights to.
    pub writes: bool,
}

/// Links by which a program shows that can't be on one node with us, who that is, and what comes of it. Names: kube-router
/// pkg/controllers/proxy/network_services_controller.go, Cilium pkg/defaults, Calico
/// felix/dataplane/linux/dataplanedefs.
const STRANGERS: [(&str, &str, &str); 3] = [
    (
        "kube-dummy-if",
        "kube-router's service proxy",
        "it removes every IPVS service that is not its own: run kube-router with --run-service-proxy=false, beside \
         kube-proxy, and delete that link",
    ),
    (
        "cilium_host",
        "Cilium",
        "its eBPF programs take packets past netfilter and IPVS, which serve ours: use another network plugin",
    ),
    (
        "bpfin.cali",
        "Calico's eBPF data plane",
        "it takes packets past netfilter and IPVS, which serve ours: give Calico its iptables or nftables data plane",
    ),
];

/// One line for people where somebody is on this node beside whom services can't work.
pub fn refused(links: &BTreeSet<String>) -> Option<String> {
    let (link, who, why) = STRANGERS.iter().find(|(link, ..)| links.contains(*link))?;
    Some(format!("{who} is on this node (link {link}), and meshlb does not work beside it: {why}"))
}

/// /proc/self/status of the calling thread (its capabilities may differ from the process's); empty where
/// it can't be read.
pub fn own_status() -> String {
    std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default()
}

/// Bits of capabilities(7) that programming needs (linux/capability.h).
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")];

/// Everything that stands in the way, the worst first.
pub fn check(host: &mut dyn Host, subject: &Subject<'_>) -> Vec<Finding> {
    let mut report = Report(Vec::new());
    if subject.writes {
        rights(subject.status, &mut report);
    }
    if let Err(e) = &subject.ipvs {
        report.add(Severity::Error, format!("IPVS can't be used: {e}"));
    }
    forwarding(host, subject, &mut report);
    reverse_path(host, &mut report);
    match host.facts(subject.rules) {
        Ok(facts) => addresses(&facts, subject.rules, &mut report),
        Err(e) => report.add(Severity::Error, e.to_string()),
    }
    for (_, range) in subject.rules.ranges.iter() {
        match host.overlaps(range) {
            Ok(lines) => lines.iter().for_each(|line| report.add(Severity::Warning, overlap(range, line))),
            Err(e) => report.add(Severity::Error, e.to_string()),
        }
    }
    let mut findings = report.0;
    findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
    findings
}

struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, severity: Severity, message: String) {
        self.0.push(Finding { severity, message });
    }
}

fn effective(status: &str) -> Option<u64> {
    mask(status, "CapEff:")
}

/// A mask of /proc/self/status (proc(5)), such as that of `SigIgn:`.
pub fn mask(status: &str, field: &str) -> Option<u64> {
    let hex = status.lines().find_map(|l| l.strip_prefix(field))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

/// One line for people where /proc/self/status tells that CAP_NET_ADMIN, without which nothing can be programmed, is
/// missing.
pub fn no_net_admin(status: &str) -> Option<String> {
    let missing = effective(status)? & (1 << CAPABILITIES[0].0) == 0;
    missing.then(|| advice(status, CAPABILITIES[0].1))
}

/// What to do about capabilities that are missing.
fn advice(status: &str, missing: &str) -> String {
    let container = "in a container add securityContext.capabilities.add: [NET_ADMIN, NET_RAW]";
    let effective_uid =
        |l: &str| l.strip_prefix("Uid:").and_then(|ids| ids.split_whitespace().nth(1).map(|u| u == "0"));
    if status.lines().find_map(effective_uid) == Some(true) {
        format!(
            "no {missing}, though this is root: it was taken away from this process; {container}, in a systemd unit \
             see CapabilityBoundingSet="
        )
    } else {
        format!("no {missing}: run as root; {container}")
    }
}

fn rights(status: &str, report: &mut Report) {
    let Some(effective) = effective(status) else {
        return report.add(
            Severity::Info,
            "can't read this process's capabilities; CAP_NET_ADMIN and CAP_NET_RAW are needed".into(),
        );
    };
    let missing: Vec<_> =
        CAPABILITIES.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        report.add(Severity::Error, advice(status, &missing.join(" and no ")));
    }
}

fn forwarding(host: &mut dyn Host, subject: &Subject<'_>, report: &mut Report) {
    let off = |host: &mut dyn Host, path| matches!(host.sysctl(path), Ok(Some(v)) if v == "0");
    let ranges = &subject.rules.ranges;
    if ranges.v4.is_some() && off(host, "net/ipv4/ip_forward") {
        report.add(
            Severity::Info,
            "net.ipv4.ip_forward is 0: the agent sets it to 1; set it in /etc/sysctl.d too, so that pods are \
             reachable before the agent starts"
                .into(),
        );
    }
    if ranges.v6.is_none() {
        return;
    }
    match host.sysctl("net/ipv6/conf/all/forwarding") {
        Ok(None) => report.add(
            Severity::Error,
            "this kernel has no IPv6, but --vip-cidr names an IPv6 range: enable IPv6 or leave that range out"
                .into(),
        ),
        Ok(Some(v)) if v == "0" => match subject.ra_links.first() {
            Some(link) => report.add(
                Severity::Error,
                format!(
                    "net.ipv6.conf.all.forwarding is 0 and can't be set: {} got its default route by router \
                     advertisement and would lose it; set net.ipv6.conf.{link}.accept_ra=2 first",
                    subject.ra_links.join(", ")
                ),
            ),
            None => report.add(
                Severity::Info,
                "net.ipv6.conf.all.forwarding is 0: the agent sets it to 1; set it in /etc/sysctl.d too".into(),
            ),
        },
        _ => {}
    }
}

fn reverse_path(host: &mut dyn Host, report: &mut Report) {
    let mut is = |path, value| matches!(host.sysctl(path), Ok(Some(v)) if v == value);
    if is("net/ipv4/conf/all/src_valid_mark", "1") {
        report.add(
            Severity::Warning,
            "net.ipv4.conf.all.src_valid_mark is 1 (wg-quick sets it), so sources are checked by the routes of \
             our marks as well; if connections to VIPs time out, set it to 0"
                .into(),
        );
    }
    if is("net/ipv4/conf/all/rp_filter", "1") {
        report.add(
            Severity::Info,
            "net.ipv4.conf.all.rp_filter is 1 (strict): works with symmetric routes; where a node has several \
             uplinks set it to 2"
                .into(),
        );
    }
}

fn addresses(facts: &NodeFacts, rules: &AddressRules, report: &mut Report) {
    for family in Family::ALL {
        let range = rules.ranges.get(family);
        match rules.node_ips.get(family) {
            Some(ip) if !facts.all_addresses.contains(ip) => report.add(
                Severity::Warning,
                format!(
                    "--node-ip {ip} is not an address of this node: the route for {} can't use it as its \
                     source until it is",
                    range.map_or_else(|| "VIPs".to_owned(), ToString::to_string)
                ),
            ),
            // With the other family there is something to serve.
            None if range.is_some() && facts.primary.get(family).is_none() => report.add(
                if facts.primary.is_empty() { Severity::Error } else { Severity::Info },
                format!(
                    "this node has no {family} address to use, so it serves no {family}: add one, or leave out the \
                     {family} --vip-cidr"
                ),
            ),
            _ => {}
        }
    }
    if facts.published_addresses.is_empty() {
        report.add(
            Severity::Warning,
            "no address of this node takes published ports: --publish-addresses matches none of its addresses"
                .into(),
        );
    }
}

fn overlap(range: &ipnet::IpNet, line: &str) -> String {
    format!(
        "the VIP range {range} overlaps {line}: what is there is not reachable from this node; choose another --vip-cidr"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ipnet::IpNet;

    use super::*;
    use crate::{
        dataplane::Listener,
        model::{
            ids::PerFamily,
            kernel::{BridgeSubnet, PublishedFlows, VipRoute},
        },
    };

    #[derive(Default)]
    struct Node {
        sysctls: BTreeMap<&'static str, &'static str>,
        facts: NodeFacts,
        overlaps: Vec<String>,
    }

    impl Host for Node {
        fn vip_routes(&mut self, _: &PerFamily<IpNet>) -> Result<PerFamily<VipRoute>, Error> {
            unreachable!()
        }
        fn put_vip_route(&mut self, _: &VipRoute) -> Result<(), Error> {
            unreachable!()
        }
        fn our_ranges(&mut self) -> Result<BTreeSet<IpNet>, Error> {
            unreachable!()
        }
        fn del_vip_route(&mut self, _: Family, _: &IpNet) -> Result<(), Error> {
            unreachable!()
        }
        fn overlaps(&mut self, _: &IpNet) -> Result<Vec<String>, Error> {
            Ok(self.overlaps.clone())
        }
        fn sysctl(&mut self, path: &str) -> Result<Option<String>, Error> {
            Ok(self.sysctls.get(path).map(|v| (*v).to_owned()))
        }
        fn can_have(&mut self, _: &str, _: &str) -> Result<bool, Error> {
            unreachable!()
        }
        fn set_sysctl(&mut self, _: &str, _: &str) -> Result<(), Error> {
            unreachable!()
        }
        fn facts(&mut self, _: &AddressRules) -> Result<NodeFacts, Error> {
            Ok(self.facts.clone())
        }
        fn bridges_of(&mut self, _: &BTreeSet<std::net::IpAddr>) -> Result<Vec<BridgeSubnet>, Error> {
            unreachable!()
        }
        fn listeners(&mut self) -> Result<Vec<Listener>, Error> {
            unreachable!()
        }
        fn forget_udp(&mut self, _: &crate::model::kernel::UdpFlows) -> Result<usize, Error> {
            unreachable!()
        }
        fn open_flows(&mut self, _: &[PublishedFlows]) -> Result<Vec<bool>, Error> {
            unreachable!()
        }
        fn cut_flows(&mut self, _: &[PublishedFlows]) -> Result<usize, Error> {
            unreachable!()
        }
        fn writes(&self) -> u64 {
            0
        }
    }

    const ROOT: &str = "Name:\tmeshlb\nCapEff:\t000001ffffffffff\n";
    const NOBODY: &str = "Name:\tmeshlb\nCapEff:\t0000000000002000\n";

    fn good() -> Node {
        let addr: std::net::IpAddr = "192.168.50.1".parse().unwrap();
        Node {
            sysctls: [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")].into(),
            facts: NodeFacts {
                primary: PerFamily { v4: Some(addr), v6: None },
                published_addresses: [addr].into(),
                all_addresses: [addr].into(),
                uplinks: BTreeSet::new(),
                outside: BTreeSet::new(),
            },
            overlaps: vec![],
        }
    }

    fn rules() -> AddressRules {
        AddressRules {
            ranges: PerFamily { v4: "10.200.0.0/16".parse().ok(), v6: None },
            ..AddressRules::default()
        }
    }

    fn found(node: &mut Node, rules: &AddressRules, status: &str, ra: &[String]) -> Vec<(Severity, String)> {
        let subject = Subject { rules, ipvs: Ok(()), status, ra_links: ra, writes: true };
        check(node, &subject).into_iter().map(|f| (f.severity, f.message)).collect()
    }

    #[test]
    fn a_good_node_has_no_findings() {
        assert_eq!(found(&mut good(), &rules(), ROOT, &[]), []);
    }

    #[test]
    fn missing_rights_are_named_but_only_where_they_matter() {
        let findings = found(&mut good(), &rules(), NOBODY, &[]);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].1.starts_with("no CAP_NET_ADMIN: run as root"), "{findings:?}");
        let rules = rules();
        assert_eq!(no_net_admin(ROOT), None);
        let bounded = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffefff\n";
        assert!(no_net_admin(bounded).unwrap().starts_with("no CAP_NET_ADMIN, though this is root"));
        assert!(no_net_admin(NOBODY).unwrap().starts_with("no CAP_NET_ADMIN: run as root"));
        let subject = Subject { rules: &rules, ipvs: Ok(()), status: NOBODY, ra_links: &[], writes: false };
        assert_eq!(check(&mut good(), &subject), []);
    }

    #[test]
    fn who_takes_packets_away_is_refused_by_name() {
        let links = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(
            refused(&links(&["lo", "eth0", "cni0", "flannel.1", "kube-ipvs0", "cali123", "vxlan.calico"])),
            None
        );
        for (link, who) in
            [("kube-dummy-if", "kube-router"), ("cilium_host", "Cilium"), ("bpfin.cali", "Calico's eBPF")]
        {
            let message = refused(&links(&["lo", link])).unwrap();
            assert!(message.contains(who) && message.contains(link), "{message}");
        }
    }

    #[test]
    fn the_worst_comes_first() {
        let mut node = good();
        node.sysctls.insert("net/ipv4/ip_forward", "0");
        node.sysctls.insert("net/ipv4/conf/all/src_valid_mark", "1");
        node.overlaps = vec!["address 10.200.3.4/24 on eth1".into()];
        let rules = rules();
        let ipvs =
            Err(Error::MissingFeature { feature: "IPVS".into(), advice: "load the module ip_vs".into() });
        let subject = Subject { rules: &rules, ipvs, status: ROOT, ra_links: &[], writes: true };
        let findings = check(&mut node, &subject);
        let severities: Vec<_> = findings.iter().map(|f| f.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Warning, Severity::Warning, Severity::Info]);
        assert_eq!(findings[0].message, "IPVS can't be used: the kernel has no IPVS; load the module ip_vs");
        assert!(findings[2].message.contains("overlaps address 10.200.3.4/24 on eth1"), "{findings:?}");
    }

    #[test]
    fn v6_needs_forwarding_that_does_not_cost_the_default_route() {
        let mut node = good();
        node.sysctls.insert("net/ipv6/conf/all/forwarding", "0");
        node.facts.primary.v6 = "fd00:50::1".parse().ok();
        let mut rules = rules();
        rules.ranges.v6 = "fd00:200::/112".parse().ok();
        let findings = found(&mut node, &rules, ROOT, &["eth0".to_owned()]);
        assert!(findings[0].1.contains("set net.ipv6.conf.eth0.accept_ra=2 first"), "{findings:?}");
        assert_eq!(found(&mut node, &rules, ROOT, &[])[0].0, Severity::Info);
        node.sysctls.remove("net/ipv6/conf/all/forwarding");
        assert!(found(&mut node, &rules, ROOT, &[])[0].1.contains("no IPv6"));
    }

    #[test]
    fn addresses_that_are_not_there_are_told() {
        let mut node = good();
        let mut with_ip = rules();
        with_ip.node_ips.v4 = "203.0.113.7".parse().ok();
        assert!(found(&mut node, &with_ip, ROOT, &[])[0].1.contains("--node-ip 203.0.113.7 is not"));
        node.facts.primary.v4 = None;
        node.facts.published_addresses.clear();
        let findings = found(&mut node, &rules(), ROOT, &[]);
        assert!(findings[0].1.contains("no IPv4 address"), "{findings:?}");
        assert!(findings[1].1.contains("--publish-addresses"), "{findings:?}");
    }
}
