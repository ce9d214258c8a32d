//! Whose things are: marks and settings that others have, had, or will have again.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::guard::sh;
use super::support::{one_node, served, web, web_on_one_node};
use crate::manifests::Manifests;
use crate::runner::{Cx, Matrix, Proto, Suite};
use crate::topology::{Node, PodNetwork};

pub fn register(suite: &mut Suite) {
    suite.add("ownership::marks_of_an_earlier_start", &Matrix::pair(), earlier_start);
    suite.add("ownership::sentinel_of_another", &Matrix::pair(), foreign_sentinel);
    suite.add("ownership::another_mask", &Matrix::pair(), another_mask);
    suite.add("ownership::a_lost_state_of_other_ranges", &Matrix::pair(), lost_ranges);
    suite.add("ownership::settings_go_back", &Matrix::pair(), settings);
    suite.add("ownership::settings_wait_for_others", &Matrix::pair(), settings_wait);
}

/// The IPVS services of another program, which all lead to this.
const THEIRS: &str = "10.99.0.1:81";

fn theirs(node: &Node) -> Result<Vec<String>> {
    let all = node.ns.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
    Ok(all.lines().filter(|l| l.contains(THEIRS) || l.contains("-s lblc")).map(str::to_owned).collect())
}

fn sysctl(node: &Node, path: &str) -> Result<String> {
    Ok(node.run(&["cat", &format!("/proc/sys/net/ipv4/{path}")])?.ok()?.stdout.trim().to_owned())
}

/// After the machine was started anew, IPVS is empty. What another program has put there with marks that we remember is its own.
fn earlier_start(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    // With a foreign service there, cleanup leaves sysctls as they are.
    cx.taint();
    cx.apply_on(n1, &m)?;
    let file = n1.state_dir().join("state.json");
    let mut state: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    ensure!(state["bootId"].as_str().is_some_and(|id| id.len() == 36), "{state:#}");
    cx.cleanup(&t)?;
    state["bootId"] = "00000000-0000-4000-8000-000000000000".into();
    std::fs::create_dir_all(n1.state_dir())?;
    std::fs::write(&file, state.to_string())?;
    sh(
        cx,
        n1,
        &format!(
            "for mark in $(seq 256 260); do ipvsadm -A -f $mark -s lblc; ipvsadm -a -f $mark -r {THEIRS} -m; done"
        ),
    )?;
    let before = theirs(n1)?;
    ensure!(before.len() == 10, "{before:#?}");
    cx.apply_on(n1, &m)?;
    served(&t, &["p11", "p12"])?;
    ensure!(theirs(n1)? == before, "before: {before:#?}\nafter: {:#?}", theirs(n1)?);
    // Nor does cleanup take them for ours, where it finds the file of an earlier start.
    state["bootId"] = "00000000-0000-4000-8000-000000000000".into();
    std::fs::write(&file, state.to_string())?;
    cx.cleanup(&t)?;
    ensure!(theirs(n1)? == before, "after cleanup: {:#?}", theirs(n1)?);
    sh(cx, n1, "for mark in $(seq 256 260); do ipvsadm -D -f $mark; done").map(drop)
}

/// A service with the mark of our sentinel is refused in one line, neither emptied by `apply` nor deleted by `cleanup`.
fn foreign_sentinel(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    // With a foreign service there, cleanup leaves sysctls as they are.
    cx.taint();
    cx.will_clean(n1);
    sh(cx, n1, &format!("ipvsadm -A -f 16383 -s lblc; ipvsadm -a -f 16383 -r {THEIRS} -m"))?;
    let before = theirs(n1)?;
    let dir = m.dir.to_string_lossy().into_owned();
    let refused = meshlb.run(n1, &["apply", &dir])?;
    ensure!(
        refused.status != 0 && ["FWM 16383", "--mark-mask"].iter().all(|text| refused.stderr.contains(text)),
        "{refused}"
    );
    ensure!(theirs(n1)? == before, "apply: {:#?}", theirs(n1)?);
    let other = meshlb.clone().flag("--mark-mask=0xffc000");
    other.run(n1, &["apply", &dir])?.ok()?;
    served(&t, &["p11", "p12"])?;
    for meshlb in [&other, &meshlb] {
        meshlb.run(n1, &["cleanup"])?.ok()?;
        ensure!(theirs(n1)? == before, "cleanup: {:#?}", theirs(n1)?);
    }
    let all = n1.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
    ensure!(all.lines().count() == before.len(), "of ours there is still:\n{all}");
    sh(cx, n1, "ipvsadm -D -f 16383").map(drop)
}

/// With another mask everything moves to other marks, and nothing of the old ones stays behind.
fn another_mask(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.apply_on(n1, &m)?;
    let other = meshlb.flag("--mark-mask=0xffc000");
    other.run(n1, &["apply", &m.dir.to_string_lossy()])?.ok()?;
    let marks: Vec<u32> = n1
        .run(&["ipvsadm", "-Sn"])?
        .ok()?
        .stdout
        .lines()
        .filter_map(|l| l.strip_prefix("-A -f ")?.split_whitespace().next()?.parse().ok())
        .collect();
    ensure!(!marks.is_empty() && marks.iter().all(|mark| mark & 0x3fff == 0), "{marks:?}");
    served(&t, &["p11", "p12"])
}

