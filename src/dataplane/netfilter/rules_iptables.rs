//! The netfilter program as text for iptables-restore. Its size does not depend on the number of services.

use std::fmt::Write as _;

use super::sets::{Kind, set_name};
use crate::model::{
    ids::Family,
    kernel::{FamilyProgram, Program},
};

/// One of our chains and the built-in chain that jumps to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Chain {
    pub table: &'static str,
    pub name: &'static str,
    /// Where the jump to it stands; `None` for a chain that only our own rules call.
    pub builtin: Option<&'static str>,
}

const fn chain(table: &'static str, name: &'static str, builtin: &'static str) -> Chain {
    Chain { table, name, builtin: Some(builtin) }
}

/// Every chain that the program can have, by table in the order in which we write them: what accepts
/// and refuses first, what leads packets to IPVS last.
pub(crate) const CHAINS: [Chain; 10] = [
    chain("security", "MESHLB-INPUT", "INPUT"),
    chain("filter", "MESHLB-INPUT", "INPUT"),
    chain("filter", "MESHLB-FORWARD", "FORWARD"),
    chain("nat", "MESHLB-PREROUTING", "PREROUTING"),
    chain("nat", "MESHLB-OUTPUT", "OUTPUT"),
    Chain { table: "nat", name: "MESHLB-INGRESS", builtin: None },
    chain("nat", "MESHLB-POSTROUTING", "POSTROUTING"),
    chain("mangle", "MESHLB-POSTROUTING", "POSTROUTING"),
    chain("mangle", "MESHLB-OUTPUT", "OUTPUT"),
    chain("mangle", "MESHLB-INPUT", "INPUT"),
];

/// The tables of [`CHAINS`], in that order.
pub(crate) const TABLES: [&str; 4] = ["security", "filter", "nat", "mangle"];

/// Who refuses packets that IPVS did not take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Guard {
    /// The nft table, after IPVS.
    Nft,
    /// Without nf_tables: `filter INPUT`, before IPVS.
    Filter {
        /// Whether `security INPUT` comes before IPVS (priority 50, as in iptables-legacy; iptables-nft
        /// has it at 150) and so can clear foreign bits of the mark.
        security: bool,
    },
}

/// How to render.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Options {
    pub guard: Guard,
    /// Whether the hairpin rule is here, and not in the nft table.
    pub hairpin: bool,
    /// The match for packets that IPVS handles: `-m ipvs --ipvs`. Tests on a kernel without IPVS put another.
    pub ipvs_match: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self { guard: Guard::Nft, hairpin: true, ipvs_match: "-m ipvs --ipvs" }
    }
}

/// A rule of one of our chains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Rule {
    pub table: &'static str,
    pub chain: &'static str,
    /// Comment, matches and target.
    pub text: String,
}

/// All rules of one family.
pub(crate) fn rules(program: &Program, family: Family, options: Options) -> Vec<Rule> {
    let Some(f) = program.families.get(family) else { return Vec::new() };
    let mut out = Vec::new();
    let mut rule = |table, chain, comment: &str, text: String| {
        let text = format!("-m comment --comment \"meshlb: {comment}\" {text}");
        out.push(Rule { table, chain, text });
    };
    if let Guard::Filter { security: true } = options.guard {
        let text = format!("-d {} -j MARK --set-xmark 0x0/{:#x}", f.range, !program.mask);
        rule("security", "MESHLB-INPUT", "IPVS compares the whole mark", text);
    }
    filter_rules(&mut rule, program, family, f, options);
    nat_rules(&mut rule, program, family, f, options);
    mangle_rules(&mut rule, program, family, f, options);
    out
}

type Push<'a> = &'a mut dyn FnMut(&'static str, &'static str, &str, String);

