//! `--renderer auto` does as the host does.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::guard::sh;
use super::support::{container, one_line, said, served, web_on_one_node};
use crate::program::{Meshlb, Program as _};
use crate::runner::{Cx, Matrix, Renderer, Suite};
use crate::topology::Node;

pub fn register(suite: &mut Suite) {
    let plain = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::IptablesLegacy]);
    suite.add("renderer::auto_follows_rules", &plain, rules);
    let limit = std::time::Duration::from_secs(120);
    suite.add_slow("renderer::auto_follows_programs", &Matrix::once(), limit, programs);
}

/// `plan`: the renderer and what is said besides.
fn chosen(meshlb: &Meshlb, node: &Node, dir: &str) -> Result<(String, Vec<String>)> {
    let out = meshlb.run(node, &["plan", dir, "-o", "json"])?;
    ensure!([0, 2].contains(&out.status), "{out}");
    let value: Value = serde_json::from_str(&out.stdout).with_context(|| out.to_string())?;
    let name = value["renderer"].as_str().context("no renderer")?.to_owned();
    Ok((name, said(&out).into_iter().map(str::to_owned).collect()))
}

/// Rules of the host's own; `$1` is the flavour, `$2` their number, `$3` the verb.
fn host_rules(cx: &Cx, node: &Node, flavour: &str, n: u8, verb: &str) -> Result<()> {
    let rules: String = (0..n)
        .map(|i| {
            format!("iptables-{flavour} {verb} INPUT -p tcp --dport {} -j ACCEPT\n", 5000 + u16::from(i))
        })
        .collect();
    sh(cx, node, &rules).map(drop)
}

/// The program `iptables` is of the case's flavour.
fn rules(cx: &mut Cx) -> Result<()> {
    let mut meshlb = cx.meshlb()?.clone();
    meshlb.choice = Some("auto");
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.will_clean(n1);
    let dir = m.dir.to_string_lossy().into_owned();
    let plain = cx.renderer();
    let (name, lines) = chosen(&meshlb, n1, &dir)?;
    ensure!(name == plain.flag() && lines.is_empty(), "no rules at all: {name} {lines:?}");
    // The host's rules decide, not the plain program.
    let (used, other) = match plain {
        Renderer::IptablesNft => ("legacy", "nft"),
        _ => ("nft", "legacy"),
    };
    host_rules(cx, n1, used, 3, "-A")?;
    let (name, lines) = chosen(&meshlb, n1, &dir)?;
    ensure!(name == format!("iptables-{used}") && lines.is_empty(), "only {used}: {name} {lines:?}");
    meshlb.apply(n1, &m)?;
    served(&t, &["p11", "p12"])?;
    // Our own rules change nothing about it, though there are more of them.
    let (name, lines) = chosen(&meshlb, n1, &dir)?;
    ensure!(name == format!("iptables-{used}") && lines.is_empty(), "with ours: {name} {lines:?}");
    // Both: one line, and the one with more rules.
    host_rules(cx, n1, other, 1, "-A")?;
    let (name, lines) = chosen(&meshlb, n1, &dir)?;
    cx.note(lines.join("\n"));
    let (nft, legacy) = if used == "nft" { (3, 1) } else { (1, 3) };
    ensure!(name == format!("iptables-{used}") && lines.len() == 1, "both: {name} {lines:?}");
    ensure!(
        lines[0].contains(&format!("{nft} rules in iptables-nft and {legacy} in iptables-legacy")),
        "both: {lines:?}"
    );
    // The host moves: so do we, and nothing of ours is left behind.
    host_rules(cx, n1, used, 3, "-D")?;
    meshlb.apply(n1, &m)?;
    served(&t, &["p11", "p12"])?;
    let left: Vec<String> = n1
        .snapshot()?
        .lines()
        .filter(|(section, line)| section.ends_with(&format!("-{used}-save")) && line.contains("MESHLB"))
        .map(|(_, line)| line.to_owned())
        .collect();
    ensure!(left.is_empty(), "left in iptables-{used}: {left:?}");
    let ours = sh(cx, n1, &format!("iptables-{other}-save"))?;
    ensure!(ours.stdout.contains("MESHLB-"), "not in iptables-{other}: {ours}");
    host_rules(cx, n1, other, 1, "-D")?;
    cx.cleanup(&t)?;
    // The old tables are there once they were looked at: that is no trace of ours.
    cx.taint();
    Ok(())
}

