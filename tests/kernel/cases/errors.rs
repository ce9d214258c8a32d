//! What is missing or in the way is told in one line that says what to do, and whatever can work goes on working.

use std::fs;
use std::net::SocketAddr;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guard::{refused, sh, to_nothing};
use super::neighbours::on_loopback;
use super::support::{
    ADMIN, container, http, one_line, one_node, ready, said, served, start, vip, wait_until, web,
    web_on_one_node, wrapped,
};
use crate::check;
use crate::manifests::Manifests;
use crate::ns;
use crate::program::Program as _;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::topology::{Node, Topology};

pub fn register(suite: &mut Suite) {
    suite.add("errors::no_rights", &Matrix::pair(), no_rights);
    let kinds = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::Nftables]);
    suite.add("errors::overlapping_range", &kinds, overlap);
    suite.add("errors::full_ipset", &Matrix::once(), full_ipset);
    suite.add_slow("errors::no_program", &Matrix::renderers(), Duration::from_secs(90), no_program);
    let legacy = Matrix::once().with_renderers(&[Renderer::IptablesLegacy]);
    let iptables = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::IptablesLegacy]);
    suite.add_slow("errors::nft_disappears", &iptables, Duration::from_secs(90), nft_disappears);
    suite.add_slow("errors::busy_lock", &legacy, Duration::from_secs(90), busy_lock);
    suite.add("errors::no_ip_vs", &Matrix::pair(), no_ip_vs);
    suite.add_slow("errors::one_family_cannot_be_written", &iptables, Duration::from_secs(150), one_family);
}

/// As another user, and as root without CAP_NET_ADMIN.
fn no_rights(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    let before = n1.snapshot()?;
    // A change that none of them can make.
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    let dir = m.dir.to_string_lossy().into_owned();
    // Another user can read the folder.
    sh(cx, n1, &format!("chmod -R a+rX {}", cx.dir.display()))?;
    let nobody = "exec setpriv --reuid 65534 --regid 65534 --clear-groups MESHLB \"$@\"";
    let bounded = "exec setpriv --bounding-set -net_admin --inh-caps -net_admin MESHLB \"$@\"";
    let kinds = [("nobody", nobody, "run as root"), ("bounded", bounded, "though this is root")];
    for (name, script, text) in kinds {
        let meshlb = wrapped(cx, name, script)?;
        let commands = [&["apply", &dir][..], &["agent", "--source", &dir], &["cleanup"]];
        for command in commands.into_iter().take(if name == "nobody" { 3 } else { 1 }) {
            let out = meshlb.run(n1, command)?;
            cx.note(&out);
            one_line(&out, &["CAP_NET_ADMIN", text, "NET_ADMIN, NET_RAW"])
                .with_context(|| format!("{name}: {command:?}"))?;
        }
        // Looking fails in one line too; what needs no kernel works.
        let out = meshlb.run(n1, &["show"])?;
        cx.note(&out);
        ensure!(out.status == 1 && said(&out).len() == 1, "{name}: {out}");
        let out = n1.run(&[&meshlb.binary.to_string_lossy(), "check", &dir])?;
        ensure!(out.status == 0, "{name}: {out}");
    }
    check::same(&before, &n1.snapshot()?, "something was changed without rights")?;
    served(&t, &["p11", "p12"])
}

/// A route and an address of the node are within the VIP range.
fn overlap(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    sh(
        cx,
        n1,
        "ip link add over0 type dummy; ip link set over0 up; ip addr add 10.200.77.1/24 dev over0
         ip addr add fd00:200::7701/120 dev over0 nodad
         ip route add 10.200.66.0/24 via 192.168.50.100; ip route add fd00:200::6600/120 via fd00:50::100",
    )?;
    let lines = |n1: &Node| -> Result<Vec<String>> {
        let snapshot = n1.snapshot()?;
        let names = ["10.200.66.", "10.200.77.", "fd00:200::66", "fd00:200::77"];
        let theirs = |l: &&str| names.iter().any(|name| l.contains(name));
        Ok(snapshot.lines().map(|(_, l)| l).filter(theirs).map(str::to_owned).collect())
    };
    let before = lines(n1)?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11", "p12"])?;
    m.write()?;
    cx.will_clean(n1);
    let out = meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    cx.note(&out);
    ensure!(out.status == 0, "{out}");
    for text in ["10.200.66.0/24", "10.200.77.1/24", "fd00:200::6600/120", "fd00:200::7701/120"] {
        let hits: Vec<_> = said(&out).into_iter().filter(|l| l.contains(text)).collect();
        ensure!(hits.len() == 1, "{text} is not in one line: {out}");
        let range = if text.starts_with("10.") { "10.200.0.0/16" } else { "fd00:200::/112" };
        ensure!(hits[0].contains(range) && hits[0].contains("choose another --vip-cidr"), "{out}");
    }
    ensure!(said(&out).len() == 4, "not four lines: {out}");
    served(&t, &["p11", "p12"])?;
    ensure!(before == lines(n1)? && before.len() > 3, "theirs has changed: {before:?}, {:?}", lines(n1)?);
    cx.cleanup(&t)?;
    ensure!(before == lines(n1)?, "theirs has changed with cleanup: {before:?}, {:?}", lines(n1)?);
    sh(cx, n1, "ip route del 10.200.66.0/24; ip -6 route del fd00:200::6600/120; ip link del over0").map(drop)
}

