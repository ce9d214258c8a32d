//! A hand-made node program for the iptables renderer. The harness is proved with it, and when a case fails under
//! `meshlb` it tells whether the case or the program is wrong (`MESHLB_KERNEL_PROGRAM=reference`).
//!
//! Masquerade forwarding, round robin, published ports on all node addresses; nothing else of a MeshService.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::manifests::Manifests;
use crate::program::{Program, flavoured_path};
use crate::runner::{Family, Proto, Renderer, Skip};
use crate::topology::{Node, VIP_CIDRS};

const MASK: u32 = 0x3fff;
const SENTINEL: u32 = u32::MAX;
const SYSCTLS: [(&str, &str, &str); 3] = [
    ("net.ipv4.vs.conntrack", "1", "0"),
    ("net.ipv4.vs.expire_nodest_conn", "1", "0"),
    ("net.ipv4.conf.all.arp_ignore", "1", "0"),
];

/// See the module.
pub struct Reference {
    path: String,
}

impl Reference {
    /// With iptables of the renderer's flavour.
    pub fn new(work: &Path, renderer: Renderer) -> Result<Reference> {
        if renderer == Renderer::Nftables {
            return Err(Skip("the reference program has no nftables renderer".to_owned()).into());
        }
        Ok(Reference { path: flavoured_path(work, renderer)? })
    }

    fn run(&self, node: &Node, command: &[&str], input: &str) -> Result<()> {
        let out = node.ns.run_env(command, &[("PATH", &self.path)], input)?;
        out.ok().map(|_| ()).with_context(|| format!("on {} with input\n{input}", node.name))
    }
}

/// What differs between the families.
struct Words {
    family: Family,
    cidr: &'static str,
    ingress: &'static str,
    node: IpAddr,
}

fn words(node: &Node) -> [Words; 2] {
    let [v4, v6] = VIP_CIDRS;
    [
        Words { family: Family::V4, cidr: v4, ingress: "10.200.0.1", node: node.v4.into() },
        Words { family: Family::V6, cidr: v6, ingress: "fd00:200::1", node: node.v6.into() },
    ]
}

/// The rules, to be added (`-A`, `-I`) or deleted (`-D`).
fn rules(w: &Words, delete: bool) -> String {
    let (f, cidr, ingress) = (w.family, w.cidr, w.ingress);
    let (add, insert) = if delete { ("-D", "-D") } else { ("-A", "-I") };
    let name = "-m comment --comment meshlb";
    let masquerade = format!("-j MASQUERADE {name}");
    format!(
        "*mangle\n\
         {add} INPUT -d {cidr} {name} -j SET --map-set meshlb-V-{f} dst,dst --map-mark\n\
         {add} OUTPUT -d {cidr} {name} -j SET --map-set meshlb-V-{f} dst,dst --map-mark\n\
         {add} OUTPUT -m set --match-set meshlb-N-{f} dst {name} -j SET --map-set meshlb-P-{f} dst,dst --map-mark\n\
         {add} POSTROUTING -m ipvs --ipvs {name} -j MARK --and-mark 0xffffc000\n\
         COMMIT\n\
         *nat\n\
         {insert} PREROUTING -m set --match-set meshlb-P-{f} dst,dst {name} -j DNAT --to-destination {ingress}\n\
         {insert} PREROUTING -d {cidr} {name} -j ACCEPT\n\
         {insert} POSTROUTING -m set --match-set meshlb-L-{f} src,dst {masquerade}\n\
         {insert} POSTROUTING -m ipvs --ipvs -m addrtype --src-type LOCAL -m set ! --match-set meshlb-E-{f} dst {masquerade}\n\
         {insert} POSTROUTING -m ipvs --ipvs -m conntrack --ctstate DNAT -m set ! --match-set meshlb-E-{f} dst {masquerade}\n\
         COMMIT\n\
         *filter\n\
         {insert} INPUT -d {cidr} -m mark ! --mark 0/0x3fff {name} -j ACCEPT\n\
         COMMIT\n"
    )
}

fn guard(w: &Words, published: &[String], own: &[String]) -> String {
    let (f, t, lo, icmp) = match w.family {
        Family::V4 => ("ip", "ipv4_addr", "127.0.0.1", "icmp"),
        Family::V6 => ("ip6", "ipv6_addr", "::1", "icmpv6"),
    };
    let (cidr, node) = (w.cidr, w.node);
    let elements = |all: &[String]| {
        if all.is_empty() { String::new() } else { format!("elements = {{ {} }}", all.join(", ")) }
    };
    let (published, own) = (elements(published), elements(own));
    let refused = format!(
        "{f} daddr @nodes meta l4proto . th dport @pub {f} daddr . meta l4proto . th dport != @own ct state new meta mark & {MASK} == 0"
    );
    format!(
        "table {f} meshlb {{
  set pub {{ type inet_proto . inet_service; {published}
  }}
  set nodes {{ type {t}; elements = {{ {node} }}
  }}
  set own {{ type {t} . inet_proto . inet_service; {own}
  }}
  chain lo-out {{ type filter hook output priority -350; policy accept;
    {f} saddr {lo} {f} daddr {lo} meta l4proto . th dport @pub {f} saddr set {node} meta mark set 0x100
  }}
  chain out {{ type filter hook output priority -99; policy accept;
    {f} daddr {cidr} meta mark set meta mark & {MASK}
    {f} daddr @nodes meta l4proto . th dport @pub meta mark set meta mark & {MASK}
  }}
  chain in {{ type filter hook input priority 90; policy accept;
    {f} daddr {cidr} meta mark set meta mark & {MASK}
  }}
  chain guard {{ type filter hook input priority 101; policy accept;
    {f} daddr {cidr} {icmp} type echo-request accept
    {f} daddr {cidr} meta l4proto tcp reject with tcp reset
    {f} daddr {cidr} meta l4proto sctp reject with {icmp} {unreachable}
    {f} daddr {cidr} reject
    {refused} meta l4proto tcp reject with tcp reset
    {refused} reject
  }}
  chain lo-in {{ type filter hook input priority 102; policy accept;
    {f} saddr {lo} {f} daddr {node} meta l4proto . th sport @pub {f} daddr set {lo}
  }}
}}
",
        unreachable = if w.family == Family::V4 { "prot-unreachable" } else { "admin-prohibited" },
    )
}