fn filter_rules(push: Push, program: &Program, family: Family, f: &FamilyProgram, options: Options) {
    let range = f.range;
    let own = set_name(Kind::Own, family);
    let endpoints = set_name(Kind::Endpoints, family);
    let mut input = |comment: &str, text: String| push("filter", "MESHLB-INPUT", comment, text);
    match options.guard {
        // All of it: what has no service is refused after IPVS, and a connection that drains has no mark.
        Guard::Nft => input("to a service or refused by the guard", format!("-d {range} -j ACCEPT")),
        Guard::Filter { .. } => {
            let vips = set_name(Kind::Vips, family);
            input("to a service", format!("-d {range} -m set --match-set {vips} dst,dst -j ACCEPT"));
        }
    }
    input("ours on this node", format!("-d {range} -m set --match-set {own} dst,dst -j ACCEPT"));
    input("ours on this node", format!("-i lo -m set --match-set {own} dst,dst -j ACCEPT"));
    let replies = "-m conntrack --ctstate RELATED,ESTABLISHED";
    let from = format!("{replies} -m set --match-set {endpoints} src -j ACCEPT");
    input("replies of endpoints", from.clone());
    if let Guard::Filter { .. } = options.guard {
        let (echo, protocol) = match family {
            Family::V4 => ("-p icmp -m icmp --icmp-type 8", "icmp-proto-unreachable"),
            Family::V6 => ("-p ipv6-icmp -m icmp6 --icmpv6-type 128", "icmp6-port-unreachable"),
        };
        // Before what is established is accepted: somebody outside may have asked before this was refused.
        for (protocol, link) in
            ["udp", "tcp"].into_iter().flat_map(|p| program.outside.iter().map(move |l| (p, l)))
        {
            let from = format!("-d {} -i {link} -p {protocol} --dport 53", f.dns());
            input("DNS from outside", format!("{from} -j DROP"));
        }
        input("ping", format!("-d {range} {echo} -j ACCEPT"));
        input("ICMP errors", format!("-d {range} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"));
        if family == Family::V6 {
            for kind in [135, 136] {
                input(
                    "neighbours",
                    format!("-d {range} -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT"),
                );
            }
        }
        for protocol in ["udp", "tcp"] {
            input("DNS", format!("-d {} -p {protocol} --dport 53 -j ACCEPT", f.dns()));
        }
        // From elsewhere what is published comes by the ingress address; only new ones: a client may have got the number as
        // its own port.
        let published = format!(
            "-m conntrack --ctstate NEW -m set --match-set {} dst,dst -m set ! --match-set {own} dst,dst",
            set_name(Kind::Published, family)
        );
        for of in [format!("-d {range}"), published] {
            input("no service here", format!("{of} -p tcp -j REJECT --reject-with tcp-reset"));
            input("no service here", format!("{of} -p sctp -j REJECT --reject-with {protocol}"));
            input("no service here", format!("{of} -j REJECT"));
        }
    }
    push("filter", "MESHLB-FORWARD", "replies of endpoints", from);
    // After the first packet, conntrack itself sends what was published on to the endpoint, so it is
    // forwarded and no longer comes by IPVS.
    let to = format!("{replies} -m conntrack --ctstate DNAT -m set --match-set {endpoints} dst -j ACCEPT");
    push("filter", "MESHLB-FORWARD", "published ports", to);
}

fn nat_rules(push: Push, program: &Program, family: Family, f: &FamilyProgram, options: Options) {
    let ipvs = options.ipvs_match;
    let published = set_name(Kind::Published, family);
    let local = set_name(Kind::Local, family);
    let ours = format!("-m set --match-set {} dst", set_name(Kind::Endpoints, family));
    let (by_vip, by_dnat) = (format!("-m conntrack --ctorigdst {}", f.range), "-m conntrack --ctstate DNAT");
    let hairpin = set_name(Kind::Hairpin, family);
    let text = format!("-d {} -j ACCEPT", f.range);
    for chain in ["MESHLB-PREROUTING", "MESHLB-OUTPUT"] {
        push("nat", chain, "ahead of other node ports", text.clone());
    }
    let text = format!("-m set --match-set {published} dst,dst -j MESHLB-INGRESS");
    push("nat", "MESHLB-PREROUTING", "published ports", text);
    let text = format!("-j DNAT --to-destination {}", f.ingress);
    push("nat", "MESHLB-INGRESS", "ingress address", text);

    let mut post = |comment: &str, text: String| push("nat", "MESHLB-POSTROUTING", comment, text);
    if options.hairpin {
        post("an endpoint to itself", format!("-m set --match-set {hairpin} src,dst -j MASQUERADE"));
    }
    for b in program.masquerade_bridges.iter().filter(|b| Family::of(&b.subnet.addr()) == family) {
        let there = format!("-s {} -o {} {ipvs}", b.subnet.trunc(), b.bridge);
        for asked in [by_vip.as_str(), by_dnat] {
            post("replies stay on the bridge", format!("{there} {asked} {ours} -j MASQUERADE"));
        }
    }
    // The mark is gone by now. IPVS serves others, too, whose clients' addresses are not ours to hide: it is known by
    // the endpoint and by what the client asked for.
    let remote = format!("{ours} -m set ! --match-set {local} dst -j MASQUERADE");
    post("published, endpoint elsewhere", format!("{ipvs} {by_dnat} {remote}"));
    post("from this node, endpoint elsewhere", format!("{ipvs} -m addrtype --src-type LOCAL {remote}"));
    for link in &program.uplinks {
        post("from outside, endpoint elsewhere", format!("-i {link} {ipvs} {by_vip} {remote}"));
    }
}

