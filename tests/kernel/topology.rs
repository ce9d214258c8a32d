//! Nodes, pods and an outside client, each a network namespace, on one switch.
//!
//! | | name | addresses |
//! |---|---|---|
//! | nodes | `n1`, `n2`, … | 192.168.50.K, fd00:50::K |
//! | outside | `ext` | 192.168.50.100 (and .101 to .103), fd00:50::100 (to ::103) |
//! | pods | `p11` is the first of node 1 | 10.244.K.1J, fd00:244:K::1J |
//!
//! Every pod listens on 8080 and says its name. Every node has sockets of its own, called `HOST-nK`, on all addresses and
//! ports 22, 80 and 8080: an answer from one of them to somebody who asked a virtual address is a leak.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::client::{self, Probe, Tally};
use crate::ns::{self, Netns, Output};
use crate::runner::{Family, Proto};
use crate::server::{Listen, Server, everywhere};
use crate::snapshot::Snapshot;

/// The virtual addresses' ranges, one per family.
pub const VIP_CIDRS: [&str; 2] = ["10.200.0.0/16", "fd00:200::/112"];

/// How pods hang on their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodNetwork {
    /// A route to each pod over its own link, as Calico does.
    Routed,
    /// A bridge `cni0`, as the bridge plugin and flannel do.
    Bridge {
        /// Whether bridged packets pass netfilter.
        br_netfilter: bool,
    },
}

/// How packets get from a node to the pods of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// By routes.
    Plain,
    /// In VXLAN (UDP 4789).
    Vxlan,
    /// In IPIP (IPv4; IPv6 goes by routes).
    Ipip,
    /// In WireGuard.
    Wireguard,
}

/// Says what a topology is to be; two that are equal can share one.
#[derive(Debug, Clone, PartialEq)]
pub struct Builder {
    nodes: u8,
    pods_per_node: u8,
    pod_network: PodNetwork,
    underlay: Underlay,
    rp_filter: u8,
    pod_mtu: Option<u32>,
    cni_masquerade: bool,
    vip_route: Option<u8>,
    ports: Vec<u16>,
    host_ports: Vec<u16>,
}

impl Builder {
    /// So many nodes (3).
    pub fn nodes(mut self, n: u8) -> Self {
        self.nodes = n;
        self
    }

    /// So many pods on each (2).
    pub fn pods_per_node(mut self, n: u8) -> Self {
        self.pods_per_node = n;
        self
    }

    /// How pods hang on their node (routed).
    pub fn pod_network(mut self, kind: PodNetwork) -> Self {
        self.pod_network = kind;
        self
    }

    /// How packets get to the pods of another node (plain routes).
    pub fn underlay(mut self, kind: Underlay) -> Self {
        self.underlay = kind;
        self
    }