impl Program for Reference {
    fn apply(&self, node: &Node, m: &Manifests) -> Result<()> {
        for (key, value, _) in SYSCTLS {
            node.ns.sysctl(key, value)?;
        }
        let mut sets = String::new();
        let mut ipvs = String::new();
        let mut routes = String::new();
        let mut nft = String::new();
        let mut restore = Vec::new();
        for w in words(node) {
            let f = w.family;
            let v6 = if f == Family::V6 { " -6" } else { "" };
            let _ = writeln!(routes, "route add local {} dev lo src {}", w.cidr, w.node);
            let _ = writeln!(ipvs, "-A -f {SENTINEL}{v6} -s rr");
            let inet = if f == Family::V6 { " family inet6" } else { "" };
            for (set, kind) in [
                ("V", "hash:ip,port skbinfo"),
                ("P", "hash:ip,port skbinfo"),
                ("N", "hash:ip"),
                ("L", "hash:net,net"),
                ("E", "hash:ip"),
            ] {
                let (kind, extra) = kind.split_once(' ').unwrap_or((kind, ""));
                let _ = writeln!(sets, "create meshlb-{set}-{f} {kind}{inet} {extra}");
            }
            let _ = writeln!(sets, "add meshlb-N-{f} {}", w.node);
            let mut published = Vec::new();
            let mut own = Vec::new();
            for (index, service) in m.services.iter().enumerate() {
                let endpoints: Vec<_> = m
                    .slices
                    .iter()
                    .filter(|s| s.service == service.name && s.family == f)
                    .flat_map(|s| &s.endpoints)
                    .filter(|e| e.ready)
                    .collect();
                for e in &endpoints {
                    let local = e.node.as_ref() == Some(&node.name);
                    let width = if f == Family::V4 { 32 } else { 128 };
                    let _ = writeln!(sets, "add -exist meshlb-L-{f} {0}/{width},{0}/{width}", e.addr);
                    if local {
                        let _ = writeln!(sets, "add -exist meshlb-E-{f} {}", e.addr);
                    }
                }
                for (number, port) in service.ports.iter().enumerate() {
                    let mark = 0x100 + index * 0x20 + number;
                    let proto = port.proto;
                    let value = format!("skbmark 0x{mark:x}/0x{MASK:x}");
                    for vip in service.vips.iter().filter(|v| Family::of(**v) == f) {
                        let _ =
                            writeln!(sets, "add meshlb-V-{f} {vip},{}:{} {value}", proto.number(), port.port);
                    }
                    if let Some(publish) = port.publish.filter(|&p| p != 0) {
                        for (set, ip) in [("V", w.ingress.to_owned()), ("P", w.node.to_string())] {
                            let _ = writeln!(
                                sets,
                                "add meshlb-{set}-{f} {ip},{}:{publish} {value}",
                                proto.number()
                            );
                        }
                        if proto != Proto::Sctp {
                            published.push(format!("{proto} . {publish}"));
                        }
                    }
                    let _ = writeln!(ipvs, "-A -f {mark}{v6} -s rr");
                    for e in &endpoints {
                        let addr = if f == Family::V6 { format!("[{}]", e.addr) } else { e.addr.to_string() };
                        let _ = writeln!(ipvs, "-a -f {mark}{v6} -r {addr}:{} -m", port.target);
                        if e.addr == w.node {
                            own.push(format!("{} . {proto} . {}", e.addr, port.target));
                        }
                    }
                }
            }
            nft.push_str(&guard(&w, &published, &own));
            restore.push((f.iptables_restore(), rules(&w, false)));
        }
        self.run(node, &["ipset", "restore"], &sets)?;
        self.run(node, &["ipvsadm", "-R"], &ipvs)?;
        self.run(node, &["ip", "-batch", "-"], &routes)?;
        self.run(node, &["nft", "-f", "-"], &nft)?;
        for (program, rules) in restore {
            self.run(node, &[program, "--noflush", "-w"], &rules)?;
        }
        Ok(())
    }

    fn cleanup(&self, node: &Node) -> Result<()> {
        let mut routes = String::new();
        for w in words(node) {
            self.run(node, &[w.family.iptables_restore(), "--noflush", "-w"], &rules(&w, true))?;
            let _ = writeln!(routes, "route del local {} dev lo", w.cidr);
        }
        self.run(node, &["nft", "-f", "-"], "delete table ip meshlb\ndelete table ip6 meshlb\n")?;
        self.run(node, &["ip", "-batch", "-"], &routes)?;
        self.run(node, &["ipvsadm", "-C"], "")?;
        let mut sets = String::new();
        for f in Family::ALL {
            for set in ["V", "P", "N", "L", "E"] {
                let _ = writeln!(sets, "destroy meshlb-{set}-{f}");
            }
        }
        self.run(node, &["ipset", "restore"], &sets)?;
        for (key, _, before) in SYSCTLS {
            node.ns.sysctl(key, before)?;
        }
        Ok(())
    }
}
