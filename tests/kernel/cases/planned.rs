//! `meshlb plan` tells of everything that `apply` then changes in the kernel.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use super::support::web_on_one_node;
use crate::manifests::Manifests;
use crate::program::{Meshlb, Program as _};
use crate::runner::{Cx, Matrix, Proto, Renderer, Suite};
use crate::topology::Node;

pub fn register(suite: &mut Suite) {
    let all = Matrix::once().with_renderers(&Renderer::ALL);
    suite.add_slow("planned::everything", &all, std::time::Duration::from_secs(120), everything);
}

fn everything(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.service("other").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("other", &[t.pod("p11")]);
    m.write()?;
    cx.will_clean(n1);
    planned(cx, &meshlb, n1, &m, "the first time")?;
    m.service("web").ports.iter_mut().for_each(|p| p.publish = Some(30090));
    m.service("web").set("scheduler", serde_json::json!("lc"));
    m.endpoints("web", &[t.pod("p12"), n1]);
    m.service("new").vips(&["10.200.0.8", "fd00:200::8"])?.port(Proto::Udp, 82, 8080, Some(30082));
    m.endpoints("new", &[t.pod("p11"), t.pod("p12")]);
    m.remove("other");
    m.write()?;
    planned(cx, &meshlb, n1, &m, "an edit of everything")?;
    super::guard::sh(
        cx,
        n1,
        "ip route del local 10.200.0.0/16 dev lo table local; ipvsadm --set 100 101 102; ipvsadm -C",
    )?;
    planned(cx, &meshlb, n1, &m, "what was taken away")?;
    let mut other = meshlb;
    other.choice = Some(match cx.renderer() {
        Renderer::Nftables => "iptables-nft",
        _ => "nftables",
    });
    planned(cx, &other, n1, &m, "another renderer")?;
    other.cleanup(n1)
}

/// Each line that is then different is about something that the plan has named.
fn planned(cx: &Cx, meshlb: &Meshlb, node: &Node, m: &Manifests, what: &str) -> Result<()> {
    let before = node.snapshot()?;
    let dir = m.dir.to_string_lossy().into_owned();
    let plan = meshlb.run(node, &["plan", &dir])?;
    ensure!(plan.status == 2, "{what}: {plan}");
    ensure!(before.diff(&node.snapshot()?).is_empty(), "{what}: plan itself has changed something");
    meshlb.apply(node, m)?;
    let changed = one_by_one(before.diff(&node.snapshot()?));
    ensure!(!changed.is_empty(), "{what}: nothing was changed");
    let untold: Vec<String> = changed
        .iter()
        .filter_map(|line| {
            let any = about(line, &changed);
            (!any.iter().any(|name| name.is_in(&plan.stdout))).then(|| {
                format!("{line} ({})", any.iter().map(|n| n.0.as_str()).collect::<Vec<_>>().join(" or "))
            })
        })
        .collect();
    cx.note(format!("{what}: {} lines are different, {} of them untold", changed.len(), untold.len()));
    ensure!(
        untold.is_empty(),
        "{what}: not in the plan:\n{}\n\nwhich is\n{}",
        untold.join("\n"),
        plan.stdout
    );
    let again = meshlb.run(node, &["plan", &dir])?;
    ensure!(again.status == 0 && again.stdout.trim() == "0 changes", "{what}, once more: {again}");
    Ok(())
}

/// What a plan may call something; a single word it has to say as it is, so that no entry is taken for another one.
struct Called(String);

impl Called {
    fn is_in(&self, plan: &str) -> bool {
        if self.0.contains(char::is_whitespace) {
            plan.contains(&self.0)
        } else {
            plan.split_whitespace().any(|word| word.trim_end_matches([':', ',']) == self.0)
        }
    }
}