/// Somebody has put a set in the place of ours that can't hold more.
fn full_ipset(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let mut agent = start(cx, &cx.meshlb()?.clone(), &t, &m)?;
    let swap = "
        n=$(ipset save meshlb-vips-4 | grep -c ^add)
        ipset save meshlb-vips-4 | sed \"s/meshlb-vips-4/small/; s/maxelem [0-9]*/maxelem $n/\" | ipset restore
        ipset swap small meshlb-vips-4; ipset destroy small; ipset list -t meshlb-vips-4";
    let out = sh(cx, n1, swap)?;
    cx.note(&out.stdout);
    ensure!(out.stdout.contains("maxelem 4"), "the condition is not there: {out}");
    sleep(Duration::from_millis(2500));
    ensure!(!agent.log_text().contains("healing"), "a smaller set alone is no drift:\n{}", agent.log_text());
    m.service("more").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, None);
    m.endpoints("more", &[t.pod("p11")]);
    m.write()?;
    agent.wait_for_log("the set is full", Duration::from_secs(10))?;
    let log = agent.log_text();
    let errors: Vec<&str> = log.lines().filter(|l| l.contains("ERROR")).collect();
    cx.note(errors.join("\n"));
    ensure!(
        errors.len() == 1 && errors[0].contains("ipset meshlb-vips-4") && errors[0].contains("10.200.0.7"),
        "not one line with set and entry:\n{log}"
    );
    served(&t, &["p11", "p12"]).context("the other service")?;
    // It is made anew, large enough.
    ready(n1, &mut agent)?;
    check::only(
        &t.pod("p12").connect(Proto::Tcp, "10.200.0.7:81".parse::<std::net::SocketAddr>()?, 2)?,
        "p11",
    )?;
    served(&t, &["p11", "p12"])?;
    let list = sh(cx, n1, "ipset list -t meshlb-vips-4")?;
    ensure!(list.stdout.contains("maxelem 4294967295"), "{list}");
    ensure!(!agent.log_text().contains('\u{1b}'), "colour codes in a file:\n{}", agent.log_text());
    Ok(())
}

/// As in a container that lacks what the renderer needs. What was programmed goes on.
fn no_program(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    let before = n1.snapshot()?;
    let renderer = cx.renderer();
    let names = |flavour: &str| -> Vec<String> {
        let what = ["", "-save", "-restore"];
        ["iptables", "ip6tables"].iter().flat_map(|p| what.map(|w| format!("{p}-{flavour}{w}"))).collect()
    };
    let (nft, legacy) = (names("nft"), names("legacy"));
    let (have, package): (Vec<&str>, &[&str]) = match renderer {
        Renderer::IptablesNft => (
            legacy.iter().map(String::as_str).chain(["nft", "ipset"]).collect(),
            &["iptables-nft-restore is not installed", "apt install iptables"],
        ),
        Renderer::IptablesLegacy => (
            nft.iter().map(String::as_str).chain(["nft", "ipset"]).collect(),
            &["iptables-legacy-restore is not installed", "apt install iptables"],
        ),
        Renderer::Nftables => (
            nft.iter().map(String::as_str).chain(["ipset"]).collect(),
            &["nft is not installed", "apt install nftables"],
        ),
    };
    let lacking = container(cx, "lacking", &have)?;
    let dir = m.dir.to_string_lossy().into_owned();
    for command in [&["apply", &dir][..], &["agent", "--source", &dir]] {
        let out = lacking.run(n1, command)?;
        cx.note(&out);
        one_line(&out, package).with_context(|| format!("{command:?}"))?;
    }
    check::same(&before, &n1.snapshot()?, "something was changed")?;
    served(&t, &["p11", "p12"])?;
    // With the renderer's own programs and no others (no ipset, no other flavour) it works.
    let own: Vec<&str> = match renderer {
        Renderer::IptablesNft => nft.iter().map(String::as_str).chain(["nft"]).collect(),
        Renderer::IptablesLegacy => legacy.iter().map(String::as_str).chain(["nft"]).collect(),
        Renderer::Nftables => vec!["nft"],
    };
    let enough = container(cx, "enough", &own)?;
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    enough.apply(n1, &m)?;
    served(&t, &["p11"])?;
    cx.cleanup(&t)?;
    enough.apply(n1, &m)?;
    cx.will_clean(n1);
    served(&t, &["p11"]).context("from nothing")?;
    if renderer != Renderer::Nftables {
        cx.cleanup(&t)?;
        let flavour = if renderer == Renderer::IptablesNft { nft } else { legacy };
        without_nft(cx, &t, &mut m, &flavour)?;
    }
    Ok(())
}

