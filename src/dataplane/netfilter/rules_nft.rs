//! The netfilter program as text for nft: the small table beside iptables, and the whole program.
//!
//! Both are `table inet meshlb`, so that the change from one renderer to the other replaces the table in one
//! transaction. Priorities: conntrack is at −200, IPVS takes packets at input 98–99 and output −98.

use std::{collections::BTreeSet, fmt::Write as _};

use super::sets::{Kind, Layout, NftContents, loopback, nft_contents, nft_name};
use crate::model::{
    ids::Family,
    kernel::{Elements, FamilyProgram, Program},
};

/// Family and name of our table, as nft writes it.
pub(crate) const TABLE: &str = "inet meshlb";

/// Whether a socket of this very address is there (kernel 5.13): not one of all addresses, which is another program's.
pub(crate) const ASKS_SOCKET: &str = " socket wildcard 0";

/// The chains of the table; without a program, those of both families.
pub(crate) fn chain_names(program: Option<&Program>, layout: Layout) -> Vec<String> {
    let base = [
        "lo-out",
        "vip-first",
        "vip-first-out",
        "out",
        "lo-guard",
        "in",
        "guard",
        "refuse",
        "lo-in",
        "unmark",
    ];
    let mut names: Vec<_> = base.iter().map(|name| (*name).to_owned()).collect();
    if layout.kinds().contains(&Kind::Hairpin) {
        names.push("post".to_owned());
    }
    for family in Family::ALL.into_iter().filter(|f| program.is_none_or(|p| p.families.get(*f).is_some())) {
        names.push(format!("guard-{}", family.digit()));
        if layout == Layout::Whole {
            names.push(format!("post-{}", family.digit()));
        }
    }
    names
}

/// The text that replaces our table, whatever is there, by this program with these elements.
pub(crate) fn install_text(program: &Program, elements: &Elements, layout: Layout) -> String {
    // `add` first, because deleting a table that is not there fails.
    format!("add table {TABLE}\ndelete table {TABLE}\n{}", full_text(program, elements, layout))
}

/// The text that makes a table with the same rules, and takes it away in the same transaction: nothing ever sees it, and the
/// kernel has loaded all that they need.
pub(crate) fn rehearsal_text(program: &Program, layout: Layout) -> String {
    let table = format!("{TABLE}-rehearsal");
    let text = table_text(program, &NftContents::default(), layout);
    text.replacen(&format!("table {TABLE} "), &format!("table {table} "), 1)
        + &format!("delete table {table}\n")
}

/// The table with its elements.
pub(crate) fn full_text(program: &Program, elements: &Elements, layout: Layout) -> String {
    table_text(program, &nft_contents(elements, layout), layout)
}

/// The text that goes before [`full_text`] where chains and sets are there already, or some of them, and stay; and the names of
/// all that the table is made of. Chains stay hooked so: of a packet that is between the old chain and the new one of a table
/// that is replaced, neither knows the mark.
pub(crate) fn emptied_text(program: &Program, layout: Layout) -> (String, BTreeSet<String>) {
    let (mut empty, mut flushes, mut names) = (String::new(), String::new(), BTreeSet::new());
    let mut in_chain = false;
    for line in table_text(program, &NftContents::default(), layout).lines() {
        let head: Vec<&str> = line.split_whitespace().collect();
        if let [word @ ("chain" | "set" | "map"), name, "{"] = head[..] {
            in_chain = word == "chain";
            names.insert(name.to_owned());
            // Those were filled by packets, and are right whatever the rules are.
            if !name.starts_with(STRANGERS) {
                let _ = writeln!(flushes, "flush {word} {TABLE} {name}");
            }
        } else if in_chain && !matches!(head[..], ["type", ..] | ["}"]) {
            continue;
        }
        let _ = writeln!(empty, "{line}");
    }
    (empty + &flushes, names)
}

/// The text that takes the marking out of the other renderer's table, once our rules mark too. A packet that is between two
/// chains when the table is replaced looks its mark up in a map that is gone already; so nothing is looked up any more then.
pub(crate) fn hand_over_text(program: &Program) -> String {
    let mut out = String::new();
    for chain in ["in", "out"] {
        let _ = writeln!(out, "flush chain {TABLE} {chain}");
        for (family, f) in program.families.iter() {
            let names = Names::new(family, f, program);
            let rules = if chain == "in" { names.mark_in(false) } else { names.mark_out(false) };
            for rule in rules {
                let _ = writeln!(out, "add rule {TABLE} {chain} {rule}");
            }
        }
    }
    out
}