/// What a plan may call what this line is about.
fn about(line: &str, changed: &[String]) -> Vec<Called> {
    let (section, text) = line.split_once("] ").unwrap_or((line, ""));
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |word: &str| words.iter().skip_while(|w| **w != word).nth(1).map(|w| (*w).to_owned());
    let mut out = Vec::new();
    if section.ends_with("[sysctl") {
        out.extend(text.split('=').next().map(|key| format!("sysctl {key}")));
    } else if section.ends_with("[ipvs timeouts") {
        out.push("ipvs timeouts".to_owned());
    } else if section.ends_with("[ipvs") {
        match after("-r") {
            Some(real) => out.push(format!("-> {real}")),
            None => out.extend(after("-f").map(|mark| format!("FWM {mark}"))),
        }
        // With a service go its destinations.
        if section.starts_with('-') {
            let version = if words.contains(&"-6") { 6 } else { 4 };
            for end in ["\n", "  ("] {
                out.extend(after("-f").map(|mark| format!("- ipvs FWM {mark} IPv{version}{end}")));
            }
        }
    } else if section.ends_with("[ip") {
        out.extend(words.iter().filter(|w| w.contains('/')).map(|range| format!("route local {range}")));
    } else if section.ends_with("[ipset") {
        let name = words.get(1).copied().unwrap_or_default();
        // Of a set as a whole, or of an entry, which may go with its set.
        let whole = |l: &String| l.starts_with('-') && l.contains(&format!("[ipset] create {name} "));
        if words.first() == Some(&"create") || (section.starts_with('-') && changed.iter().any(whole)) {
            out.push(name.to_owned());
        }
        if words.first() == Some(&"add") {
            out.extend(words.get(2).into_iter().flat_map(|entry| of_loopback(entry)));
        }
    } else if section.ends_with("[nft") {
        let entries = entries(text);
        if entries.is_empty() {
            let kinds = ["chain", "set", "map"];
            out.extend(kinds.iter().filter_map(|k| after(k)).map(|n| n.trim_end_matches(':').to_owned()));
        }
        // Another renderer's table goes as a whole, or all of it that this one has no use for: with a set its entries.
        let head = text.split_once(": ").map_or(text, |(head, _)| head);
        let goes = section.starts_with('-') && changed.iter().any(|l| *l == format!("-[nft] {head}"));
        if text == "table inet meshlb" || goes || (section.starts_with('-') && entries.is_empty()) {
            out.push("inet meshlb".to_owned());
        }
        out.extend(entries);
    } else {
        let ours = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .filter(|w| w.starts_with("MESHLB-"));
        out.extend(ours.map(str::to_owned));
    }
    out.into_iter().map(Called).collect()
}

/// nft shows several entries of a set in a line, and others beside them when one is gone: a line for each, without those that
/// are where they were.
fn one_by_one(changed: Vec<String>) -> Vec<String> {
    let single = |line: &String| match inside(line) {
        None => vec![line.clone()],
        Some((head, entries)) => {
            entries.split(',').map(|entry| format!("{head}: {}", entry.trim())).collect()
        }
    };
    let lines: Vec<String> = changed.iter().flat_map(single).collect();
    let other = |line: &str| match line.split_at(1) {
        ("+", rest) => format!("-{rest}"),
        (_, rest) => format!("+{rest}"),
    };
    let all: std::collections::BTreeSet<&String> = lines.iter().collect();
    lines.iter().filter(|line| !line.ends_with(": ") && !all.contains(&other(line))).cloned().collect()
}

/// The set or map and its entries, where a line of nft shows some.
fn inside(line: &str) -> Option<(&str, &str)> {
    let (head, inside) =
        line.split_once(": ").filter(|(head, _)| head.contains(" set ") || head.contains(" map "))?;
    let is_head = ["type ", "flags ", "size "].iter().any(|word| inside.starts_with(word));
    (!is_head).then(|| (head, inside.trim_start_matches("elements = {").trim_end_matches('}')))
}

/// What the entries of a line of nft are called.
fn entries(text: &str) -> Vec<String> {
    let Some((_, inside)) = inside(text) else { return vec![] };
    let keys = inside.split(',').filter_map(|entry| entry.split(" : ").next()).map(str::trim);
    let mut out = Vec::new();
    for key in keys {
        match key.split(" . ").collect::<Vec<_>>()[..] {
            ["127.0.0.1" | "::1", protocol, port] | [protocol @ ("tcp" | "udp" | "sctp"), port] => {
                out.extend(of_loopback(&format!("{protocol}:{port}")));
            }
            [addr, protocol, port] => out.push(format!("{addr},{protocol}:{port}")),
            // From an endpoint to itself.
            [addr, to] if addr == to => out.push(addr.to_owned()),
            [addr] if addr.parse::<IpAddr>().is_ok() => out.push(addr.to_owned()),
            _ => {}
        }
    }
    out
}

/// An entry as a plan calls it: one of 127.0.0.1 has a number alone, one from an endpoint to itself is the endpoint's.
fn of_loopback(entry: &str) -> Vec<String> {
    if let Some((addr, to)) = entry.split_once(',')
        && addr == to
    {
        return vec![addr.to_owned()];
    }
    match entry.split_once(':') {
        Some(("tcp" | "udp" | "sctp", _)) => vec![format!("IPv4,{entry}"), format!("IPv6,{entry}")],
        _ => vec![entry.to_owned()],
    }
}