/// As on a kernel without ip6tables' nat: IPv4 is served all the same, and the reason is told.
fn one_family(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    let flavour = if cx.renderer() == Renderer::IptablesNft { "nft" } else { "legacy" };
    let names =
        ["iptables", "ip6tables"].map(|p| ["", "-save", "-restore"].map(|w| format!("{p}-{flavour}{w}")));
    let names: Vec<&str> = names.iter().flatten().map(String::as_str).chain(["nft", "ipset"]).collect();
    let half = container(cx, "half", &names)?;
    let broken = cx.dir.join("half-sbin").join(format!("ip6tables-{flavour}-restore"));
    fs::remove_file(&broken)?;
    fs::write(
        &broken,
        "#!/bin/sh\necho \"ip6tables: can't initialize ip6tables table 'nat'\" >&2; exit 3\n",
    )?;
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    m.write()?;
    cx.will_clean(n1);
    let mut agent = half.agent(n1, &m.dir)?;
    agent.wait_for_log("can't initialize ip6tables table 'nat'", Duration::from_secs(20))?;
    let v4 = |servers: &[&str]| -> Result<()> {
        for (from, dst) in [(t.pod("p11"), vip(Family::V4, 80)?), (&t.ext, n1.at(Family::V4, 30080))] {
            check::even(&from.connect(Proto::Tcp, dst, 2 * servers.len())?, servers)?;
        }
        Ok(())
    };
    wait_until("IPv4 is served", Duration::from_secs(15), || Ok(v4(&["p11", "p12"]).is_ok()))?;
    let routes = sh(cx, n1, "ip -6 route show table local dev lo")?.stdout;
    ensure!(!routes.contains("fd00:200::/112"), "a route that nothing guards: {routes}");
    // The first retries have been: what is published by IPv6 is refused at once all the same.
    std::thread::sleep(Duration::from_secs(3));
    check::refused(&t.ext.connect(Proto::Tcp, n1.at(Family::V6, 30080), 1)?)?;
    m.endpoints("web", &[t.pod("p12")]);
    m.write()?;
    wait_until("IPv4 follows", Duration::from_secs(40), || Ok(v4(&["p12"]).is_ok()))?;
    let (status, body) = http(n1, ADMIN, "/readyz")?;
    ensure!(status == 503 && body.contains("ip6tables"), "/readyz: {status} {body}");
    // It can be written: all is well.
    fs::copy(fs::canonicalize(format!("/usr/sbin/ip6tables-{flavour}-restore"))?, &broken)?;
    wait_until("all is served", Duration::from_secs(45), || Ok(served(&t, &["p12"]).is_ok()))?;
    ensure!(agent.alive(), "the agent has ended:\n{}", agent.log_text());
    Ok(())
}

