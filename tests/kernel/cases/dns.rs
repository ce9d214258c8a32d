//! Names, asked for by dig and by glibc's getaddrinfo in pods.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use serde_json::json;

use super::lookups::resolvers;
use super::support::{ADMIN, http, metric, one_node, ready, start, wait_until, web_on_one_node};
use crate::check;
use crate::client::Probe;
use crate::machine::patience;
use crate::manifests::{Endpoint, Manifests};
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Host, Topology};

pub(super) const SERVERS: [&str; 2] = ["10.200.0.2", "fd00:200::2"];
pub(super) const ZONE: &str = "default.mesh.internal";

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(400);
    suite.add_slow("dns::answers", &Matrix::pair(), limit, answers);
    suite.add_slow("dns::names_follow_services", &Matrix::once(), limit, follows);
    suite.add_slow("dns::agent_is_away", &Matrix::pair(), limit, away);
    suite.add_slow("dns::forged_senders", &Matrix::once(), limit, forged);
    suite.add_slow("dns::large_answers", &Matrix::once(), limit, large);
    suite.add_slow("dns::forwarding", &Matrix::once(), limit, forwarding);
    suite.add_slow("dns::port_is_taken", &Matrix::once(), limit, taken);
}

pub(super) fn server(family: Family) -> &'static str {
    family.pick(SERVERS[0], SERVERS[1])
}

/// What dig prints.
pub(super) fn dig(from: &Host, server: &str, args: &[&str]) -> Result<String> {
    let at = format!("@{server}");
    let mut command = vec!["dig", "+time=9", "+tries=1", at.as_str()];
    command.extend(args);
    Ok(from.run(&command)?.stdout)
}