/// The table; without elements it is the text that a program is known by.
pub(crate) fn table_text(program: &Program, contents: &NftContents, layout: Layout) -> String {
    let mut out = format!("table {TABLE} {{\n");
    for (family, _) in program.families.iter() {
        for kind in layout.kinds() {
            set_text(&mut out, *kind, family, contents);
        }
        out.push_str(&strangers_text(family));
    }
    let families: Vec<_> =
        program.families.iter().map(|(family, f)| Names::new(family, f, program)).collect();
    let mut chain = |name: &str, hook: &str, rules: Vec<String>| {
        let _ = writeln!(out, "  chain {name} {{");
        if !hook.is_empty() {
            let _ = writeln!(out, "    type {hook}; policy accept;");
        }
        for rule in rules {
            let _ = writeln!(out, "    {rule}");
        }
        out.push_str("  }\n");
    };
    let each = |rules: &dyn Fn(&Names) -> Vec<String>| families.iter().flat_map(rules).collect::<Vec<_>>();
    let whole = layout == Layout::Whole;

    chain("lo-out", "filter hook output priority -350", each(&Names::loopback_out));
    chain("vip-first", "nat hook prerouting priority -101", each(&|n| n.dnat(whole)));
    chain("vip-first-out", "nat hook output priority -101", each(&Names::not_dnat));
    chain("out", "filter hook output priority -99", each(&|n| n.mark_out(whole)));
    chain("lo-guard", "filter hook output priority -97", each(&Names::guard_loopback));
    chain("in", "filter hook input priority 90", each(&|n| n.mark_in(whole)));
    chain("guard", "filter hook input priority 101", each(&|n| n.guard(whole)));
    for n in &families {
        chain(&format!("guard-{}", n.digit), "", n.guard_vip(program));
    }
    chain("refuse", "", refuse());
    chain("lo-in", "filter hook input priority 102", each(&Names::loopback_in));
    if layout.kinds().contains(&Kind::Hairpin) {
        let mut rules = each(&Names::hairpin);
        if whole {
            rules.extend(masquerade(&families, program));
        }
        chain("post", "nat hook postrouting priority 99", rules);
    }
    if whole {
        for n in &families {
            chain(&format!("post-{}", n.digit), "", n.masquerade(program));
        }
    }
    chain("unmark", "filter hook postrouting priority 110", unmark(&families, program, whole));
    out.push_str("}\n");
    out
}

/// Connections by loopback whose client happens to have a published number as its own port: what is sent back to it there is
/// no packet to the published port. (protocol, port of the server, port of the client); filled and emptied by packets alone.
/// Kept for as long as conntrack keeps a silent TCP connection (nf_conntrack_tcp_timeout_established).
fn strangers_text(family: Family) -> String {
    format!(
        "  set {} {{\n    type inet_proto . inet_service . inet_service\n    flags dynamic,timeout\n    timeout 5d\n    size 65535\n  }}\n",
        strangers(family)
    )
}

/// What of published ports is refused where IPVS did not take it: what begins something, since a client may have got a
/// published number as its own port and is answered there; and each datagram, since a flow of UDP that IPVS took until it
/// lost all its services is none that begins.
const BEGINS: [&str; 2] = ["ct state new", "meta l4proto udp ct direction original"];

const STRANGERS: &str = "lo-strangers-";

fn strangers(family: Family) -> String {
    format!("{STRANGERS}{}", family.digit())
}

fn set_text(out: &mut String, kind: Kind, family: Family, contents: &NftContents) {
    let addr = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
    let target = format!("{addr} . inet_proto . inet_service");
    let (word, key) = match kind {
        Kind::Vips | Kind::PublishedMarks => ("map", format!("{target} : mark")),
        Kind::Loopback => ("map", "inet_proto . inet_service : mark".to_owned()),
        Kind::Published | Kind::Own => ("set", target),
        Kind::Addresses | Kind::Local | Kind::Endpoints => ("set", addr.to_owned()),
        Kind::Hairpin => ("set", format!("{addr} . {addr}")),
    };
    let _ = writeln!(out, "  {word} {} {{\n    type {key}", nft_name(kind, family));
    if let Some(keys) = contents.get(&(kind, family)).filter(|keys| !keys.is_empty()) {
        out.push_str("    elements = {\n");
        for (key, value) in keys {
            let _ = match value {
                Some(value) => writeln!(out, "      {key} : {value:#x},"),
                None => writeln!(out, "      {key},"),
            };
        }
        out.push_str("    }\n");
    }
    out.push_str("  }\n");
}

