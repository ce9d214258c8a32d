//! What is in a node's kernel, as sorted text: to prove that a program leaves nothing behind and touches nothing foreign.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;

use crate::ns::Netns;

/// The sysctls that are looked at.
const SYSCTLS: [&str; 17] = [
    "net.ipv4.ip_forward",
    "net.ipv4.conf.all.arp_ignore",
    "net.ipv4.conf.all.arp_announce",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.default.rp_filter",
    "net.ipv4.conf.eth0.rp_filter",
    "net.ipv4.conf.all.route_localnet",
    "net.ipv4.conf.all.src_valid_mark",
    "net.ipv6.conf.all.forwarding",
    "net.ipv4.vs.conntrack",
    "net.ipv4.vs.conn_reuse_mode",
    "net.ipv4.vs.expire_nodest_conn",
    "net.ipv4.vs.expire_quiescent_template",
    "net.ipv4.vs.sloppy_sctp",
    "net.ipv4.vs.snat_reroute",
    "net.bridge.bridge-nf-call-iptables",
    "net.bridge.bridge-nf-call-ip6tables",
];

/// A node's kernel state.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    sections: BTreeMap<String, Vec<String>>,
}

impl Snapshot {
    /// Takes one. It starts four programs, six where netfilter has rules: each takes 60 ms under emulation.
    pub fn take(ns: &Netns) -> Result<Snapshot> {
        let mut s = Snapshot::default();
        let ruleset = ns.run(&["nft", "-s", "list", "ruleset"])?.ok()?.stdout;
        s.add("nft", nft(&ruleset));
        for (program, tables) in [("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")] {
            if !ruleset.trim().is_empty() {
                let program = format!("{program}-nft-save");
                s.add(&program, xtables(&ns.run(&[&program])?.ok()?.stdout));
            }
            if ns.proc_net(tables).is_ok_and(|names| !names.trim().is_empty()) {
                let program = format!("{program}-legacy-save");
                s.add(&program, xtables(&ns.run(&[&program])?.ok()?.stdout));
            }
        }
        s.add("ipset", lines(&ns.run(&["ipset", "save"])?.ok()?.stdout));
        // Not /proc/net/ip_vs: a foreign service was missing from it once; whether that was the file is not proven.
        s.add("ipvs", lines(&ns.run(&["ipvsadm", "-Sn"])?.ok()?.stdout));
        s.add("ipvs timeouts", lines(&ns.run(&["ipvsadm", "-L", "--timeout"])?.ok()?.stdout));
        let batch = "route show table all\naddr show\nrule show\n";
        let out = ns.run_with(&["ip", "-o", "-batch", "-"], batch, crate::ns::COMMAND_LIMIT)?.ok()?.stdout;
        s.add("ip", lines(&out).into_iter().filter(|l| !l.contains("expires")).collect());
        let sysctls = ns.enter(|| {
            let read = |key: &&str| {
                let value = std::fs::read_to_string(format!("/proc/sys/{}", key.replace('.', "/"))).ok()?;
                Some(format!("{key}={}", value.trim()))
            };
            Ok(SYSCTLS.iter().filter_map(read).collect())
        })?;
        s.add("sysctl", sysctls);
        Ok(s)
    }

    fn add(&mut self, section: &str, mut lines: Vec<String>) {
        lines.sort();
        self.sections.insert(section.to_owned(), lines);
    }

    /// Without what is ours: everything that has our name on it, our marks' IPVS services, the routes of the virtual
    /// addresses, and the sysctls that we may set.
    pub fn foreign(&self) -> Snapshot {
        self.filtered(|section, line| !is_ours(section, line))
    }

    /// Only what is ours (sysctls and timeouts aside).
    pub fn ours(&self) -> Snapshot {
        self.filtered(|section, line| {
            !["sysctl", "ipvs timeouts"].contains(&section) && is_ours(section, line)
        })
    }