/// Routes and the sentinel of a run with other flags are found without its state; another program's routes are not ours.
fn lost_ranges(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.will_clean(n1);
    let mut other_dir = Manifests::new(&cx.dir.join("other"))?;
    other_dir.service("other").port(Proto::Tcp, 80, 8080, None);
    other_dir.endpoints("other", &[t.pod("p11")]);
    other_dir.write()?;
    let other = meshlb.clone().flag("--vip-cidr=10.50.0.0/16,fd00:50:1::/112").flag("--mark-mask=0xffc000");
    n1.ip_batch("route add local 10.51.0.0/16 dev lo proto 178\n")?;
    let ours = || -> Result<Vec<String>> {
        let mut found = Vec::new();
        for family in ["-4", "-6"] {
            let all = n1.ns.run(&["ip", family, "route", "show", "table", "local"])?.ok()?.stdout;
            found.extend(all.lines().filter(|l| l.contains("proto 177")).map(str::to_owned));
        }
        Ok(found)
    };
    for by_cleanup in [true, false] {
        other.run(n1, &["apply", &other_dir.dir.to_string_lossy()])?.ok()?;
        ensure!(ours()?.len() == 2 && ours()?.iter().any(|l| l.contains("10.50.0.0/16")), "{:?}", ours()?);
        std::fs::remove_dir_all(n1.state_dir())?;
        if by_cleanup {
            meshlb.run(n1, &["cleanup"])?.ok()?;
            ensure!(ours()?.is_empty(), "{:?}", ours()?);
            let left = n1.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
            ensure!(left.is_empty(), "{left}");
        } else {
            meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?.ok()?;
            served(&t, &["p11", "p12"])?;
            let found = ours()?;
            ensure!(
                found.len() == 2
                    && !found.iter().any(|l| l.contains("fd00:50:1:") || l.contains("10.50.0.0")),
                "{found:?}"
            );
            let left = n1.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
            let marks = left
                .lines()
                .filter_map(|l| l.strip_prefix("-A -f ")?.split_whitespace().next()?.parse().ok());
            let marks: Vec<u32> = marks.collect();
            ensure!(!marks.is_empty() && marks.iter().all(|mark| mark & 0xff_c000 == 0), "{left}");
        }
    }
    let theirs = n1.ns.run(&["ip", "route", "show", "table", "local"])?.ok()?.stdout;
    ensure!(theirs.contains("local 10.51.0.0/16 dev lo proto 178"), "{theirs}");
    n1.ip_batch("route del local 10.51.0.0/16 dev lo proto 178\n")
}

/// What the node had before: put back where we had to change it, left where it does for us.
fn settings(cx: &mut Cx) -> Result<()> {
    // On routed pod networks nobody answers for the pods' gateway at all with arp_ignore=2.
    let t = cx.topology(&one_node().pod_network(PodNetwork::Bridge { br_netfilter: true }))?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let reads = |reuse: &str, arp: &str| -> Result<()> {
        let now = (sysctl(n1, "vs/conn_reuse_mode")?, sysctl(n1, "conf/all/arp_ignore")?);
        ensure!(now == (reuse.to_owned(), arp.to_owned()), "{now:?}, not {reuse} and {arp}");
        Ok(())
    };
    let set = "cd /proc/sys/net/ipv4; echo 0 > vs/conn_reuse_mode; echo 2 > conf/all/arp_ignore";
    sh(cx, n1, set)?;
    cx.apply_on(n1, &m)?;
    reads("1", "2")?;
    // As they are when the last case was a while ago.
    t.pod("p12").ns.run(&["ip", "neigh", "flush", "all"])?.ok()?;
    served(&t, &["p11", "p12"])?;
    cx.cleanup(&t)?;
    reads("0", "2")?;
    sh(cx, n1, "cd /proc/sys/net/ipv4; echo 1 > vs/conn_reuse_mode; echo 0 > conf/all/arp_ignore").map(drop)
}

/// While another program has an IPVS service, settings stay as we set them; a later cleanup still knows what they were.
fn settings_wait(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    ensure!(sysctl(n1, "vs/conntrack")? == "0", "an earlier case has left it set");
    cx.apply_on(n1, &m)?;
    sh(cx, n1, "ipvsadm -A -t 10.99.0.1:81 -s lc")?;
    let said = meshlb.run(n1, &["cleanup"])?.ok()?;
    ensure!(
        ["net.ipv4.vs.conntrack", "another program", "cleanup"].iter().all(|text| said.stderr.contains(text)),
        "{said}"
    );
    ensure!(sysctl(n1, "vs/conntrack")? == "1", "it was put back beside a foreign service");
    sh(cx, n1, "ipvsadm -D -t 10.99.0.1:81")?;
    let said = meshlb.run(n1, &["cleanup"])?.ok()?;
    ensure!(said.stderr.is_empty(), "{said}");
    ensure!(sysctl(n1, "vs/conntrack")? == "0", "it was not put back by the second cleanup");
    ensure!(!n1.state_dir().join("state.json").exists(), "a state file is left");
    Ok(())
}