/// The words of one family's rules.
struct Names {
    ip: &'static str,
    nfproto: &'static str,
    digit: u8,
    family: Family,
    range: String,
    ingress: String,
    dns: String,
    node: String,
    lo: String,
    mask: u32,
}

impl Names {
    fn new(family: Family, f: &FamilyProgram, program: &Program) -> Self {
        let (ip, nfproto) = match family {
            Family::V4 => ("ip", "ipv4"),
            Family::V6 => ("ip6", "ipv6"),
        };
        Self {
            ip,
            nfproto,
            digit: family.digit(),
            family,
            range: f.range.to_string(),
            ingress: f.ingress.to_string(),
            dns: f.dns().to_string(),
            node: f.node.to_string(),
            lo: loopback(family).to_string(),
            mask: program.mask,
        }
    }

    fn set(&self, kind: Kind) -> String {
        format!("@{}", nft_name(kind, self.family))
    }

    /// (destination, protocol, port): the key of most sets.
    fn target(&self) -> String {
        format!("{} daddr . meta l4proto . th dport", self.ip)
    }

    /// A packet from and to 127.0.0.1 can't leave the node, so its source becomes the node's address before
    /// conntrack sees it; `loopback_in` turns the answers back. The mark here is only the map's way of
    /// telling a hit from a miss: `mark_out` sets it again after everybody else's rules.
    fn loopback_out(&self) -> Vec<String> {
        let Self { ip, lo, node, .. } = self;
        let (map, strangers) = (self.set(Kind::Loopback), strangers(self.family));
        vec![format!(
            "{ip} saddr {lo} {ip} daddr {lo} meta l4proto . th sport . th dport != @{strangers} \
             meta mark set meta l4proto . th dport map {map} {ip} saddr set {node}"
        )]
    }

    fn loopback_in(&self) -> Vec<String> {
        let Self { ip, lo, node, .. } = self;
        let (map, published) = (self.set(Kind::Loopback), self.set(Kind::Published));
        let strangers = strangers(self.family);
        vec![
            // Only the guard's own refusals, and the host's, are resets: who is refused is no stranger, and may ask again by
            // the same port.
            format!("{ip} saddr {lo} {ip} daddr {lo} tcp flags & rst == rst return"),
            // Before the other: answers of ours look the same once they are turned back.
            format!(
                "{ip} saddr {lo} {ip} daddr {lo} {ip} saddr . meta l4proto . th sport {published} \
                 update @{strangers} {{ meta l4proto . th dport . th sport }}"
            ),
            format!(
                "{ip} saddr {lo} {ip} daddr {node} meta mark set meta l4proto . th sport map {map} meta mark set 0 {ip} daddr set {lo}"
            ),
        ]
    }

    /// Before everybody else's DNAT. A DNAT to the address that it has already is final for conntrack, which
    /// no `accept` is: so no node port of another program, in nft or iptables, takes a packet for a VIP.
    fn dnat(&self, whole: bool) -> Vec<String> {
        let Self { ip, ingress, .. } = self;
        let mut rules = self.not_dnat();
        if whole {
            rules.push(format!("{} {} dnat {ip} to {ingress}", self.target(), self.set(Kind::Published)));
        }
        rules
    }

    fn not_dnat(&self) -> Vec<String> {
        let Self { ip, range, .. } = self;
        vec![format!("{ip} daddr {range} dnat {ip} to {ip} daddr")]
    }

    /// IPVS compares all 32 bits, so the mark is only ours when it gets there.
    fn mark_vip(&self, whole: bool) -> Vec<String> {
        let Self { ip, range, mask, .. } = self;
        if !whole {
            return vec![format!("{ip} daddr {range} meta mark set meta mark & {mask:#x}")];
        }
        let (target, map) = (self.target(), self.set(Kind::Vips));
        vec![
            format!("{ip} daddr {range} meta mark set 0"),
            format!("{ip} daddr {range} meta mark set {target} map {map}"),
        ]
    }