    fn filtered(&self, keep: impl Fn(&str, &str) -> bool) -> Snapshot {
        let sections = self
            .sections
            .iter()
            .map(|(name, lines)| (name.clone(), lines.iter().filter(|l| keep(name, l)).cloned().collect()))
            .collect();
        Snapshot { sections }
    }

    /// What is different in `after`, line by line.
    pub fn diff(&self, after: &Snapshot) -> Vec<String> {
        let mut out = Vec::new();
        let none = Vec::new();
        let names: std::collections::BTreeSet<_> =
            self.sections.keys().chain(after.sections.keys()).collect();
        for name in names {
            let (a, b) =
                (self.sections.get(name).unwrap_or(&none), after.sections.get(name).unwrap_or(&none));
            out.extend(more(a, b).map(|l| format!("-[{name}] {l}")));
            out.extend(more(b, a).map(|l| format!("+[{name}] {l}")));
        }
        out
    }

    /// All lines.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.sections.iter().flat_map(|(name, lines)| lines.iter().map(move |l| (name.as_str(), l.as_str())))
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.lines().next().is_none()
    }
}

/// Lines that are in `a` more often than in `b`: a rule that is there twice is not as it was.
fn more<'a>(a: &'a [String], b: &'a [String]) -> impl Iterator<Item = &'a String> {
    let mut left = b.to_vec();
    a.iter().filter(move |line| match left.iter().position(|l| l == *line) {
        Some(at) => {
            left.swap_remove(at);
            false
        }
        None => true,
    })
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().try_for_each(|(section, line)| writeln!(f, "[{section}] {line}"))
    }
}

fn is_ours(section: &str, line: &str) -> bool {
    match section {
        "ipvs" => {
            let mut words = line.split(' ').skip_while(|w| *w != "-f").skip(1);
            let mark: Option<u32> = words.next().and_then(|w| w.parse().ok());
            mark.is_some_and(|m| (0x100..=0x3fff).contains(&m) || m == u32::MAX)
        }
        // Set by us, as sysctls are.
        "ipvs timeouts" => true,
        "ip" => line.contains("10.200.") || line.contains("fd00:200::"),
        "sysctl" => line.contains(".vs.") || line.contains("arp_ignore") || line.contains("bridge-nf"),
        _ => line.to_ascii_lowercase().contains("meshlb"),
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|l| !l.is_empty())
        .collect()
}

/// Each rule with its table; no counters, no built-in chain that is empty and accepts.
fn xtables(text: &str) -> Vec<String> {
    let mut table = String::new();
    let mut out = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            match (words.next(), words.next()) {
                (Some(_), Some("ACCEPT")) => {}
                (Some(name), Some(policy)) => out.push(format!("{table} :{name} {policy}")),
                _ => {}
            }
        } else if line.starts_with('-') {
            out.push(format!("{table} {line}"));
        }
    }
    out
}

/// Each line with its table. Tables that iptables keeps are left to [`xtables`].
fn nft(text: &str) -> Vec<String> {
    let mut table = String::new();
    let mut chain = String::new();
    let mut out = Vec::new();
    for line in text.lines() {
        if line.starts_with("table ") {
            table = line.trim_end_matches(" {").to_owned();
            out.push(table.clone());
        } else if line.starts_with("\tchain ") || line.starts_with("\tset ") || line.starts_with("\tmap ") {
            chain = line.trim().trim_end_matches(" {").to_owned();
            out.push(format!("{table} {chain}"));
        } else if !matches!(line.trim(), "" | "}") && !line.starts_with('#') {
            out.push(format!("{table} {chain}: {}", line.trim()));
        }
    }
    let xtables = ["ip filter", "ip nat", "ip mangle", "ip raw", "ip security"];
    out.retain(|l| {
        !xtables.iter().any(|t| {
            let six = t.replacen("ip", "ip6", 1);
            l.starts_with(&format!("table {t}")) || l.starts_with(&format!("table {six}"))
        })
    });
    out
}