fn mangle_rules(push: Push, program: &Program, family: Family, f: &FamilyProgram, options: Options) {
    let (mask, range) = (program.mask, f.range);
    let vips = set_name(Kind::Vips, family);
    let published = set_name(Kind::Published, family);
    // Foreign bits in our field are cleared first, or they would select a service on a port that has none.
    let clear = format!("-d {range} -j MARK --set-xmark 0x0/{mask:#x}");
    let look_up = format!("-d {range} -j SET --map-set {vips} dst,dst --map-mark");
    for name in ["MESHLB-INPUT", "MESHLB-OUTPUT"] {
        push("mangle", name, "our field only", clear.clone());
        push("mangle", name, "VIP to mark", look_up.clone());
    }
    // One way only: a program of the node may have got a published number as its own port, and is answered there.
    let text = format!("-m conntrack --ctdir ORIGINAL -j SET --map-set {published} dst,dst --map-mark");
    push("mangle", "MESHLB-OUTPUT", "published port to mark", text);
    let text = format!("{} -j MARK --set-xmark 0x0/{mask:#x}", options.ipvs_match);
    push("mangle", "MESHLB-POSTROUTING", "no mark leaves on an overlay", text);
}

/// The jump from a built-in chain, as iptables-save prints it.
pub(crate) fn jump(builtin: &str, chain: &str) -> String {
    format!("-A {builtin} -m comment --comment meshlb -j {chain}")
}

/// What iptables-save printed of the built-in chains, as far as it concerns us.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Saved {
    /// (table, line): jumps to our chains that stand in other chains.
    pub jumps: Vec<(String, String)>,
    /// (table, chain) of every chain named `MESHLB-…`.
    pub chains: Vec<(String, String)>,
    /// (table, line): the rules of our chains.
    pub rules: Vec<(String, String)>,
    /// (table, line): everything else of `filter INPUT` and `filter FORWARD`, and their policies.
    pub foreign: Vec<(String, String)>,
    /// Tables that iptables-nft can't read, since they hold rules that only nft can make.
    pub unreadable: Vec<String>,
}

impl Saved {
    /// Forgets what is in a table.
    pub(crate) fn leave_out(&mut self, table: &str) {
        for list in [&mut self.jumps, &mut self.chains, &mut self.rules, &mut self.foreign] {
            list.retain(|(t, _)| t != table);
        }
        self.unreadable.retain(|t| t != table);
    }
}

/// Reads the output of iptables-save.
pub(crate) fn parse_save(text: &str) -> Saved {
    let mut saved = Saved::default();
    let mut table = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim().to_owned();
        } else if let Some(name) = unreadable(line) {
            saved.unreadable.push(name.to_owned());
        } else if let Some(rest) = line.strip_prefix(':') {
            let name = rest.split(' ').next().unwrap_or_default();
            if name.starts_with("MESHLB-") {
                saved.chains.push((table.clone(), name.to_owned()));
            } else if table == "filter" && ["INPUT", "FORWARD"].contains(&name) {
                saved.foreign.push((table.clone(), line.to_owned()));
            }
        } else if let Some(rest) = line.strip_prefix("-A ") {
            let chain = rest.split(' ').next().unwrap_or_default();
            if chain.starts_with("MESHLB-") {
                saved.rules.push((table.clone(), line.to_owned()));
            } else if target(line).is_some_and(|t| t.starts_with("MESHLB-")) {
                saved.jumps.push((table.clone(), line.to_owned()));
            } else if table == "filter" && ["INPUT", "FORWARD"].contains(&chain) {
                saved.foreign.push((table.clone(), line.to_owned()));
            }
        }
    }
    saved
}

/// The table of ``# Table `filter' is incompatible, use 'nft' tool.``, which iptables-nft-save says without failing.
fn unreadable(line: &str) -> Option<&str> {
    let (name, rest) = line.strip_prefix("# Table `")?.split_once('\'')?;
    rest.starts_with(" is incompatible").then_some(name)
}