/// The image that is started later has no nft: what the table of before would still do, nobody could change any more.
fn nft_disappears(cx: &mut Cx) -> Result<()> {
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    cx.will_clean(n1);
    let tables = |n1: &Node| n1.run(&["nft", "list", "tables"])?.ok().map(|out| out.stdout);
    ensure!(tables(n1)?.contains("inet meshlb"), "no table to begin with");
    let flavour = if cx.renderer() == Renderer::IptablesNft { "nft" } else { "legacy" };
    let names =
        ["iptables", "ip6tables"].map(|p| ["", "-save", "-restore"].map(|w| format!("{p}-{flavour}{w}")));
    let names: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
    let bare = container(cx, "no-nft", &names)?;
    // A number that is no longer published, and a socket of the node that has it then.
    m.service("web").ports.iter_mut().for_each(|port| port.publish = None);
    m.write()?;
    let out = bare.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    cx.note(&out);
    ensure!(out.status == 0, "{out}");
    ensure!(!tables(n1)?.contains("meshlb"), "the table stays: {}", tables(n1)?);
    n1.serve_as("HOST", &everywhere(&[30080], false))?;
    for family in Family::ALL {
        check::even(&t.pod("p11").connect(Proto::Tcp, vip(family, 80)?, 4)?, &["p11", "p12"])?;
        check::only(&t.ext.connect(Proto::Tcp, n1.at(family, 30080), 1)?, "HOST")?;
        let local = SocketAddr::new(family.localhost(), 30080);
        check::only(&n1.connect(Proto::Tcp, local, 1)?, "HOST").context("by loopback")?;
    }
    n1.stop_serving("HOST");
    let plan = bare.run(n1, &["plan", &m.dir.to_string_lossy()])?;
    ensure!(plan.status == 0, "not in sync: {plan}");
    bare.cleanup(n1)?;
    ensure!(n1.snapshot()?.ours().is_empty(), "left: {:?}", n1.snapshot()?.ours());
    Ok(())
}

/// iptables alone: it says what it can't do, and does the rest. Not so good, but no socket of the node where no service is.
fn without_nft(cx: &Cx, t: &Topology, m: &mut Manifests, programs: &[String]) -> Result<()> {
    let n1 = t.node(1);
    let programs: Vec<&str> = programs.iter().map(String::as_str).collect();
    let bare = container(cx, "bare", &programs)?;
    m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
    m.write()?;
    cx.will_clean(n1);
    let out = bare.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    cx.note(&out);
    let lines = said(&out);
    let nft_flavour = cx.renderer() == Renderer::IptablesNft;
    let texts =
        ["can reach a socket of this host", "don't answer on 127.0.0.1 and ::1", "a mark bit that another"];
    for text in texts.iter().take(if nft_flavour { 3 } else { 2 }) {
        let told = lines.iter().filter(|l| l.contains("without nft") && l.contains(text)).count();
        ensure!(told == 1, "{text:?} is told {told} times: {out}");
    }
    ensure!(out.status == 0, "apply fails for that: {out}");
    let table = n1.run(&["nft", "list", "tables"])?.ok()?.stdout;
    ensure!(!table.contains("meshlb"), "it had nft after all: {table}");
    served(t, &["p11", "p12"]).context("without nft")?;
    refused(&to_nothing(t)?).context("without nft")?;
    // 127.0.0.1 is left to whoever listens there.
    for family in Family::ALL {
        for proto in [Proto::Tcp, Proto::Udp] {
            let local = SocketAddr::new(family.localhost(), 30080);
            check::refused(&n1.connect(proto, local, 1)?).context("by loopback, without nft")?;
        }
    }
    n1.serve_as("LOOPBACK", &on_loopback(30080))?;
    for family in Family::ALL {
        for proto in [Proto::Tcp, Proto::Udp] {
            let local = SocketAddr::new(family.localhost(), 30080);
            check::only(&n1.connect(proto, local, 1)?, "LOOPBACK").context("by loopback, without nft")?;
        }
    }
    n1.stop_serving("LOOPBACK");
    // What it has programmed it finds again, and takes out by itself.
    let plan = bare.run(n1, &["plan"])?;
    ensure!(plan.status == 0, "not in sync: {plan}");
    m.endpoints("web", &[t.pod("p12")]);
    m.write()?;
    bare.apply(n1, m)?;
    served(t, &["p12"]).context("without nft, after a change")?;
    bare.cleanup(n1)?;
    ensure!(n1.snapshot()?.ours().is_empty(), "left without nft: {:?}", n1.snapshot()?.ours());
    Ok(())
}

/// Another program that holds the lock of iptables.
struct Holder(Child);

