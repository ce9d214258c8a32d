//! Many services and long port ranges: the number of rules does not grow with them, and a range of addresses or of
//! published ports that is too small is told of by name.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use meshlb::dataplane::Ipvs as _;
use meshlb::dataplane::ipvs::KernelIpvs;
use serde_json::{Value, json};

use super::guard::{refused, sh};
use super::healing::{drifts, within};
use super::support::{metric, one_node, served, start, vip, wait_until, web_on_one_node};
use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::manifests::Manifests;
use crate::program::Meshlb;
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Host, Node, Topology};

/// How many services are added at once.
const MANY: usize = 500;

pub fn register(suite: &mut Suite) {
    let (brief, slow) = (Duration::from_secs(90), Duration::from_secs(240));
    let all = Matrix::pair();
    suite.add("many::rules_do_not_grow", &all, rules_do_not_grow);
    suite.add_slow("many::port_range", &all, brief, port_range);
    suite.add_slow("many::ranges_exhausted", &all, brief, exhausted);
    suite.add_heavy("many::added_under_load", &all, slow, added_under_load);
    suite.add_slow("many::healed", &Matrix::once(), slow, healed);
}

/// `meshlb show -o json`.
fn show(meshlb: &Meshlb, node: &Node) -> Result<Vec<Value>> {
    let out = meshlb.run(node, &["show", "-o", "json"])?.ok()?.stdout;
    let report: Value = serde_json::from_str(&out).with_context(|| format!("show says:\n{out}"))?;
    Ok(report["services"].as_array().cloned().unwrap_or_default())
}

/// A service's address of a family, as `show` has it.
fn address(service: &Value, family: Family) -> Option<IpAddr> {
    let vips = service["vips"].as_array()?.iter().filter_map(|v| v.as_str()?.parse::<IpAddr>().ok());
    vips.into_iter().find(|ip| Family::of(*ip) == family)
}

fn name(service: &Value) -> &str {
    service["name"].as_str().unwrap_or_default()
}

fn published(service: &Value) -> Option<u16> {
    service["ports"][0]["publishedPort"].as_u64().and_then(|p| u16::try_from(p).ok())
}

/// The rules in the kernel, with chains and sets but without what is in the sets; and the IPVS services.
fn sizes(cx: &Cx, node: &Node) -> Result<(usize, usize)> {
    let rules = sh(cx, node, "nft -t list ruleset; iptables-save; ip6tables-save")?.stdout;
    let rules = rules.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')).count();
    let servers = node.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
    Ok((rules, servers.lines().filter(|l| l.starts_with("-A ")).count()))
}

/// So many services in one file: that is one change. Each has both pods as endpoints and is published.
fn write_many(t: &Topology, m: &Manifests, n: usize) -> Result<()> {
    let mut text = String::new();
    for i in 0..n {
        let service = json!({
            "apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService",
            "metadata": {"name": format!("s{i}"), "namespace": "default"},
            "spec": {"ports": [{"port": 80, "targetPort": 8080, "publish": {}}]},
        });
        let endpoints: Vec<Value> =
            t.pods.iter().map(|p| json!({"addresses": [p.v4], "nodeName": "n1"})).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("s{i}-v4"), "namespace": "default",
                         "labels": {"kubernetes.io/service-name": format!("s{i}")}},
            "endpoints": endpoints, "ports": [{"port": 8080}],
        });
        let _ = write!(text, "---\n{service}\n---\n{slice}\n");
    }
    let draft = m.dir.join(".many");
    fs::write(&draft, text)?;
    fs::rename(&draft, m.dir.join("many.yaml"))?;
    Ok(())
}

/// S7, S8: one service or 200, the rules are the same.
fn rules_do_not_grow(cx: &mut Cx) -> Result<()> {
    cx.meshlb()?;
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    write_many(&t, &m, 1)?;
    cx.apply(&t, &mut m)?;
    let (rules, servers) = sizes(cx, n1)?;
    ensure!(rules > 20, "only {rules} rules");
    write_many(&t, &m, 200)?;
    cx.apply(&t, &mut m)?;
    let (rules_200, servers_200) = sizes(cx, n1)?;
    cx.note(format!("{rules} rules and {servers} IPVS services, then {rules_200} and {servers_200}"));
    ensure!(servers_200 == servers + 199, "{servers} IPVS services, then {servers_200}");
    ensure!(rules == rules_200, "{rules} rules with one service, {rules_200} with 200");
    Ok(())
}