/// Containers with some of the programs.
fn programs(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.will_clean(n1);
    let dir = m.dir.to_string_lossy().into_owned();
    let names = |suffix: &str| -> Vec<String> {
        let what = ["", "-save", "-restore"];
        ["iptables", "ip6tables"].iter().flat_map(|p| what.map(|w| format!("{p}{suffix}{w}"))).collect()
    };
    let list = |names: &[String]| -> Vec<&'static str> {
        names.iter().map(|n| -> &'static str { Box::leak(n.clone().into_boxed_str()) }).collect()
    };
    let cases: [(&str, Vec<&str>, &str); 5] = [
        ("nft", vec!["nft"], "nftables"),
        ("nft-flavour", [list(&names("-nft")), vec!["nft"]].concat(), "iptables-nft"),
        ("legacy-flavour", list(&names("-legacy")), "iptables-legacy"),
        // As where a distribution has one flavour: no flavour in the names.
        ("plain", [list(&names("")), vec!["nft"]].concat(), "iptables-nft"),
        ("both", [list(&names("-nft")), list(&names("-legacy")), vec!["nft"]].concat(), "iptables-nft"),
    ];
    for (name, programs, want) in cases {
        let mut meshlb = container(cx, name, &programs)?;
        meshlb.choice = Some("auto");
        let (found, lines) = chosen(&meshlb, n1, &dir)?;
        ensure!(found == want && lines.is_empty(), "{name}: {found} {lines:?}");
        if ["nft", "plain"].contains(&name) {
            meshlb.apply(n1, &m).with_context(|| name.to_owned())?;
            served(&t, &["p11", "p12"]).with_context(|| name.to_owned())?;
            cx.cleanup(&t)?;
            cx.will_clean(n1);
        }
    }
    // With both in it, it is the host's rules that say which: most of them, or kubelet's.
    let mut both = container(
        cx,
        "both-and-rules",
        &[list(&names("-nft")), list(&names("-legacy")), vec!["nft"]].concat(),
    )?;
    both.choice = Some("auto");
    for (used, other) in [("legacy", "nft"), ("nft", "legacy")] {
        host_rules(cx, n1, used, 3, "-A")?;
        let (found, _) = chosen(&both, n1, &dir)?;
        ensure!(found == format!("iptables-{used}"), "rules in {used}: {found}");
        both.apply(n1, &m).with_context(|| format!("rules in {used}"))?;
        served(&t, &["p11", "p12"]).with_context(|| format!("rules in {used}"))?;
        let saved = sh(cx, n1, &format!("iptables-{used}-save"))?;
        ensure!(saved.stdout.contains("MESHLB-"), "rules in {used}, and ours not: {saved}");
        sh(cx, n1, &format!("iptables-{other} -t mangle -N KUBE-IPTABLES-HINT"))?;
        let (found, _) = chosen(&both, n1, &dir)?;
        ensure!(found == format!("iptables-{other}"), "kubelet uses {other}: {found}");
        sh(cx, n1, &format!("iptables-{other} -t mangle -X KUBE-IPTABLES-HINT"))?;
        host_rules(cx, n1, used, 3, "-D")?;
        cx.cleanup(&t)?;
        cx.will_clean(n1);
    }
    // Tables that were looked at are there: no trace of ours.
    cx.taint();
    let mut nothing = container(cx, "nothing", &[])?;
    nothing.choice = Some("auto");
    for command in [&["apply", &dir][..], &["agent", "--source", &dir]] {
        let out = nothing.run(n1, command)?;
        cx.note(&out);
        one_line(&out, &["nft is not installed", "apt install nftables"])?;
    }
    ensure!(n1.snapshot()?.ours().is_empty(), "something was programmed");
    Ok(())
}