    fn mark_in(&self, whole: bool) -> Vec<String> {
        let Self { ip, range, .. } = self;
        // IPVS goes by its own table and would send on a segment far out of the window, say. On its way out it would be the first
        // one of another connection for conntrack, by which none of our addresses is found: it would leave with its mark.
        // kube-proxy drops these too (KUBE-FORWARD).
        let mistaken = whole.then(|| format!("{ip} daddr {range} ct state invalid drop"));
        mistaken.into_iter().chain(self.mark_vip(whole)).collect()
    }

    fn mark_out(&self, whole: bool) -> Vec<String> {
        let Self { ip, lo, node, mask, .. } = self;
        let mut rules = self.mark_vip(whole);
        let target = self.target();
        // One way only: a program of the node may have got a published number as its own port, and is answered there.
        let way = "ct direction original";
        rules.push(if whole {
            format!("{way} meta mark set {target} map {}", self.set(Kind::PublishedMarks))
        } else {
            format!("{way} {target} {} meta mark set meta mark & {mask:#x}", self.set(Kind::Published))
        });
        let map = self.set(Kind::Loopback);
        rules.push(format!(
            "{ip} saddr {node} {ip} daddr {lo} {way} meta mark set meta l4proto . th dport map {map}"
        ));
        rules
    }

    /// After IPVS: what is still here was not taken, so it must not reach a socket of the host. Published ports are
    /// known by two sets, since DNAT goes by the first: who empties that one has no guard otherwise.
    fn guard(&self, whole: bool) -> Vec<String> {
        let Self { ip, range, digit, .. } = self;
        let (target, own) = (self.target(), self.set(Kind::Own));
        let mut rules = vec![format!("{ip} daddr {range} jump guard-{digit}")];
        rules.extend(self.refuse_published("jump refuse"));
        // Nothing comes back from there, unless somebody has emptied it.
        rules.extend(self.refuse_published("drop"));
        if whole {
            let marks = self.set(Kind::PublishedMarks);
            // The mark is the map's way of telling a hit; the packet ends here.
            rules.extend(BEGINS.map(|begins| {
                format!(
                    "{begins} {target} != {own} meta mark set {target} map {marks} meta mark set 0 jump refuse"
                )
            }));
        }
        rules
    }

    /// What IPVS did not take of published ports.
    fn refuse_published(&self, verdict: &str) -> [String; 2] {
        let (target, own, published) = (self.target(), self.set(Kind::Own), self.set(Kind::Published));
        BEGINS.map(|begins| format!("{begins} {target} {published} {target} != {own} {verdict}"))
    }

    /// The same for 127.0.0.1, already on the way out: the error for a packet whose source was rewritten would
    /// not find its socket, but a refusal here is the sender's own error.
    fn guard_loopback(&self) -> Vec<String> {
        let Self { ip, lo, node, .. } = self;
        let map = self.set(Kind::Loopback);
        // The mark is the map's way of telling a hit; the packet ends here. With its own source again, so
        // that the error finds its socket.
        let loopback = BEGINS.map(|begins| {
            format!(
                "{ip} saddr {node} {ip} daddr {lo} {begins} meta mark set meta l4proto . th dport map {map} {ip} saddr set {lo} jump refuse"
            )
        });
        // And what the node sends to a published port of its own: conntrack must not remember it as settled without a
        // masquerade, or a client that goes on asking would not hear of an endpoint elsewhere that comes later.
        loopback.into_iter().chain(self.refuse_published("jump refuse")).collect()
    }

    fn guard_vip(&self, program: &Program) -> Vec<String> {
        let icmp = match self.family {
            Family::V4 => {
                "icmp type { echo-request, destination-unreachable, time-exceeded, parameter-problem } accept"
            }
            Family::V6 => {
                "icmpv6 type { echo-request, destination-unreachable, packet-too-big, time-exceeded, parameter-problem, nd-neighbor-solicit, nd-neighbor-advert } accept"
            }
        };
        let mut rules = vec![icmp.to_owned(), format!("{} {} accept", self.target(), self.set(Kind::Own))];
        rules.extend(self.dns(program));
        rules.extend(["jump refuse", "drop"].map(str::to_owned));
        rules
    }