/// 500 services come and go in one change each, and nobody who uses another one notices.
fn added_under_load(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    served(&t, &["p11", "p12"])?;
    let before = n1.snapshot()?;
    let load = |host: &Host, proto, dst: SocketAddr| {
        let probe = Probe::new(proto, dst).within(Duration::from_secs(4));
        Load::start(&host.ns, &Probe { pause: Duration::from_millis(50), ..probe }, 1)
    };
    let loads = [
        ("TCP by VIP", load(t.pod("p12"), Proto::Tcp, vip(Family::V4, 80)?)),
        ("UDP by VIP", load(t.pod("p12"), Proto::Udp, vip(Family::V6, 80)?)),
        ("TCP published", load(&t.ext, Proto::Tcp, n1.at(Family::V4, 30080))),
    ];
    let flow = |host: &Host, dst| {
        Flows::start(&host.ns, &Probe::new(Proto::Tcp, dst), 2, Duration::from_millis(100))
    };
    let flows = [flow(t.pod("p12"), vip(Family::V4, 80)?)?, flow(&t.ext, n1.at(Family::V6, 30080))?];
    // By what the agent says: to list a thousand destinations again and again takes the emulated machine's time.
    let done = |n: usize| move || Ok(metric(n1, "meshlb_services")? as usize == n);
    let begun = Instant::now();
    write_many(&t, &m, MANY)?;
    wait_until("the agent has added all", Duration::from_secs(90), done(MANY + 1))?;
    cx.note(format!("{MANY} services added in {:?}", begun.elapsed()));
    let services = show(&meshlb, n1)?;
    ensure!(services.len() == MANY + 1, "show has {} services", services.len());
    for service in services.iter().filter(|s| name(s).starts_with('s')).step_by(50) {
        let dst = SocketAddr::new(address(service, Family::V4).context("no address")?, 80);
        check::even(&t.pod("p12").connect(Proto::Tcp, dst, 2)?, &["p11", "p12"])
            .with_context(|| service["name"].to_string())?;
        let port = published(service).context("no published port")?;
        check::even(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, port), 2)?, &["p11", "p12"])?;
    }
    let begun = Instant::now();
    fs::remove_file(m.dir.join("many.yaml"))?;
    wait_until("the agent has removed all", Duration::from_secs(90), done(1))?;
    cx.note(format!("removed in {:?}", begun.elapsed()));
    wait_until("all is as before", Duration::from_secs(20), || Ok(before.diff(&n1.snapshot()?).is_empty()))?;
    for (what, load) in loads {
        let report = load.stop()?;
        cx.note(format!("{what}: {} connections, slowest {:?}", report.answered(), report.slowest));
        ensure!(report.errors.is_empty() && report.answered() > 50, "{what}: {report:?}");
    }
    for flow in flows.into_iter().map(Flows::stop).collect::<Result<Vec<_>>>()?.concat() {
        ensure!(flow.errors.is_empty() && flow.exchanges > 10, "an open connection: {flow:?}");
    }
    ensure!(agent.alive(), "{}", agent.log_text());
    served(&t, &["p11", "p12"])
}