    /// `rp_filter` on the nodes, all links (0).
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.rp_filter = mode;
        self
    }

    /// A smaller MTU on the links between node and pod than elsewhere (1500).
    pub fn pod_mtu(mut self, mtu: u32) -> Self {
        self.pod_mtu = Some(mtu);
        self
    }

    /// The masquerade and forward rules of a CNI are there, by iptables.
    pub fn cni_masquerade(mut self) -> Self {
        self.cni_masquerade = true;
        self
    }

    /// The outside client has a route to the virtual addresses by this node.
    pub fn vip_route(mut self, node: u8) -> Self {
        self.vip_route = Some(node);
        self
    }

    /// The ports that pods listen on, TCP, UDP and SCTP (8080).
    pub fn ports(mut self, ports: &[u16]) -> Self {
        self.ports = ports.to_vec();
        self
    }

    /// The ports of the nodes' own sockets (22, 80, 8080).
    pub fn host_ports(mut self, ports: &[u16]) -> Self {
        self.host_ports = ports.to_vec();
        self
    }

    /// Whether packets between pods of two nodes go through a tunnel.
    pub fn is_overlay(&self) -> bool {
        self.underlay != Underlay::Plain
    }

    /// Builds it. Only one can be there at a time.
    pub fn build(&self, dir: &Path) -> Result<Topology> {
        let topology = self.lay(dir).context("building the topology")?;
        Ok(topology)
    }

    fn lay(&self, dir: &Path) -> Result<Topology> {
        ns::remove_leftovers();
        let switch = Netns::create("sw")?;
        let mut nodes = Vec::new();
        let mut pods = Vec::new();
        for k in 1..=self.nodes {
            let host = Host::create(&format!("n{k}"), k, node_v4(k), node_v6(k))?;
            nodes.push(Node { host, index: k, dir: dir.join(format!("n{k}")) });
        }
        let ext = Host::create("ext", 0, Ipv4Addr::new(192, 168, 50, 100), v6(0xfd00, 0x50, 0, 0x100))?;
        for k in 1..=self.nodes {
            for j in 1..=self.pods_per_node {
                let v6 = v6(0xfd00, 0x244, u16::from(k), 0x10 + u16::from(j));
                pods.push(Host::create(&format!("p{k}{j}"), k, Ipv4Addr::new(10, 244, k, 10 + j), v6)?);
            }
        }
        let keys =
            if self.underlay == Underlay::Wireguard { wireguard_keys(self.nodes)? } else { Vec::new() };
        switch.ip(&self.switch_lines())?;
        // Two at a time on two processors: nodes (with the links of their pods) and the client, then the pods.
        all(nodes.iter().map(|n| || self.set_up_node(n, &keys)))?;
        self.set_up_ext(&ext)?;
        all(pods.iter().map(|p| || p.ns.ip(&self.pod_lines(p))))?;
        let sctp = Proto::Sctp.available();
        for pod in &pods {
            pod.serve(&everywhere(&self.ports, sctp))?;
        }
        for node in &nodes {
            node.serve_as(&format!("HOST-{}", node.name), &everywhere(&self.host_ports, sctp))?;
        }
        let mut topology =
            Topology { spec: self.clone(), nodes, pods, ext, _switch: switch, baseline: Vec::new() };
        topology.baseline = topology.snapshots()?;
        Ok(topology)
    }

    fn switch_lines(&self) -> String {
        let mut lines = "link set lo up\nlink add br0 type bridge\nlink set br0 up\n".to_owned();
        for name in (1..=self.nodes).map(|k| format!("n{k}")).chain(["ext".to_owned()]) {
            let ns = ns::PREFIX;
            let _ = writeln!(lines, "link add {name} type veth peer name eth0 netns {ns}{name}");
            let _ = writeln!(lines, "link set {name} master br0 up");
        }
        lines
    }

    fn set_up_node(&self, node: &Node, keys: &[(String, String)]) -> Result<()> {
        let k = node.index;
        node.ns.enter(|| {
            let rp = self.rp_filter.to_string();
            for (key, value) in [
                ("net.ipv4.ip_forward", "1"),
                ("net.ipv6.conf.all.forwarding", "1"),
                ("net.ipv4.conf.all.rp_filter", rp.as_str()),
                ("net.ipv4.conf.default.rp_filter", rp.as_str()),
            ] {
                sysctl(key, value)?;
            }
            let bridged = u8::from(self.pod_network == PodNetwork::Bridge { br_netfilter: true }).to_string();
            let _ = sysctl("net.bridge.bridge-nf-call-iptables", &bridged);
            let _ = sysctl("net.bridge.bridge-nf-call-ip6tables", &bridged);
            Ok(())
        })?;
        let mut l = String::new();
        let _ = writeln!(l, "link set lo up\nlink set eth0 up");
        let _ = writeln!(l, "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad", node.v4, node.v6);
        if self.pod_network != PodNetwork::Routed {
            let _ = writeln!(l, "link add cni0 type bridge\nlink set cni0 up");
            let _ =
                writeln!(l, "addr add 10.244.{k}.1/24 dev cni0\naddr add fd00:244:{k}::1/64 dev cni0 nodad");
        }
        for j in 1..=self.pods_per_node {
            let (v, ns) = (format!("v{k}{j}"), ns::PREFIX);
            let _ = writeln!(l, "link add {v} type veth peer name eth0 netns {ns}p{k}{j}");
            if let Some(mtu) = self.link_mtu() {
                let _ = writeln!(l, "link set {v} mtu {mtu}");
            }
            let _ = writeln!(l, "link set {v} up");
            if self.pod_network == PodNetwork::Routed {
                // Scope link, and a source for the pods' routes: else the node speaks to its pods as 169.254.1.1.
                let _ = writeln!(l, "addr add 169.254.1.1/32 dev {v} scope link");
                let _ = writeln!(l, "route add 10.244.{k}.1{j}/32 dev {v} src {}", node.v4);
                let _ = writeln!(
                    l,
                    "addr add fe80::1/64 dev {v} nodad\nroute add fd00:244:{k}::1{j}/128 dev {v}"
                );
            } else {
                let _ = writeln!(l, "link set {v} master cni0\nlink set {v} type bridge_slave hairpin on");
            }
        }
        let tunnel = match self.underlay {
            Underlay::Plain => None,
            Underlay::Vxlan => {
                let _ = writeln!(l, "link add ov0 type vxlan id 42 local {} dev eth0 dstport 4789", node.v4);
                Some("ov0")
            }
            Underlay::Ipip => {
                let _ = writeln!(l, "link add ov0 type ipip local {} ttl 64", node.v4);
                Some("ov0")
            }
            Underlay::Wireguard => {
                let _ = writeln!(l, "link add ov0 type wireguard");
                Some("ov0")
            }
        };
        if tunnel.is_some() {
            let _ = writeln!(
                l,
                "link set ov0 mtu {}\nlink set ov0 up\naddr add 10.244.{k}.254/32 dev ov0",
                self.inner_mtu()
            );
            if self.underlay != Underlay::Ipip {
                let _ = writeln!(l, "addr add fd00:244:{k}::fe/128 dev ov0 nodad");
            }
        }
        for o in (1..=self.nodes).filter(|&o| o != k) {
            let v6_plain = format!("route add fd00:244:{o}::/64 via {}", node_v6(o));
            let lines = match self.underlay {
                Underlay::Plain => format!("route add 10.244.{o}.0/24 via {}\n{v6_plain}", node_v4(o)),
                Underlay::Vxlan => format!(
                    "route add 10.244.{o}.0/24 via 10.244.{o}.254 dev ov0 onlink src 10.244.{k}.254\n\
                     route add fd00:244:{o}::fe/128 dev ov0\n\
                     route add fd00:244:{o}::/64 via fd00:244:{o}::fe dev ov0 src fd00:244:{k}::fe"
                ),
                Underlay::Ipip => {
                    format!(
                        "route add 10.244.{o}.0/24 via {} dev ov0 onlink src 10.244.{k}.254\n{v6_plain}",
                        node_v4(o)
                    )
                }
                Underlay::Wireguard => format!(
                    "route add 10.244.{o}.0/24 dev ov0 src 10.244.{k}.254\n\
                     route add fd00:244:{o}::/64 dev ov0 src fd00:244:{k}::fe"
                ),
            };
            l.push_str(&lines);
            l.push('\n');
        }
        node.ns.ip(&l)?;
        match self.underlay {
            Underlay::Vxlan => {
                let fdb: String = (1..=self.nodes)
                    .filter(|&o| o != k)
                    .map(|o| format!("fdb append 00:00:00:00:00:00 dev ov0 dst {}\n", node_v4(o)))
                    .collect();
                node.ns.run_with(&["bridge", "-batch", "-"], &fdb, ns::COMMAND_LIMIT)?.ok()?;
            }
            Underlay::Wireguard => {
                let mut conf = String::new();
                for (o, (private, public)) in (1..).zip(keys) {
                    if o == k {
                        conf.insert_str(
                            0,
                            &format!("[Interface]\nListenPort = 51820\nPrivateKey = {private}\n"),
                        );
                    } else {
                        let _ = writeln!(
                            conf,
                            "[Peer]\nPublicKey = {public}\nEndpoint = {}:51820\nAllowedIPs = 10.244.{o}.0/24, fd00:244:{o}::/64",
                            node_v4(o)
                        );
                    }
                }
                node.ns.run_with(&["wg", "setconf", "ov0", "/dev/stdin"], &conf, ns::COMMAND_LIMIT)?.ok()?;
            }
            Underlay::Plain | Underlay::Ipip => {}
        }
        if self.cni_masquerade {
            for (program, all, own) in [
                ("iptables-restore", "10.244.0.0/16", format!("10.244.{k}.0/24")),
                ("ip6tables-restore", "fd00:244::/32", format!("fd00:244:{k}::/64")),
            ] {
                let rules = format!(
                    "*nat\n:CNI-MASQ - [0:0]\n-A POSTROUTING -m comment --comment \"cni masquerade\" -j CNI-MASQ\n\
                     -A CNI-MASQ -s {own} ! -d {all} -j MASQUERADE\nCOMMIT\n\
                     *filter\n:CNI-FORWARD - [0:0]\n-A FORWARD -m comment --comment \"cni forward\" -j CNI-FORWARD\n\
                     -A CNI-FORWARD -s {all} -j ACCEPT\n-A CNI-FORWARD -d {all} -j ACCEPT\nCOMMIT\n"
                );
                node.ns.run_with(&[program, "--noflush"], &rules, ns::COMMAND_LIMIT)?.ok()?;
            }
        }
        Ok(())
    }

    fn inner_mtu(&self) -> u32 {
        match self.underlay {
            Underlay::Plain => 1500,
            Underlay::Vxlan => 1450,
            Underlay::Ipip => 1480,
            Underlay::Wireguard => 1420,
        }
    }

    fn link_mtu(&self) -> Option<u32> {
        self.pod_mtu.or((self.underlay != Underlay::Plain).then(|| self.inner_mtu()))
    }

    fn pod_lines(&self, pod: &Host) -> String {
        let k = pod.node;
        let mut l = "link set lo up\n".to_owned();
        if let Some(mtu) = self.link_mtu() {
            let _ = writeln!(l, "link set eth0 mtu {mtu}");
        }
        l.push_str("link set eth0 up\n");
        if self.pod_network == PodNetwork::Routed {
            let _ = writeln!(
                l,
                "addr add {}/32 dev eth0\nroute add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1 dev eth0\n\
                 addr add {}/128 dev eth0 nodad\nroute add default via fe80::1 dev eth0",
                pod.v4, pod.v6
            );
        } else {
            let _ = writeln!(
                l,
                "addr add {}/24 dev eth0\nroute add default via 10.244.{k}.1\n\
                 addr add {}/64 dev eth0 nodad\nroute add default via fd00:244:{k}::1",
                pod.v4, pod.v6
            );
        }
        l
    }

    fn set_up_ext(&self, ext: &Host) -> Result<()> {
        let mut l = "link set lo up\nlink set eth0 up\n".to_owned();
        for i in 100..104 {
            // More addresses to bind to; "deprecated" keeps IPv6 from choosing one of them by itself.
            let more = if i == 100 { "" } else { " preferred_lft 0" };
            let _ = writeln!(
                l,
                "addr add 192.168.50.{i}/24 dev eth0\naddr add fd00:50::{i}/64 dev eth0 nodad{more}"
            );
        }
        if let Some(node) = self.vip_route {
            let [v4, v6] = VIP_CIDRS;
            let _ = writeln!(l, "route add {v4} via {}\nroute add {v6} via {}", node_v4(node), node_v6(node));
        }
        ext.ns.ip(&l)
    }
}