/// The answers, in order of their text.
fn short(from: &Host, server: &str, name: &str, kind: &str) -> Result<Vec<String>> {
    let text = dig(from, server, &["+short", name, kind])?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// The response code of an answer, by name.
pub(super) fn status(from: &Host, server: &str, name: &str, kind: &str) -> Result<String> {
    let text = dig(from, server, &[name, kind])?;
    let status = text.lines().find_map(|line| line.split_once("status: ")?.1.split_once(','));
    Ok(status.with_context(|| format!("{} asks {server} for {name} {kind}: {text}", from.name))?.0.to_owned())
}

/// There is no such record, and this is how that is said.
fn has_none(from: &Host, server: &str, name: &str, kind: &str, want: &str) -> Result<()> {
    let (got, found) = (status(from, server, name, kind)?, short(from, server, name, kind)?);
    ensure!(
        got == want && found.is_empty(),
        "{} asks {server} for {name} {kind}: {got} {found:?}, not {want}",
        from.name
    );
    Ok(())
}

/// One answer is this.
pub(super) fn answers_with(from: &Host, server: &str, name: &str, kind: &str, want: &[&str]) -> Result<()> {
    ensure!(!want.is_empty(), "{name} {kind}: an error has no answers either");
    let got = short(from, server, name, kind)?;
    ensure!(got == want, "{} asks {server} for {name} {kind}: {got:?}, not {want:?}", from.name);
    Ok(())
}

/// The pod asks our server for its names from now on, with the search list that Kubernetes would give it.
pub(super) fn use_server(cx: &Cx, host: &Host, servers: &[&str], search: &str, options: &str) -> Result<()> {
    let file = cx.dir.join(format!("{}-resolv.conf", host.name));
    let mut text: String = servers.iter().map(|s| format!("nameserver {s}\n")).collect();
    text += &format!("search {search}\noptions {options}\n");
    fs::write(&file, text)?;
    let file = file.to_string_lossy().into_owned();
    let script = format!(
        "umount /etc/resolv.conf 2>/dev/null; : >>/etc/resolv.conf; mount --bind {file} /etc/resolv.conf"
    );
    host.run(&["sh", "-c", &script])?.ok()?;
    Ok(())
}

fn answers(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    let web = m.service("web").vips(&["10.200.0.5", "fd00:200::5"])?;
    web.port(Proto::Tcp, 80, 8080, None);
    web.set("dns", json!({"ttlSeconds": 17, "aliases": ["www"]}));
    m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
    let rr = m.service("rr");
    rr.set("mode", json!("DNSRR")).port(Proto::Tcp, 80, 8080, None);
    m.endpoints("rr", &[t.pod("p11"), t.pod("p12")]);
    m.service("none").vips(&["10.200.0.9", "fd00:200::9"])?.port(Proto::Tcp, 80, 8080, None);
    m.service("none-rr").set("mode", json!("DNSRR")).port(Proto::Tcp, 80, 8080, None);
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let (p12, n1) = (t.pod("p12"), t.node(1));
    let pods = [("A", ["10.244.1.11", "10.244.1.12"]), ("AAAA", ["fd00:244:1::11", "fd00:244:1::12"])];
    for (from, family) in [(p12, Family::V4), (p12, Family::V6), (&**n1, Family::V4), (&**n1, Family::V6)] {
        let at = server(family);
        answers_with(from, at, &format!("web.{ZONE}"), "A", &["10.200.0.5"])?;
        answers_with(from, at, &format!("www.{ZONE}"), "AAAA", &["fd00:200::5"])?;
        for (kind, want) in pods {
            answers_with(from, at, &format!("tasks.web.{ZONE}"), kind, &want)?;
            answers_with(from, at, &format!("rr.{ZONE}"), kind, &want)?;
            answers_with(from, at, &format!("tasks.rr.{ZONE}"), kind, &want)?;
        }
        answers_with(from, at, &format!("p11.web.{ZONE}"), "A", &["10.244.1.11"])?;
        let srv = format!("0 1 80 web.{ZONE}.");
        answers_with(from, at, &format!("_tcp-80._tcp.web.{ZONE}"), "SRV", &[&srv])?;
        answers_with(from, at, "5.0.200.10.in-addr.arpa", "PTR", &[&format!("web.{ZONE}.")])?;
        for (address, want) in [("fd00:200::5", &["web"][..]), ("fd00:244:1::12", &["p12.rr", "p12.web"])] {
            let mut got: Vec<_> =
                dig(from, at, &["+short", "-x", address])?.lines().map(str::to_owned).collect();
            got.sort();
            let want: Vec<_> = want.iter().map(|name| format!("{name}.{ZONE}.")).collect();
            ensure!(got == want, "{}: {address} is {got:?}, not {want:?}", from.name);
        }
        // Round robin has a place for each endpoint, and says what address it has.
        let name = format!("_tcp-80._tcp.rr.{ZONE}");
        let places = ["p11", "p12"].map(|pod| format!("0 1 8080 {pod}.rr.{ZONE}."));
        answers_with(from, at, &name, "SRV", &places.each_ref().map(String::as_str))?;
        let text = dig(from, at, &["+noall", "+additional", &name, "SRV"])?;
        for (pod, address) in [("p11", "10.244.1.11"), ("p12", "fd00:244:1::12")] {
            let has = |line: &str| line.starts_with(&format!("{pod}.rr.{ZONE}.")) && line.ends_with(address);
            ensure!(text.lines().any(has), "{name} SRV: no {address} of {pod} in\n{text}");
        }
        let ptr = short(from, at, "11.1.244.10.in-addr.arpa", "PTR")?;
        ensure!(ptr == [format!("p11.rr.{ZONE}."), format!("p11.web.{ZONE}.")], "{ptr:?}");
    }
    let at = SERVERS[0];
    // Short names belong to the pod's namespace, and to nobody else.
    answers_with(p12, at, "web", "A", &["10.200.0.5"])?;
    has_none(n1, at, "web", "A", "REFUSED")?;
    // How it is said.
    for (args, texts) in [
        (
            vec!["WeB.default.MESH.internal", "A"],
            vec!["WeB.default.MESH.internal. 17 IN A 10.200.0.5", "flags: qr aa rd;"],
        ),
        (vec!["nothing.default.mesh.internal", "A"], vec!["status: NXDOMAIN", "mesh.internal. 5 IN SOA"]),
        (vec!["web.default.mesh.internal", "MX"], vec!["status: NOERROR", "ANSWER: 0", "IN SOA"]),
        (vec!["none-rr.default.mesh.internal", "A"], vec!["status: NOERROR", "ANSWER: 0", "IN SOA"]),
        (vec!["web.default.mesh.internal", "TYPE65399"], vec!["status: NOERROR", "ANSWER: 0", "IN SOA"]),
        (vec!["web.default.mesh.internal", "ANY"], vec!["status: NOERROR", "HINFO \"RFC8482\""]),
        (vec!["+tcp", "web.default.mesh.internal", "A"], vec!["10.200.0.5"]),
        (vec!["+noedns", "web.default.mesh.internal", "A"], vec!["10.200.0.5"]),
        (vec!["+edns=1", "+noednsneg", "web.default.mesh.internal", "A"], vec!["status: BADVERS"]),
        (vec!["example.com", "A"], vec!["status: REFUSED"]),
        (vec!["version.bind", "CH", "TXT"], vec!["status: REFUSED"]),
        (vec!["mesh.internal", "AXFR"], vec!["Transfer failed"]),
        (vec!["mesh.internal", "SOA"], vec!["mesh.internal. hostmaster.mesh.internal."]),
        (vec!["mesh.internal", "NS"], vec!["IN NS mesh.internal.", "IN A 10.200.0.2"]),
    ] {
        let text = dig(p12, at, &args)?;
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for want in texts {
            ensure!(flat.contains(want), "dig {args:?}: no {want:?} in\n{text}");
        }
    }
    // As programs ask: by the search list.
    use_server(cx, p12, &[at], &format!("{ZONE} mesh.internal"), "ndots:5")?;
    for (name, want) in
        [("web", "10.200.0.5"), ("www.default", "10.200.0.5"), ("web.default.mesh.internal", "10.200.0.5")]
    {
        let got = p12.run(&["getent", "ahostsv4", name])?.ok()?.stdout;
        ensure!(got.starts_with(want), "getent {name}: {got}");
    }
    let got = p12.run(&["getent", "hosts", "10.200.0.5"])?.ok()?.stdout;
    ensure!(got.contains(&format!("web.{ZONE}")), "getent hosts 10.200.0.5: {got}");
    // Other programs' resolvers: static, as in images without glibc.
    for client in resolvers()? {
        for (name, want) in [
            ("web", "10.200.0.5"),
            ("www.default", "10.200.0.5"),
            ("tasks.web", "10.244.1.11\n10.244.1.12"),
            ("rr.default.mesh.internal", "10.244.1.11\n10.244.1.12"),
        ] {
            let got = p12.run(&[&client, name])?.ok()?.stdout;
            ensure!(got.trim() == want, "{client} {name}: {got}");
        }
        let none = p12.run(&[&client, "nothing.default.mesh.internal."])?;
        ensure!(none.status == 1, "{client}: {none}");
    }
    // A service without endpoints has its name, and refuses at once.
    answers_with(p12, at, &format!("none.{ZONE}"), "A", &["10.200.0.9"])?;
    let vip: SocketAddr = "10.200.0.9:80".parse()?;
    let tally = p12.probe(&Probe::new(Proto::Tcp, vip).times(3))?;
    ensure!(
        tally.answered() == 0 && tally.slowest < Duration::from_millis(900),
        "not refused at once: {tally}"
    );
    // The DNS address is open for nothing else, and every other address is as closed as before.
    for dst in ["10.200.0.2:80", "10.200.0.2:22", "10.200.0.5:53", "[fd00:200::2]:8080"] {
        let tally = p12.probe(&Probe::new(Proto::Tcp, dst.parse::<SocketAddr>()?))?;
        ensure!(tally.answered() == 0 && tally.slowest < Duration::from_millis(900), "{dst}: {tally}");
    }
    let explain = meshlb.run(n1, &["explain", "web"])?.ok()?.stdout;
    for want in [format!("web.{ZONE} A 10.200.0.5: ok"), format!("www.{ZONE} AAAA fd00:200::5: ok")] {
        ensure!(explain.contains(&want), "explain: no {want:?} in\n{explain}");
    }
    only_its_own_node(cx, &t)?;
    ensure!(metric(n1, "meshlb_dns_queries_total")? > 50.0);
    ensure!(metric(n1, "meshlb_dns_listening")? == 4.0);
    for (labels, least) in [
        (r#"{type="A",rcode="NOERROR",transport="udp"}"#, 20.0),
        (r#"{type="A",rcode="NOERROR",transport="tcp"}"#, 1.0),
        (r#"{type="A",rcode="NXDOMAIN",transport="udp"}"#, 1.0),
        (r#"{type="A",rcode="REFUSED",transport="udp"}"#, 2.0),
        (r#"{type="A",rcode="BADVERS",transport="udp"}"#, 1.0),
        (r#"{type="SRV",rcode="NOERROR",transport="udp"}"#, 4.0),
        (r#"{type="PTR",rcode="NOERROR",transport="udp"}"#, 8.0),
    ] {
        let n = metric(n1, &format!("meshlb_dns_queries_total{labels}"))?;
        ensure!(n >= least, "{labels}: {n}");
    }
    let took = |what: &str, from: &str| {
        metric(n1, &format!("meshlb_dns_answer_duration_seconds_{what}{{from=\"{from}\"}}"))
    };
    let (sum, n) = (took("sum", "mesh")?, took("count", "mesh")?);
    cx.note(format!("{n} answers of our own took {sum:.6} s together"));
    ensure!(n > 50.0 && sum > 0.0 && sum / n < 0.1, "{n} answers took {sum} s");
    ensure!(took("count", "refused")? >= 3.0);
    Ok(())
}

/// Who has a route to the VIP range by a node reaches its services and not its DNS; its pods, and itself, do.
fn only_its_own_node(cx: &Cx, t: &Topology) -> Result<()> {
    let n1 = t.node(1);
    for (family, range, via) in
        [(Family::V4, "10.200.0.0/16", n1.v4.to_string()), (Family::V6, "fd00:200::/112", n1.v6.to_string())]
    {
        t.ext.run(&["ip", "route", "replace", range, "via", &via])?.ok()?;
        let vip: SocketAddr = family.pick("10.200.0.5:80", "[fd00:200::5]:80").parse()?;
        let tally = t.ext.connect(Proto::Tcp, vip, 2)?;
        ensure!(tally.answered() == 2, "the route leads nowhere: {tally}");
        let (at, name) = (server(family), format!("web.{ZONE}"));
        for how in ["+notcp", "+tcp"] {
            let text = dig(&t.ext, at, &["+time=2", how, &name, "A"])?;
            ensure!(text.contains("timed out"), "ext asks {at} {how}: {text}");
        }
        for from in [t.pod("p11"), t.pod("p12"), &**n1] {
            for how in ["+notcp", "+tcp"] {
                let text = dig(from, at, &[how, "+short", &name, "A"])?;
                ensure!(text.trim() == "10.200.0.5", "{} asks {at} {how}: {text}", from.name);
            }
        }
    }
    cx.note("from outside nothing reaches the DNS address".to_owned());
    Ok(())
}

/// Aliases, modes, readiness: all while the agent runs.
fn follows(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    m.service("web").port(Proto::Tcp, 80, 8080, None);
    m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let p12 = t.pod("p12");
    let name = format!("web.{ZONE}");
    let a = |name: &str| short(p12, SERVERS[0], name, "A");
    let becomes = |m: &mut Manifests, what: &str, name: &str, want: &[&str]| -> Result<Duration> {
        m.write()?;
        let is = || match want {
            [] => Ok(status(p12, SERVERS[0], name, "A")? == "NXDOMAIN"),
            want => Ok(a(name)? == want),
        };
        wait_until(&format!("{what}: {name} is {want:?}"), Duration::from_secs(10), is)
    };
    let vip = a(&name)?;
    ensure!(vip.len() == 1 && vip[0].starts_with("10.200."), "{vip:?}");
    // VIP to round robin: the address is free, and another service may have it.
    m.service("web").set("mode", json!("DNSRR"));
    becomes(&mut m, "DNSRR", &name, &["10.244.1.11", "10.244.1.12"])?;
    let tally = p12.probe(&Probe::new(Proto::Tcp, SocketAddr::new(vip[0].parse()?, 80)))?;
    ensure!(tally.answered() == 0, "the old address is still served: {tally}");
    m.service("taker").vips(&[&vip[0]])?.port(Proto::Tcp, 80, 8080, None);
    becomes(&mut m, "its address is free", &format!("taker.{ZONE}"), &[&vip[0]])?;
    m.remove("taker");
    becomes(&mut m, "gone", &format!("taker.{ZONE}"), &[])?;
    // A failing endpoint leaves the answers, within a TTL at a client, at once here.
    let mut ends = vec![Endpoint::of(t.pod("p11"), Family::V4), Endpoint::of(p12, Family::V4)];
    ends[0] = ends[0].clone().not_ready();
    m.slice("web", Family::V4, ends.clone());
    let took = becomes(&mut m, "not ready", &name, &["10.244.1.12"])?;
    cx.note(format!("an endpoint that is not ready is out of the answers after {took:?}"));
    ensure!(took < patience(Duration::from_secs(2)), "it was answered for {took:?} more");
    m.service("web").set("publishNotReadyAddresses", json!(true));
    becomes(&mut m, "on request", &format!("tasks.web.{ZONE}"), &["10.244.1.11", "10.244.1.12"])?;
    m.service("web").set("publishNotReadyAddresses", json!(false)).set("mode", json!("VIP"));
    m.write()?;
    let back = |now: &[String]| now.len() == 1 && now[0].starts_with("10.200.");
    wait_until("back to a VIP", Duration::from_secs(10), || Ok(back(&a(&name)?)))?;
    answers_with(p12, SERVERS[0], &format!("tasks.web.{ZONE}"), "A", &["10.244.1.12"])?;
    check::only(&p12.connect(Proto::Tcp, SocketAddr::new(a(&name)?[0].parse()?, 80), 2)?, "p12")?;
    // Aliases come and go; one that is another's is told.
    let now = a(&name)?;
    m.service("web").set("dns", json!({"aliases": ["one", "two"]}));
    becomes(&mut m, "alias", &format!("two.{ZONE}"), &[&now[0]])?;
    m.service("web").set("dns", json!({"aliases": ["one"]}));
    becomes(&mut m, "alias gone", &format!("two.{ZONE}"), &[])?;
    let other = m.service("other").vips(&["10.200.0.77"])?;
    other.port(Proto::Tcp, 80, 8080, None).set("dns", json!({"aliases": ["web", "mine"]}));
    becomes(&mut m, "other", &format!("mine.{ZONE}"), &["10.200.0.77"])?;
    ensure!(a(&name)? == now, "a service's own name is its own");
    let show = meshlb.run(t.node(1), &["show", "other"])?.stdout;
    let told = "spec.dns.aliases[0]: web is the name of the service default/web";
    ensure!(show.contains(told), "not told: {show}");
    ensure!(metric(t.node(1), "meshlb_problems{of=\"services\"}")? == 1.0);
    Ok(())
}

/// An agent that serves one service, `web`.
pub(super) fn web_alone(cx: &Cx) -> Result<(Meshlb, Arc<Topology>, Manifests, Agent)> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    m.service("web").vips(&["10.200.0.5", "fd00:200::5"])?.port(Proto::Tcp, 80, 8080, None);
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    let agent = start(cx, &meshlb, &t, &m)?;
    Ok((meshlb, t, m, agent))
}

/// While no agent runs, questions are dropped and not refused.
fn away(cx: &mut Cx) -> Result<()> {
    let (_, t, _m, agent) = web_alone(cx)?;
    let (p12, n1) = (t.pod("p12"), t.node(1));
    let name = format!("web.{ZONE}");
    answers_with(p12, SERVERS[0], &name, "A", &["10.200.0.5"])?;
    agent.kill();
    // Another program of the node that listens on every address does not get them.
    n1.serve_as("HOST-53", &crate::server::everywhere(&[53], false))?;
    for family in Family::ALL {
        for from in [p12, &**n1] {
            let at = server(family);
            let begun = Instant::now();
            let text = dig(from, at, &["+time=2", &name, "A"])?;
            let took = begun.elapsed();
            ensure!(
                text.contains("timed out") && took > Duration::from_millis(1900),
                "{} asks {at}, not silent but after {took:?}: {text}",
                from.name
            );
            let text = dig(from, at, &["+time=2", "+tcp", &name, "A"])?;
            ensure!(text.contains("timed out"), "{} asks {at} by TCP: {text}", from.name);
        }
    }
    n1.stop_serving("HOST-53");
    Ok(())
}

/// Questions by the thousand in the name of a neighbour that is not there: the answers wait for it, and nobody else does.
fn forged(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let (p11, p12) = (t.pod("p11"), t.pod("p12"));
    let dead = "192.168.50.77";
    p11.run(&["ip", "address", "add", &format!("{dead}/32"), "dev", "lo"])?.ok()?;
    let server: SocketAddr = format!("{}:53", SERVERS[0]).parse()?;
    let name = format!("web.{ZONE}.");
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(&name)?, RecordType::A));
    let bytes = question.to_vec()?;
    let stop = AtomicBool::new(false);
    let (sent, slowest) = std::thread::scope(|scope| -> Result<(usize, Duration)> {
        let flood = scope.spawn(|| {
            p11.ns.enter(|| {
                let socket = std::net::UdpSocket::bind((dead, 0))?;
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    sent += usize::from(socket.send_to(&bytes, server).is_ok());
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(sent)
            })
        });
        std::thread::sleep(Duration::from_millis(500));
        let asked = p12.ns.enter(|| {
            let mut slowest = Duration::ZERO;
            for i in 0..60 {
                let begun = Instant::now();
                let found = meshlb::dns::ask::addresses(server, &name, RecordType::A);
                ensure!(found.as_ref().is_ok_and(|ips| ips.len() == 1), "question {i}: {found:?}");
                slowest = slowest.max(begun.elapsed());
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(slowest)
        });
        stop.store(true, Ordering::Relaxed);
        let Ok(sent) = flood.join() else { bail!("the flood panicked") };
        Ok((sent?, asked?))
    })?;
    cx.note(format!("{sent} forged questions; the slowest of 60 others took {slowest:?}"));
    ensure!(sent > 500, "only {sent} forged questions");
    // One that was lost would have been asked again after seconds.
    ensure!(slowest < Duration::from_millis(1500), "the slowest took {slowest:?}");
    Ok(())
}

/// 300 endpoints: cut over UDP, whole over TCP.
fn large(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    m.service("many").set("mode", json!("DNSRR")).port(Proto::Tcp, 80, 8080, None);
    let template = Endpoint::of(t.pod("p11"), Family::V4);
    let all: Vec<Endpoint> = (0..300_u16)
        .map(|i| Endpoint {
            addr: IpAddr::from([10, 250, (i / 200) as u8, (i % 200) as u8 + 1]),
            target: format!("m{i}"),
            ..template.clone()
        })
        .collect();
    m.slice("many", Family::V4, all);
    m.write()?;
    let _agent = start(cx, &meshlb, &t, &m)?;
    let (p12, name) = (t.pod("p12"), format!("many.{ZONE}"));
    for (args, at_least, at_most) in [
        (vec!["+ignore", "+noedns"], 25, 30),
        (vec!["+ignore", "+bufsize=4096"], 65, 75),
        (vec!["+ignore", "+bufsize=600"], 30, 36),
        (vec!["+noedns"], 300, 300),
        (vec![], 300, 300),
        (vec!["+tcp"], 300, 300),
    ] {
        let mut all = args.clone();
        all.extend([name.as_str(), "A"]);
        let text = dig(p12, SERVERS[0], &all)?;
        let n = text.lines().filter(|l| l.contains("\tA\t")).count();
        ensure!((at_least..=at_most).contains(&n), "dig {args:?}: {n} addresses in\n{text}");
        let cut = text.lines().any(|l| l.contains("flags:") && l.contains(" tc"));
        ensure!(cut == (at_most < 300), "dig {args:?}: {text}");
    }
    use_server(cx, p12, &SERVERS[..1], ZONE, "timeout:5")?;
    let got = p12.ns.enter(|| {
        let found = (name.as_str(), 80_u16).to_socket_addrs()?;
        Ok(found.map(|a| a.ip()).collect::<BTreeSet<_>>().len())
    })?;
    ensure!(got == 300, "getaddrinfo found {got}");
    Ok(())
}

/// Names of others: two meshes ask each other, as upstreams that come and go.
fn forwarding(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder().nodes(3))?;
    // Nodes 2 and 3 answer `corp.example`, a mesh of its own, at their own addresses.
    let mut m = cx.manifests()?;
    m.service("web").vips(&["10.200.0.5", "fd00:200::5"])?.port(Proto::Tcp, 80, 8080, None);
    m.service("big").set("mode", json!("DNSRR")).port(Proto::Tcp, 80, 8080, None);
    let template = Endpoint::of(t.pod("p11"), Family::V4);
    let all = (1..=200_u8).map(|i| Endpoint { addr: [10, 250, 0, i].into(), ..template.clone() }).collect();
    m.slice("big", Family::V4, all);
    m.write()?;
    let upstream = |k: u8| -> Result<crate::program::Agent> {
        let node = t.node(k);
        let program = meshlb.clone().flag("--zone=corp.example").flag(&format!("--dns-listen={}", node.v4));
        let program = program.flag("--dns-allow=192.168.50.1/32,10.244.0.0/16");
        cx.will_clean(node);
        let mut agent = program.agent(node, &m.dir)?;
        ready(node, &mut agent)?;
        Ok(agent)
    };
    let two = upstream(2)?;
    let _three = upstream(3)?;
    let (n1, p12) = (t.node(1), t.pod("p12"));
    let (u2, u3) = (t.node(2).v4, t.node(3).v4);
    let first = meshlb
        .clone()
        .flag(&format!("--dns-forward=corp.example={u2}+{u3}"))
        .flag("--dns-upstream=192.0.2.1");
    cx.will_clean(n1);
    let mut agent = first.agent(n1, &m.dir)?;
    ready(n1, &mut agent)?;
    let at = SERVERS[0];
    let web = "web.default.corp.example";
    answers_with(p12, at, &format!("web.{ZONE}"), "A", &["10.200.0.5"])?;
    answers_with(p12, at, web, "A", &["10.200.0.5"])?;
    let text = dig(p12, at, &[web, "A"])?;
    ensure!(text.contains("flags: qr rd ra;"), "{text}");
    let text = dig(p12, at, &["nothing.default.corp.example", "A"])?;
    ensure!(text.contains("status: NXDOMAIN") && text.contains("SOA\tcorp.example."), "{text}");
    // Too large for UDP: fetched and given by TCP.
    let text = dig(p12, at, &["big.default.corp.example", "A"])?;
    let n = text.lines().filter(|l| l.contains("\tA\t")).count();
    ensure!(n == 200, "{n} addresses: {text}");
    // One upstream dies: the other answers, also what is not in the cache.
    two.kill();
    let begun = Instant::now();
    has_none(p12, at, "tasks.big.default.corp.example", "AAAA", "NOERROR")?;
    let text = dig(p12, at, &["+time=5", "default.corp.example", "TXT"])?;
    ensure!(text.contains("status: NOERROR"), "{text}");
    cx.note(format!("answered by the other upstream after {:?}", begun.elapsed()));
    wait_until("it is told", Duration::from_secs(25), || {
        Ok(http(n1, ADMIN, "/readyz")?.1.contains(&format!("DNS upstream {u2}:53 does not answer")))
    })?;
    ensure!(metric(n1, &format!("meshlb_dns_upstream_up{{upstream=\"{u3}:53\""))? == 1.0);
    ensure!(metric(n1, &format!("meshlb_dns_upstream_up{{upstream=\"{u2}:53\""))? == 0.0);
    let told = format!("{{upstream=\"{u3}:53\",zone=\"corp.example.\",protocol=\"udp\"");
    let told = metric(n1, &format!("meshlb_dns_upstream_answers_total{told}"))?;
    ensure!(told >= 2.0, "the one that is left has answered {told} times");
    let forwarded = "meshlb_dns_answer_duration_seconds_count{from=\"forward\"}";
    ensure!(metric(n1, forwarded)? >= 5.0);
    let before = metric(n1, "meshlb_dns_cache_hits_total")?;
    for _ in 0..5 {
        dig(p12, at, &["default.corp.example", "TXT"])?;
    }
    ensure!(metric(n1, "meshlb_dns_cache_hits_total")? >= before + 4.0, "the cache was not used");
    // Our zone is never asked for elsewhere: every upstream there is would take seconds to fail.
    let text = dig(p12, at, &["nothing.default.mesh.internal", "A"])?;
    // As dig has measured it: to start it may take a second here.
    let took = text
        .lines()
        .find_map(|l| l.strip_prefix(";; Query time: ")?.strip_suffix(" msec")?.parse::<u32>().ok());
    ensure!(text.contains("status: NXDOMAIN") && took.is_some_and(|ms| ms < 900), "{text}");
    // An upstream that is dead takes its time and is told.
    let text = dig(p12, at, &["elsewhere.example", "A"])?;
    ensure!(text.contains("status: SERVFAIL"), "{text}");
    drop(agent);
    let out = meshlb.clone().flag("--dns-upstream=10.200.0.2").run(n1, &["show"])?;
    ensure!(out.status == 2 && out.stderr.contains("would ask itself"), "{out}");
    Ok(())
}

/// A port that is taken is told, tried again, and no reason not to balance.
fn taken(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone().flag("--dns-listen=vip,192.168.50.1");
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    m.service("web").vips(&["10.200.0.5", "fd00:200::5"])?.port(Proto::Tcp, 80, 8080, None);
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    let n1 = t.node(1);
    n1.serve_as("HOST-53", &[crate::server::Listen { proto: Proto::Udp, addr: "192.168.50.1:53".parse()? }])?;
    let agent = start(cx, &meshlb, &t, &m)?;
    let p12 = t.pod("p12");
    answers_with(p12, SERVERS[0], &format!("web.{ZONE}"), "A", &["10.200.0.5"])?;
    let told = "DNS can't be served on 192.168.50.1:53: Address already in use";
    wait_until("it is told", Duration::from_secs(10), || {
        let (status, body) = http(n1, ADMIN, "/readyz")?;
        if status != 200 {
            bail!("not ready for it: {body}");
        }
        Ok(body.contains(told))
    })?;
    check::only(&p12.connect(Proto::Tcp, "10.200.0.5:80".parse::<SocketAddr>()?, 2)?, "p11")?;
    n1.stop_serving("HOST-53");
    let (at, name) = ("192.168.50.1", format!("web.{ZONE}"));
    wait_until("it is had", Duration::from_secs(20), || Ok(short(n1, at, &name, "A")? == ["10.200.0.5"]))?;
    // Everyone around the node has a private address; with nobody named, none of them may ask there.
    has_none(&t.ext, at, &name, "A", "REFUSED")?;
    has_none(p12, at, &name, "A", "REFUSED")?;
    answers_with(p12, SERVERS[0], &name, "A", &["10.200.0.5"])?;
    agent.kill();
    let _agent = start(cx, &meshlb.flag("--dns-allow=10.244.0.0/16"), &t, &m)?;
    let answered = || Ok(short(p12, at, &name, "A")? == ["10.200.0.5"]);
    wait_until("who is on the list is answered", Duration::from_secs(20), answered)?;
    answers_with(n1, at, &name, "A", &["10.200.0.5"])?;
    has_none(&t.ext, at, &name, "A", "REFUSED")?;
    let text = dig(&t.ext, at, &["+tcp", &name, "A"])?;
    let closed = ["end of file", "connection reset", "ended"].iter().any(|how| text.contains(how));
    ensure!(closed && !text.contains("status:"), "not closed: {text}");
    Ok(())
}