/// Among a thousand IPVS services one is not found in time by looking at each in turn: it is by the kernel's list of all.
/// Where another network namespace has some, that list leaves out as many of ours, which is no drift.
fn healed(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    write_many(&t, &m, MANY)?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    let table = || -> Result<Vec<String>> {
        let mut lines: Vec<String> =
            n1.run(&["ipvsadm", "-Sn"])?.ok()?.stdout.lines().map(String::from).collect();
        lines.sort();
        Ok(lines)
    };
    let before = table()?;
    // By this the agent notices at once that one is gone.
    let counted = || n1.ns.enter(|| Ok(KernelIpvs::open()?.count()));
    let of_v4 = before.iter().filter(|line| line.starts_with("-A ") && !line.contains(" -6")).count();
    let of_v4 = u32::try_from(of_v4)?;
    ensure!(
        of_v4 > 100 && counted()? == Some(of_v4),
        "{:?} services are counted, and {of_v4} listed",
        counted()?
    );
    for (more, want) in
        [("-A -f 4 -6 -s rr", of_v4), ("-A -f 4 -s rr", of_v4 + 1), ("-D -f 4", of_v4), ("-D -f 4 -6", of_v4)]
    {
        sh(cx, n1, &format!("ipvsadm {more}"))?;
        ensure!(
            counted()? == Some(want),
            "after ipvsadm {more} the kernel counts {:?}, not {want}",
            counted()?
        );
    }
    let destinations: Vec<&String> =
        before.iter().filter(|line| line.starts_with("-a ") && line.contains(" 10.244")).collect();
    ensure!(destinations.len() > MANY, "{} destinations", destinations.len());
    let again = |what: &str, at: usize, edit: &str, limit: Duration| -> Result<()> {
        let line = destinations[destinations.len() * at / 8];
        let (counted, begun) = (drifts(n1)?, Instant::now());
        let script = format!("echo '{line}' | awk '{{ {edit} }}' | xargs ipvsadm");
        sh(cx, n1, &script).context(what.to_owned())?;
        wait_until(&format!("{what} is seen"), limit, || Ok(drifts(n1)? > counted))?;
        let seen = begun.elapsed();
        wait_until(&format!("{what} is healed"), limit, || Ok(table()? == before))?;
        cx.note(format!("{what}: seen after {seen:?}, healed after {:?}", begun.elapsed()));
        Ok(())
    };
    again("a destination that was deleted", 3, "print \"-d\", $2, $3, $4, $5", within())?;
    again("a service that was deleted", 5, "print \"-D\", $2, $3", within())?;
    again("a destination with another weight", 2, "print \"-e\", $2, $3, $4, $5, \"-m -w 7\"", within())?;
    again("a service with another scheduler", 6, "print \"-E\", $2, $3, \"-s wlc\"", within())?;
    let theirs: String =
        (1..=200).map(|n| format!("-A -f {n} -s rr\n-a -f {n} -r 192.0.2.1:80 -m\n")).collect();
    t.pod("p12").ns.run_with(&["ipvsadm", "-R"], &theirs, Duration::from_secs(30))?.ok()?;
    let listed = n1.run(&["cat", "/proc/net/ip_vs"])?.ok()?.stdout.matches("FWM ").count();
    let ours = before.iter().filter(|line| line.starts_with("-A ")).count();
    cx.note(format!("with services in another namespace the list has {listed} of {ours}"));
    ensure!(listed < ours, "the list is complete: then this shows nothing");
    let counted = drifts(n1)?;
    std::thread::sleep(within());
    ensure!(drifts(n1)? == counted, "what a list leaves out is taken for drift:\n{}", agent.log_text());
    again(
        "a service that was deleted, with others' in another namespace",
        4,
        "print \"-D\", $2, $3",
        2 * within(),
    )?;
    t.pod("p12").run(&["ipvsadm", "-C"])?.ok()?;
    ensure!(agent.alive(), "{}", agent.log_text());
    served(&t, &["p11", "p12"])
}

/// A service more than a range has room for is told of, by name; it gets what another one leaves.
fn exhausted(cx: &mut Cx) -> Result<()> {
    let meshlb = cx
        .meshlb()?
        .clone()
        .flag("--vip-cidr=10.200.0.0/29,fd00:200::/125")
        .flag("--publish-range=30000-30003");
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    let names: Vec<String> = (0..8).map(|i| format!("s{i}")).collect();
    for name in &names {
        m.service(name).port(Proto::Tcp, 80, 8080, Some(0));
        m.endpoints(name, &[t.pod("p11")]);
    }
    m.write()?;
    cx.will_clean(n1);
    let out = meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?;
    cx.note(&out);
    ensure!(out.status == 1, "apply: not status 1: {out}");
    let services = show(&meshlb, n1)?;
    ensure!(services.len() == names.len(), "show has {} services", services.len());
    // Ingress and DNS addresses are taken, the network's own is not used, and of IPv4 not the last one.
    let room = [("IPv4", 4), ("IPv6", 5), ("port", 4)];
    for (what, n) in room {
        let mut have = 0;
        for service in &services {
            let (got, text) = match what {
                "port" => (published(service).is_some(), "no published port is free for".to_owned()),
                "IPv4" => (address(service, Family::V4).is_some(), format!("no {what} virtual IP is free")),
                _ => (address(service, Family::V6).is_some(), format!("no {what} virtual IP is free")),
            };
            have += usize::from(got);
            let in_show = service["problems"].to_string().contains(&text);
            let line = format!("default/{}: {text}", name(service));
            ensure!(got != in_show, "{line} in show? {service:#}");
            ensure!(got != out.stderr.contains(&line), "{line} in apply's output? {out}");
        }
        ensure!(have == n, "{have} services have got an {what}, not {n}: {services:#?}");
    }
    let works = |service: &Value| -> Result<()> {
        for family in Family::ALL {
            if let Some(ip) = address(service, family) {
                check::only(&t.pod("p12").connect(Proto::Tcp, SocketAddr::new(ip, 80), 2)?, "p11")?;
            }
        }
        if let Some(port) = published(service) {
            check::only(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, port), 2)?, "p11")?;
        }
        Ok(())
    };
    for service in &services {
        works(service).with_context(|| name(service).to_owned())?;
    }
    // One that has all of it goes.
    let agent = start(cx, &meshlb, &t, &m)?;
    let whole = |s: &&Value| Family::ALL.iter().all(|f| address(s, *f).is_some()) && published(s).is_some();
    let gone = services.iter().find(whole).context("none has everything")?;
    let freed: BTreeSet<IpAddr> = Family::ALL.iter().filter_map(|f| address(gone, *f)).collect();
    let port = published(gone).context("no published port")?;
    m.remove(name(gone));
    m.write()?;
    let mut now = Vec::new();
    let took = wait_until("others have what it had", Duration::from_secs(10), || {
        now = show(&meshlb, n1)?;
        let held: BTreeSet<IpAddr> =
            now.iter().flat_map(|s| Family::ALL.map(|f| address(s, f))).flatten().collect();
        Ok(held.is_superset(&freed) && now.iter().any(|s| published(s) == Some(port)))
    })?;
    cx.note(format!("its addresses and port had other owners after {took:?}"));
    ensure!(now.len() == names.len() - 1 && !now.iter().any(|s| name(s) == name(gone)), "{now:#?}");
    std::thread::sleep(Duration::from_millis(500));
    for service in &now {
        works(service).with_context(|| format!("{}, after {} was deleted", service["name"], gone["name"]))?;
    }
    agent.kill();
    meshlb.run(n1, &["cleanup"])?.ok().map(|_| ())
}