/// The words of a rule as iptables-save prints it: what is quoted is one word, in which a backslash keeps a quote from ending it.
fn words(line: &str) -> Vec<&str> {
    let (mut out, mut start) = (Vec::new(), 0);
    let (mut quoted, mut kept) = (false, false);
    for (at, c) in line.char_indices() {
        match c {
            _ if kept => kept = false,
            '\\' => kept = quoted,
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                out.push(&line[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    out.push(&line[start..]);
    out
}

/// The target of a rule.
pub(crate) fn target(line: &str) -> Option<&str> {
    let words = words(line);
    let at = words.iter().rposition(|word| ["-j", "-g"].contains(word))?;
    words.get(at + 1).copied()
}

/// The text that makes exactly these rules be there and leaves every other chain as it is.
///
/// Naming a chain empties it, so each table changes in one step. Jumps are put in only where they are
/// missing, and never moved; others of ours are taken away.
pub(crate) fn restore_text(rules: &[Rule], saved: &Saved) -> String {
    let mut out = String::new();
    let mut tables = TABLES;
    // What leads packets to IPVS goes first, and the masquerading of what it led there after it.
    if !rules.iter().any(|rule| rule.table == "mangle") {
        tables.reverse();
    }
    for table in tables {
        let wanted: Vec<_> =
            CHAINS.iter().filter(|c| c.table == table && rules.iter().any(|r| is_of(r, c))).collect();
        let mut lines = Vec::new();
        let mut standing: Vec<String> = Vec::new();
        for (_, line) in saved.jumps.iter().filter(|(t, _)| t == table) {
            let normal = line.replace('"', "");
            let wanted = wanted.iter().any(|c| c.builtin.is_some_and(|b| jump(b, c.name) == normal));
            if wanted && !standing.contains(&normal) {
                standing.push(normal);
            } else if let Some(rest) = line.strip_prefix("-A ") {
                lines.push(format!("-D {rest}"));
            }
        }
        for c in &wanted {
            let Some(builtin) = c.builtin else { continue };
            let line = jump(builtin, c.name);
            if !standing.contains(&line) {
                lines.push(line.replacen(&format!("-A {builtin}"), &format!("-I {builtin} 1"), 1));
            }
        }
        for rule in rules.iter().filter(|r| r.table == table) {
            lines.push(format!("-A {} {}", rule.chain, rule.text));
        }
        let unwanted: Vec<_> = saved
            .chains
            .iter()
            .filter(|(t, name)| t == table && !wanted.iter().any(|c| c.name == name))
            .map(|(_, name)| name)
            .collect();
        lines.extend(unwanted.iter().map(|name| format!("-X {name}")));
        if lines.is_empty() && wanted.is_empty() {
            continue;
        }
        let _ = writeln!(out, "*{table}");
        for name in wanted.iter().map(|c| c.name).chain(unwanted.iter().map(|n| n.as_str())) {
            let _ = writeln!(out, ":{name} - [0:0]");
        }
        for line in lines {
            let _ = writeln!(out, "{line}");
        }
        out.push_str("COMMIT\n");
    }
    out
}

fn is_of(rule: &Rule, chain: &Chain) -> bool {
    rule.table == chain.table && rule.chain == chain.name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_quoted_is_no_target() {
        for (line, want) in [
            (r#"-A INPUT -p tcp -m comment --comment "a -j MESHLB-INPUT b" -j ACCEPT"#, Some("ACCEPT")),
            (r#"-A INPUT -j LOG --log-prefix "x -j MESHLB-INPUT""#, Some("LOG")),
            (r#"-A INPUT -j LOG --log-prefix "-j MESHLB-INPUT " --log-level 7"#, Some("LOG")),
            (r#"-A INPUT -j LOG --log-prefix "say \" -j MESHLB-INPUT \\""#, Some("LOG")),
            (r#"-A INPUT -m comment --comment "say \" -j MESHLB-INPUT""#, None),
            ("-A INPUT -m comment --comment meshlb -j MESHLB-INPUT", Some("MESHLB-INPUT")),
            (r#"-A INPUT -m comment --comment "meshlb" -g MESHLB-INPUT"#, Some("MESHLB-INPUT")),
            ("-A INPUT -p tcp", None),
            ("-A INPUT -j", None),
        ] {
            assert_eq!(target(line), want, "{line}");
        }
    }

    #[test]
    fn a_table_that_is_not_shown_is_told_apart_from_an_empty_one() {
        let text = "# Table `filter' is incompatible, use 'nft' tool.\n\
                    # Table `nat' contains incompatible base-chains, use 'nft' tool to list them.\n*nat\nCOMMIT\n";
        assert_eq!(parse_save(text).unreadable, ["filter"]);
    }
}