fn node_v4(k: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 50, k)
}

fn node_v6(k: u8) -> Ipv6Addr {
    v6(0xfd00, 0x50, 0, u16::from(k))
}

fn v6(a: u16, b: u16, c: u16, last: u16) -> Ipv6Addr {
    Ipv6Addr::new(a, b, c, 0, 0, 0, 0, last)
}

fn sysctl(key: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{}", key.replace('.', "/")), value).with_context(|| key.to_owned())
}

fn wireguard_keys(n: u8) -> Result<Vec<(String, String)>> {
    let key = |command: &[&str], input: &str| -> Result<String> {
        Ok(ns::run_here(command, &[], input, ns::COMMAND_LIMIT)?.ok()?.stdout.trim().to_owned())
    };
    (0..n)
        .map(|_| {
            let private = key(&["wg", "genkey"], "")?;
            let public = key(&["wg", "pubkey"], &private)?;
            Ok((private, public))
        })
        .collect()
}

/// Runs them all at the same time; the first error counts.
pub fn all<T: Send, F: FnOnce() -> Result<T> + Send>(jobs: impl Iterator<Item = F>) -> Result<Vec<T>> {
    thread::scope(|s| {
        let threads: Vec<_> = jobs.map(|job| s.spawn(job)).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    })
}