/// `endPort`: the first, one in the middle and the last; not the one before nor the one after. The length costs nothing.
fn port_range(cx: &mut Cx) -> Result<()> {
    cx.meshlb()?;
    let ports = [2999, 3000, 3004, 3009, 3010, 3500, 3999, 4000];
    let t = cx.topology(&one_node().ports(&ports).host_ports(&ports))?;
    let n1 = t.node(1);
    n1.stop_serving("HOST-n1");
    let mut m = cx.manifests()?;
    let mut before = None;
    for (last, middle) in [(3009, 3004), (3999, 3500)] {
        let service = m.service("range");
        service.ports.clear();
        service.vips.clear();
        for proto in [Proto::Tcp, Proto::Udp] {
            service.vips = vec![vip(Family::V4, 0)?.ip(), vip(Family::V6, 0)?.ip()];
            service.port(proto, 3000, 3000, Some(3000));
        }
        for port in &mut service.ports {
            port.more.extend([("endPort".to_owned(), json!(last)), ("targetPort".to_owned(), Value::Null)]);
        }
        m.endpoints("range", &[t.pod("p11")]);
        cx.apply(&t, &mut m)?;
        // Sockets of the node on all of it, and beside.
        n1.serve_as("HOST-late", &crate::server::everywhere(&ports, false))?;
        let mut outside = Vec::new();
        for family in Family::ALL {
            for proto in [Proto::Tcp, Proto::Udp] {
                for port in [3000, middle, last] {
                    for (from, dst) in [
                        (t.pod("p12"), vip(family, port)?),
                        (n1, vip(family, port)?),
                        (&t.ext, n1.at(family, port)),
                        (n1, SocketAddr::new(family.localhost(), port)),
                    ] {
                        let tally = from.connect(proto, dst, 1)?;
                        check::only(&tally, "p11")?;
                        let at = tally.answers[0].local.port();
                        ensure!(at == port, "{dst} came to port {at}");
                    }
                }
                for port in [2999, last + 1] {
                    outside.push((t.pod("p12"), Probe::new(proto, vip(family, port)?)));
                    outside.push((&**n1, Probe::new(proto, vip(family, port)?)));
                    // What is published ends there too: this one is the node's own.
                    check::only(&t.ext.connect(proto, n1.at(family, port), 1)?, "HOST-late")?;
                }
            }
        }
        refused(&outside)?;
        n1.stop_serving("HOST-late");
        let now = sizes(cx, n1)?;
        cx.note(format!("3000-{last}: {} rules, {} IPVS services", now.0, now.1));
        let was = *before.get_or_insert(now);
        ensure!(was == now, "rules and IPVS services: {was:?} for 10 ports, {now:?} for {}", last - 2999);
    }
    cx.taint();
    Ok(())
}