    /// The agent's DNS. While no agent runs, questions are dropped: a client takes a refusal as final, and asks again
    /// after silence. A connection that is open already is the agent's, whose socket may be one that is just beginning. Who comes
    /// from outside has nothing to ask: its own node serves it, or it belongs to no node.
    fn dns(&self, program: &Program) -> Vec<String> {
        let Self { ip, dns, .. } = self;
        let to = format!("{ip} daddr {dns} meta l4proto {{ tcp, udp }} th dport 53");
        let outside = program.outside.iter().map(|link| format!("iifname \"{link}\" {to} drop"));
        outside
            .chain([
                format!("{ip} daddr {dns} tcp dport 53 ct state established accept"),
                format!("{to}{ASKS_SOCKET} accept"),
                format!("{to} drop"),
            ])
            .collect()
    }

    /// Our packets that were sent to one of these.
    fn originals(&self) -> [String; 3] {
        let Self { ip, range, lo, .. } = self;
        let addresses = self.set(Kind::Addresses);
        [
            format!("ct original {ip} daddr {range}"),
            format!("ct original {ip} daddr {addresses}"),
            format!("ct original {ip} daddr {lo}"),
        ]
    }

    /// An endpoint that reaches itself must answer to this node.
    fn hairpin(&self) -> Vec<String> {
        let ip = self.ip;
        vec![format!("{ip} saddr . {ip} daddr {} masquerade", self.set(Kind::Hairpin))]
    }

    /// What an endpoint elsewhere must answer to this node, and not to the client.
    fn masquerade(&self, program: &Program) -> Vec<String> {
        let ip = self.ip;
        let mut rules: Vec<_> = program
            .masquerade_bridges
            .iter()
            .filter(|b| Family::of(&b.subnet.addr()) == self.family)
            .map(|b| format!("oifname \"{}\" {ip} saddr {} masquerade", b.bridge, b.subnet.trunc()))
            .collect();
        rules.extend([
            // IPVS did not take it: the guard knows it by the source that `loopback_out` gave it.
            format!("{ip} daddr {} return", self.lo),
            format!("{ip} daddr {} return", self.set(Kind::Local)),
            "ct status dnat masquerade".to_owned(),
            format!("meta nfproto {} fib saddr type local masquerade", self.nfproto),
        ]);
        // The kernel knows where a packet came in by at postrouting since 5.7.
        rules.extend(program.uplinks.iter().map(|link| format!("iifname \"{link}\" masquerade")));
        rules
    }
}

fn refuse() -> Vec<String> {
    vec![
        "meta l4proto tcp reject with tcp reset".to_owned(),
        // Port-unreachable leaves an SCTP client to its timeout; ICMPv6 has nothing better.
        "meta nfproto ipv4 meta l4proto sctp reject with icmp type prot-unreachable".to_owned(),
        "reject with icmpx type port-unreachable".to_owned(),
    ]
}

fn masquerade(families: &[Names], program: &Program) -> Vec<String> {
    // What goes to this node itself is an endpoint here, or was not taken by IPVS and will be refused.
    let mut rules =
        vec!["oifname \"lo\" return".to_owned(), format!("meta mark & {:#x} == 0 return", program.mask)];
    for n in families {
        rules.extend(n.originals().map(|original| format!("{original} jump post-{}", n.digit)));
    }
    rules
}

/// A mark that leaves on an overlay's outer packet would bring that packet to IPVS. So our packets lose it, and only they:
/// those of a connection to one of our addresses. Other bits are not ours, whoever has set them meanwhile. Beside iptables,
/// which does that for all that IPVS has sent on, this table does it for those that it marks itself: its marks and the end
/// of them come and go together.
fn unmark(families: &[Names], program: &Program, whole: bool) -> Vec<String> {
    let mut rules = vec![format!("meta mark & {:#x} == 0 return", program.mask)];
    if whole {
        // By what conntrack knows nothing of, nothing of the following is found.
        rules.push(format!("ct state invalid,untracked meta mark set meta mark & {:#x}", !program.mask));
    }
    for n in families {
        let [range, addresses, lo] = n.originals();
        // Also by the node's address itself: a set can be emptied.
        let node = format!("ct original {} daddr {}", n.ip, n.node);
        let originals = if whole { vec![range, addresses, node, lo] } else { vec![lo] };
        rules.extend(
            originals
                .iter()
                .map(|original| format!("{original} meta mark set meta mark & {:#x}", !program.mask)),
        );
    }
    rules
}