/// A machine or a pod.
pub struct Host {
    /// Its short name, as in the table above; what its servers call themselves.
    pub name: String,
    /// Its namespace.
    pub ns: Arc<Netns>,
    /// Its (node's, for a pod) number; 0 outside.
    pub node: u8,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    servers: Mutex<BTreeMap<String, Server>>,
}

impl Host {
    fn create(name: &str, node: u8, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Host> {
        let ns = Arc::new(Netns::create(name)?);
        Ok(Host { name: name.to_owned(), ns, node, v4, v6, servers: Mutex::default() })
    }

    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Its address of a family, with a port.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// `n` connections from here, one after the other.
    pub fn connect(&self, proto: Proto, dst: impl Into<SocketAddr>, n: usize) -> Result<Tally> {
        self.probe(&Probe::new(proto, dst).times(n))
    }

    /// A probe from here.
    pub fn probe(&self, probe: &Probe) -> Result<Tally> {
        let tally = probe.run(&self.ns)?;
        crate::runner::saw(&self.ns, &tally);
        Ok(tally)
    }

    /// One echo request from here, waiting two seconds.
    pub fn ping(&self, dst: impl Into<IpAddr>) -> Result<Result<Duration, String>> {
        client::ping(&self.ns, dst.into(), Duration::from_secs(2))
    }

    /// Runs a program here.
    pub fn run(&self, command: &[&str]) -> Result<Output> {
        self.ns.run(command)
    }

    /// Lines of `ip -batch` here.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        self.ns.ip(lines)
    }