impl Holder {
    fn take(node: &Node) -> Result<Holder> {
        let log = node.dir.join("holder.log");
        fs::create_dir_all(&node.dir)?;
        // The process that takes it stays; what it starts has no part in the lock and ends with it.
        let script =
            "exec flock -o /run/xtables.lock setpriv --pdeathsig KILL sh -c 'echo held; exec sleep 100'";
        let child = node.ns.spawn(&["sh", "-c", script], &[], &log)?;
        let holder = Holder(child);
        wait_until("the lock is held", Duration::from_secs(5), || {
            Ok(fs::read_to_string(&log).unwrap_or_default().contains("held"))
        })?;
        fs::remove_file(&log)?;
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lock is held for longer than we wait for it.
fn busy_lock(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.will_clean(n1);
    // Nothing is there yet.
    let holder = Holder::take(n1)?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("xtables lock", Duration::from_secs(15))?;
    let pid = holder.0.id().to_string();
    let log = agent.log_text();
    let lines: Vec<&str> = log.lines().filter(|l| l.contains("ERROR")).collect();
    cx.note(lines.join("\n"));
    ensure!(
        lines.len() == 1
            && lines[0].contains("/run/xtables.lock")
            && lines[0].contains(&format!("process {pid} flock")),
        "not one line with the lock and its holder, {pid}:\n{log}"
    );
    let (status, body) = http(n1, ADMIN, "/readyz")?;
    ensure!(status == 503 && body.contains("xtables lock"), "/readyz: {status} {body}");
    drop(holder);
    let start = Instant::now();
    ready(n1, &mut agent)?;
    cx.note(format!("healed {:?} after the lock was free", start.elapsed()));
    served(&t, &["p11", "p12"])?;
    // With the rules in place nothing that follows needs the lock.
    let holder = Holder::take(n1)?;
    m.endpoints("web", &[t.pod("p11")]);
    m.service("more").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, None);
    m.endpoints("more", &[t.pod("p11")]);
    m.write()?;
    wait_until("the new service is there", Duration::from_secs(4), || {
        let dst: std::net::SocketAddr = "10.200.0.7:81".parse()?;
        Ok(t.pod("p12").connect(Proto::Tcp, dst, 1)?.answered() == 1)
    })?;
    served(&t, &["p11"]).context("while the lock is held")?;
    drop(holder);
    Ok(())
}

/// Sets `kernel.modprobe` back.
struct NoModprobe(String);

impl NoModprobe {
    const PATH: &str = "/proc/sys/kernel/modprobe";

    /// From now on the kernel can't load modules by itself.
    fn now() -> Result<NoModprobe> {
        let before = fs::read_to_string(Self::PATH)?.trim().to_owned();
        fs::write(Self::PATH, "/nonexistent\n")?;
        Ok(NoModprobe(before))
    }
}

impl Drop for NoModprobe {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, format!("{}\n", self.0));
        let _ = ns::run_here(&["modprobe", "-a", "ip_vs", "ip_vs_rr", "xt_ipvs"], &[], "", ns::COMMAND_LIMIT);
    }
}

/// ip_vs is taken out of the kernel, which may not load it again.
fn no_ip_vs(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    cx.will_clean(n1);
    let dir = m.dir.to_string_lossy().into_owned();
    let without = NoModprobe::now()?;
    let modules = fs::read_to_string("/proc/modules")?;
    let line = modules.lines().find(|l| l.starts_with("ip_vs ")).context("ip_vs is not a module here")?;
    let users = line.split(' ').nth(3).unwrap_or("-").trim_matches(['-', ',']).to_owned();
    let mut command = vec!["rmmod"];
    command.extend(users.split(',').filter(|u| !u.is_empty()));
    command.push("ip_vs");
    ns::run_here(&command, &[], "", ns::COMMAND_LIMIT)?.ok().context("taking ip_vs out")?;
    let before = n1.run(&["nft", "-s", "list", "ruleset"])?.ok()?;
    for command in [&["apply", &dir][..], &["agent", "--source", &dir], &["plan", &dir]] {
        let out = meshlb.run(n1, command)?;
        cx.note(&out);
        one_line(&out, &["no IPVS", "modprobe ip_vs", "CONFIG_IP_VS"])
            .with_context(|| format!("{command:?}"))?;
    }
    let after = n1.run(&["nft", "-s", "list", "ruleset"])?.ok()?;
    ensure!(before.stdout == after.stdout, "rules without IPVS:\n{}", after.stdout);
    // No route either: a packet for the address goes where it went before.
    let route = n1.run(&["ip", "route", "show", "table", "local", "10.200.0.0/16"])?;
    ensure!(route.stdout.trim().is_empty(), "{route}");
    drop(without);
    cx.apply_on(n1, &m)?;
    check::even(&t.pod("p12").connect(Proto::Tcp, vip(Family::V4, 80)?, 4)?, &["p11", "p12"])?;
    served(&t, &["p11", "p12"])
}
