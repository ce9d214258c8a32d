//! What meshlb says of itself: `explain` names the hop that is wrong, and commands need no flags that the agent had.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::guard::sh;
use super::support::{one_node, served, web_on_one_node};
use crate::check;
use crate::ns::Output;
use crate::program::Meshlb;
use crate::runner::{Cx, Matrix, Proto, Renderer, Suite};
use crate::topology::Node;

pub fn register(suite: &mut Suite) {
    suite.add_slow(
        "telling::explain_names_the_hop",
        &Matrix::pair(),
        std::time::Duration::from_secs(240),
        hops,
    );
    suite.add("telling::commands_know_the_flags", &Matrix::pair(), flags);
    suite.add("telling::slice_that_is_wrong", &Matrix::pair(), wrong_slice);
    suite.add("telling::getting_started", &Matrix::pair(), getting_started);
}

/// The page for one machine, word for word but for its folder: the node's own server stands for Python's, and the flags of the
/// test bed are given as one would give them by a configuration file.
fn getting_started(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    cx.will_clean(n1);
    let page = include_str!("../../../docs/getting-started.md");
    let (_, rest) = page.split_once("```sh\n").context("no commands")?;
    let (block, _) = rest.split_once("```").context("no end of the commands")?;
    let folder = cx.dir.join("meshlb").to_string_lossy().into_owned();
    let commands = meshlb.command(n1, &["\"$@\""]).join(" ");
    let script = format!(
        "set -e
         # plan ends with 2 where there are changes.
         sudo() {{ local rc=0; \"$@\" || rc=$?; [ \"$2 $rc\" != \"plan 2\" ] || rc=0; return $rc; }}
         python3() {{ :; }}
         hostname() {{ if [ \"$1\" = -I ]; then echo {}; else echo n1; fi; }}
         meshlb() {{ {commands}; }}
         curl() {{ command curl -sS --http0.9 --max-time 2 \"$1\" || true; }}
         {}",
        n1.v4,
        block.replace("/etc/meshlb", &folder)
    );
    std::fs::create_dir_all(&n1.dir)?;
    let out = n1.ns.run_env(&["bash", "-c", &script], &[("PATH", &meshlb.path)], "")?.ok()?;
    cx.note(&out);
    // By the virtual address and by the published port.
    let answers = out.stdout.lines().filter(|line| line.starts_with("HOST-n1 peer=")).count();
    ensure!(answers == 2, "{out}");
    check::nothing_left(&t)
}

fn hops(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    // What nobody wants goes at once: no agent is there to end a drain.
    m.services[0].set("drain", json!({"timeoutSeconds": 0}));
    cx.apply(&t, &mut m)?;
    let explain = || meshlb.run(n1, &["explain", "web"]);
    let fine = explain()?.ok()?.stdout;
    ensure!(!fine.contains("  ! "), "a service as it should be: {fine}");
    let show: Value = serde_json::from_str(&meshlb.run(n1, &["show", "-o", "json"])?.ok()?.stdout)?;
    let mark = show["services"][0]["ports"][0]["virtualServers"][0]["mark"].as_u64().context("no mark")?;
    let nft = cx.renderer() == Renderer::Nftables;
    let by = |nftables: &str, iptables: &str| if nft { nftables.to_owned() } else { iptables.to_owned() };
    // Two at a time that have nothing to do with each other.
    let breakages = [
        ("ip route del local 10.200.0.0/16 dev lo table local".to_owned(), "route: local 10.200.0.0/16"),
        (format!("ipvsadm -D -f {mark}"), "IPv4 scheduler rr, 0 connections: missing"),
        (format!("ipvsadm -d -f {mark} -r 10.244.1.11:8080"), "10.244.1.11:8080 p11 on n1, weight 1, "),
        ("ipvsadm --set 100 101 102".to_owned(), "ipvs timeouts: 100,101,102, should be 10800,120,300"),
        (format!("ipvsadm -e -f {mark} -r 10.244.1.11:8080 -m -w 3"), ": wrong weight 3"),
        (
            by(
                "nft delete element inet meshlb vips-4 '{ 10.200.0.5 . tcp . 80 }'",
                "ipset del meshlb-vips-4 10.200.0.5,tcp:80",
            ),
            "10.200.0.5,tcp:80 -> mark",
        ),
        (format!("ipvsadm -a -f {mark} -r 10.244.9.9:8080 -m"), ": unexpected"),
        (by("nft flush chain inet meshlb in", "iptables -t mangle -F MESHLB-INPUT"), "  ! rules: "),
        (format!("ipvsadm -E -f {mark} -s lc"), ": scheduler lc, should be rr"),
        (
            "echo 0 > /proc/sys/net/ipv4/vs/expire_nodest_conn".to_owned(),
            "sysctl: net.ipv4.vs.expire_nodest_conn is 0, should be 1",
        ),
        ("nft flush chain inet meshlb guard".to_owned(), "  ! rules: "),
        ("ipvsadm -D -f 16383".to_owned(), "ipvs: the sentinel FWM 16383 IPv4 is missing"),
        (
            format!("ipvsadm -e -f {mark} -r 10.244.1.11:8080 -m -w 1 -x 2 -y 1"),
            ": wrong forwarding method or connection limits",
        ),
    ];
    for two in breakages.chunks(2) {
        let (commands, texts): (Vec<&str>, Vec<&str>) = two.iter().map(|(c, t)| (c.as_str(), *t)).unzip();
        let command = commands.join("\n");
        sh(cx, n1, &command)?;
        let out = explain()?;
        for text in texts {
            ensure!(out.status == 1 && out.stdout.contains(text), "after `{command}`, no {text:?}: {out}");
        }
        let wrong = ["missing", "wrong", "should be", "unexpected", "rules: "];
        let told: Vec<&str> = out
            .stdout
            .lines()
            .filter(|l| wrong.iter().any(|w| l.contains(w)) && !l.contains("as they should be"))
            .collect();
        // A service takes its destinations along, and a mark that leads nowhere is still a mark.
        let many = |c: &str| c.starts_with("ipvsadm -D") || c.contains("flush") || c.contains("-F");
        let few: usize = commands.iter().map(|c| if many(c) { 12 } else { 2 }).sum();
        ensure!((1..=few).contains(&told.len()), "after `{command}`: {told:#?}");
        cx.apply_on(n1, &m)?;
    }
    // What is still wrong of any of them stands here.
    let again = explain()?;
    ensure!(again.status == 0, "not healed: {again}");
    served(&t, &["p11", "p12"])
}

/// As an operator types it: with nothing but where the state is.
fn bare(meshlb: &Meshlb, node: &Node, args: &[&str]) -> Result<Output> {
    let binary = meshlb.binary.to_string_lossy().into_owned();
    let state = format!("--state-dir={}", node.state_dir().display());
    let run = format!("--run-dir={}", node.run_dir().display());
    let mut command: Vec<&str> = vec![&binary];
    command.extend(args);
    command.extend([state.as_str(), run.as_str()]);
    node.ns.run_env(&command, &[("PATH", &meshlb.path)], "")
}

fn flags(cx: &mut Cx) -> Result<()> {
    let meshlb = cx
        .meshlb()?
        .clone()
        .flag("--vip-cidr=10.201.0.0/16,fd00:201::/112")
        .flag("--mark-mask=0xffc000")
        .flag("--ipvs-timeouts=100,101,102")
        .flag("--node-ip=192.168.50.77,fd00:50::1")
        .flag("--publish-addresses=192.168.50.0/24,fd00:50::/64")
        .flag("--publish-range=31000-31100")
        .flag("--publish-reserved=9999")
        .flag("--zone=mesh.test");
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    n1.ip_batch("addr add 192.168.50.77/24 dev eth0\n")?;
    let timeouts = || -> Result<String> { Ok(n1.ns.run(&["ipvsadm", "-L", "--timeout"])?.ok()?.stdout) };
    let before = timeouts()?;
    let mut m = cx.manifests()?;
    let service = m.service("web").vips(&["10.201.0.5", "fd00:201::5"])?;
    // A number that is reserved by default.
    service.port(Proto::Tcp, 80, 8080, Some(30080)).port(Proto::Tcp, 81, 8080, Some(179));
    m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
    m.write()?;
    cx.will_clean(n1);
    meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?.ok()?;
    ensure!(timeouts()?.contains("100 101 102"), "{}", timeouts()?);
    let to = std::net::SocketAddr::from(([10, 201, 0, 5], 80));
    check::even(&t.pod("p12").connect(Proto::Tcp, to, 4)?, &["p11", "p12"])?;
    for args in [&["show"][..], &["explain", "web"], &["plan"]] {
        let out = bare(&meshlb, n1, args)?;
        ensure!(out.status == 0 && !out.stdout.contains("! "), "{args:?}: {out}");
        ensure!(
            args != ["explain", "web"] || out.stdout.contains("web.default.mesh.test"),
            "{args:?}: {out}"
        );
    }
    // A file of another version, or a damaged one, is the agent's business alone.
    let state = n1.state_dir().join("state.json");
    let text = std::fs::read_to_string(&state)?;
    std::fs::write(&state, "{\"version\": 2}")?;
    let out = bare(&meshlb, n1, &["show", "--vip-cidr=10.201.0.0/16,fd00:201::/112", "--node=n1"])?;
    ensure!(out.stderr.contains("is of version 2") || out.stderr.contains("no folder"), "{out}");
    ensure!(std::fs::read_to_string(&state)? == "{\"version\": 2}", "show has moved the state away");
    std::fs::write(&state, text)?;
    let out = bare(&meshlb, n1, &["cleanup"])?.ok()?;
    ensure!(out.stdout.contains("nothing of meshlb is left"), "{out}");
    let left = n1.ns.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
    ensure!(left.trim().is_empty(), "IPVS services are left:\n{left}");
    ensure!(timeouts()? == before, "the timeouts are not as before: {} {before}", timeouts()?);
    n1.ip_batch("addr del 192.168.50.77/24 dev eth0\n")?;
    check::nothing_left(&t)
}

/// The service can be read and its endpoints can't: they stay.
fn wrong_slice(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    let before = n1.snapshot()?;
    let file = m.dir.join("web-v4-slice.yaml");
    let good = std::fs::read_to_string(&file)?;
    std::fs::write(&file, good.replace("\"IPv4\"", "\"IPv9\""))?;
    let dir = m.dir.to_string_lossy().into_owned();
    let out = meshlb.run(n1, &["apply", &dir])?;
    ensure!(out.status == 1 && out.stderr.contains("web-v4-slice.yaml:"), "{out}");
    check::same(&before, &n1.snapshot()?, "apply with a slice that is wrong")?;
    served(&t, &["p11", "p12"])?;
    let plan = meshlb.run(n1, &["plan"])?;
    ensure!(plan.status == 1 && plan.stdout.contains("0 changes"), "plan: {plan}");
    let show = meshlb.run(n1, &["show", "-o", "wide"])?.ok()?.stdout;
    ensure!(
        show.contains("kept") && show.contains("! ") && show.contains("web-v4-slice.yaml"),
        "show: {show}"
    );
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log(
        "does not name them and can't be read completely",
        std::time::Duration::from_secs(20),
    )?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    check::same(&before, &n1.snapshot()?, "an agent with a slice that is wrong")?;
    served(&t, &["p11", "p12"])?;
    // Mended, with one endpoint less: it goes.
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    super::support::wait_until("the mended slice is followed", std::time::Duration::from_secs(10), || {
        Ok(served(&t, &["p11"]).is_ok())
    })?;
    Ok(())
}