    /// Serves on more ports, under its own name.
    pub fn serve(&self, listen: &[Listen]) -> Result<()> {
        self.serve_as(&self.name, listen)
    }

    /// Serves under another name; an earlier server of that name ends.
    pub fn serve_as(&self, name: &str, listen: &[Listen]) -> Result<()> {
        self.stop_serving(name);
        let server = Server::start(&self.ns, name, listen).with_context(|| format!("in {}", self.name))?;
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), server);
        Ok(())
    }

    /// Ends the server of that name, with its connections.
    pub fn stop_serving(&self, name: &str) {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

/// A node.
pub struct Node {
    host: Host,
    /// 1, 2, ….
    pub index: u8,
    /// Where its state and run directories are; emptied before each case.
    pub dir: PathBuf,
}

impl Deref for Node {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    /// The network program's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Its run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// What is in this node's kernel.
    pub fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(&self.ns)
    }
}

/// What a [`Builder`] has built; dropping it removes it.
pub struct Topology {
    /// What it was built from.
    pub spec: Builder,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All pods.
    pub pods: Vec<Host>,
    /// The outside client.
    pub ext: Host,
    _switch: Netns,
    /// Each node's kernel as it was before any program ran on it.
    pub baseline: Vec<Snapshot>,
}

impl Topology {
    /// Three nodes with two routed pods each, no rp_filter.
    pub fn builder() -> Builder {
        Builder {
            nodes: 3,
            pods_per_node: 2,
            pod_network: PodNetwork::Routed,
            underlay: Underlay::Plain,
            rp_filter: 0,
            pod_mtu: None,
            cni_masquerade: false,
            vip_route: None,
            ports: vec![8080],
            host_ports: vec![22, 80, 8080],
        }
    }

    /// Node K (from 1).
    ///
    /// # Panics
    /// If there is none.
    pub fn node(&self, k: u8) -> &Node {
        self.nodes.iter().find(|n| n.index == k).unwrap_or_else(|| panic!("no node {k} in this topology"))
    }

    /// A pod by its name: `p12` is the second of node 1.
    ///
    /// # Panics
    /// If there is none.
    pub fn pod(&self, name: &str) -> &Host {
        self.pods.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no pod {name} in this topology"))
    }

    /// The names of all pods.
    pub fn pod_names(&self) -> Vec<&str> {
        self.pods.iter().map(|p| p.name.as_str()).collect()
    }

    /// What is in each node's kernel.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        all(self.nodes.iter().map(|n| || n.snapshot()))
    }
}
