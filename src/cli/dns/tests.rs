//! When what is answered, and what a command line asks for.

use std::{net::UdpSocket, time::Duration};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::RecordType,
};

use super::*;
use crate::{
    dataplane::fake::FakeKernel,
    dns::ask,
    metrics::DnsMetrics,
    model::{
        fixtures::{endpoint, port, published, service, slice},
        node::NodeSays,
        service::{FamilyPolicy, Mode, Service, ServicePort},
        snapshot::Event,
    },
    plan::Op,
    reconcile::tests::{after_a_restart, endpoints, engine, now, service_with},
};

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn dnsrr(name: &str) -> Event {
    let mut ports = vec![port(80, 8080)];
    ports[0].name = Some("pg".into());
    Event::Service(Service { mode: Mode::Dnsrr, ports, ..service(name) }.into())
}

fn feed(engine: &Engine) -> Feed {
    let zone = Zone::new("mesh.internal", engine.settings().node.ranges).unwrap();
    Feed::new(zone, None, &Metrics::default())
}

impl Feed {
    fn turned(&mut self, engine: &mut Engine) {
        let turn = engine.turn(true, now()).unwrap();
        self.update(engine, &turn.services, None);
    }

    fn told(&mut self, client: Option<&str>, name: &str, kind: RecordType) -> String {
        let name = Name::from_ascii(name).unwrap();
        let table = self.names.publish(true);
        let Some(answer) = table.answer(&name, kind, client.map(|ip| ip.parse().unwrap())) else {
            return "not ours".into();
        };
        match answer.code {
            ResponseCode::NoError => {
                let mut all: Vec<_> = answer.answers.iter().map(|r| r.data.to_string()).collect();
                all.sort();
                all.join(" ")
            }
            code => format!("{code:?}"),
        }
    }

    fn a(&mut self, name: &str) -> String {
        self.told(None, &format!("{name}.mesh.internal."), RecordType::A)
    }
}

#[test]
fn what_was_never_read_is_not_said_to_be_missing() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    engine.feed([service_with("vote", port(80, 8080)), endpoints("vote", &["10.244.1.11"]), dnsrr("db")]);
    engine
        .synced(Unread { services: [key("lost"), ServiceKey::new("far", "x")].into(), ..Unread::default() });
    let mut feed = feed(&engine);
    feed.turned(&mut engine);
    feed.published = true;
    // Itself, what belongs to it, and what may be an alias of it.
    for name in ["lost.default", "tasks.lost.default", "_a._b.lost.default", "poll.default", "far", "x.far"] {
        assert_eq!(feed.a(name), "ServFail", "{name}");
    }
    // What no service has, where nothing is missing, or what is there.
    for name in ["www.example.lost.default", "lost.other", "other", "x.vote.default", "a.b.c.d.e"] {
        assert_eq!(feed.a(name), "NXDomain", "{name}");
    }
    assert!(feed.a("vote.default").starts_with("10.200."));
    assert_eq!((feed.a("default"), feed.a("db.default")), (String::new(), String::new()));
    for (name, want) in [
        ("9.9.200.10.in-addr.arpa.", "ServFail"),
        ("9.200.10.in-addr.arpa.", ""),
        ("x.9.200.10.in-addr.arpa.", "NXDomain"),
        ("9.9.9.10.in-addr.arpa.", "not ours"),
    ] {
        assert_eq!(feed.told(None, name, RecordType::PTR), want, "{name}");
    }
    let pod = Some("10.244.1.11");
    for (name, want) in [
        ("lost.", "ServFail"),
        ("tasks.lost.", "ServFail"),
        ("a.lost.", "ServFail"),
        ("poll.", "ServFail"),
        ("poll.example.", "not ours"),
        ("www.lost.example.", "not ours"),
    ] {
        assert_eq!(feed.told(pod, name, RecordType::A), want, "{name}");
    }
    // It can be read; nothing else is missing.
    engine.feed([service_with("lost", port(81, 8080))]);
    engine.synced(Unread::default());
    feed.look(&engine);
    assert_eq!(feed.a("lost.default"), "ServFail", "it is there, and not programmed yet");
    feed.turned(&mut engine);
    assert!(feed.a("lost.default").starts_with("10.200."));
    assert_eq!((feed.a("poll.default").as_str(), feed.a("far").as_str()), ("NXDomain", "NXDomain"));
    // Of what is wrong from now on the last good version is in force, and nobody has been told of what is new.
    engine.synced(Unread::anything());
    feed.turned(&mut engine);
    assert_eq!(feed.a("poll.default"), "NXDomain");
}

#[test]
fn addresses_of_a_family_that_the_node_does_not_serve_are_not_answered() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let both = Service {
        ports: vec![port(80, 8080)],
        family_policy: FamilyPolicy::RequireDualStack,
        ..service("both")
    };
    engine.feed([Event::Service(both.into())]);
    engine.synced(Unread::default());
    let mut feed = feed(&engine);
    feed.turned(&mut engine);
    let all = |feed: &mut Feed| {
        ["both.default.mesh.internal.", "mesh.internal."].map(|name| feed.told(None, name, RecordType::AAAA))
    };
    let [vip, own] = all(&mut feed);
    assert!(vip.starts_with("fd00:200::") && own == "fd00:200::2", "{vip} {own}");
    kernel.lock().facts.primary.v6 = None;
    engine.end_family_grace();
    assert!(engine.refresh_node().unwrap());
    feed.turned(&mut engine);
    assert_eq!(all(&mut feed), ["", ""]);
    assert!(feed.a("both.default").starts_with("10.200."));
    assert_eq!(feed.told(None, "mesh.internal.", RecordType::A), "10.200.0.2");
    let ns =
        feed.names.publish(true).answer(&Name::from_ascii("mesh.internal.").unwrap(), RecordType::NS, None);
    assert_eq!(ns.unwrap().additionals.len(), 1);
}

#[test]
fn names_that_need_no_kernel_follow_the_source_while_it_can_not_be_read() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    let of = |name: &str, address: &str| endpoints(name, &[address]);
    let vote = |port: ServicePort| service_with("vote", ServicePort { name: Some("pg".into()), ..port });
    engine.feed([vote(port(80, 8080)), of("vote", "10.244.1.1"), dnsrr("db"), of("db", "10.244.1.2")]);
    engine.feed([dnsrr("gone"), of("gone", "10.244.1.3"), service_with("stays", port(82, 8080))]);
    engine.synced(Unread::default());
    let mut feed = feed(&engine);
    feed.turned(&mut engine);
    feed.published = true;
    let srv = |feed: &mut Feed, name: &str| {
        feed.told(None, &format!("_pg._tcp.{name}.default.mesh.internal."), RecordType::SRV)
    };
    let (vip, stays) = (feed.a("vote.default"), feed.a("stays.default"));
    let moved = |engine: &mut Engine| {
        engine.feed([of("vote", "10.244.2.1"), of("db", "10.244.2.2")]);
        engine.feed([dnsrr("new"), of("new", "10.244.2.4"), service_with("later", port(83, 8080))]);
        engine.feed(["gone", "stays"].map(|name| Event::ServiceGone(key(name))));
    };
    moved(&mut engine);
    let fail = |engine: &mut Engine, feed: &mut Feed| {
        engine.distrust();
        kernel.lock().faults.push("read services".into());
        assert!(engine.prepare(true, now()).is_err());
        feed.turn_failed(engine);
    };
    fail(&mut engine, &mut feed);
    for (name, want) in [
        ("tasks.vote", "10.244.2.1"),
        ("vote", &vip),
        ("db", "10.244.2.2"),
        ("10-244-2-2.db", "10.244.2.2"),
        ("new", "10.244.2.4"),
        ("gone", "NXDomain"),
        ("stays", &stays),
        ("later", "NXDomain"),
    ] {
        assert_eq!(feed.a(&format!("{name}.default")), want, "{name}");
    }
    assert_eq!(srv(&mut feed, "db"), "0 1 8080 10-244-2-2.db.default.mesh.internal.");
    // A port that is not programmed is not told of, nor what comes with it.
    engine.feed([vote(port(90, 8080)), of("vote", "10.244.2.9")]);
    fail(&mut engine, &mut feed);
    assert_eq!(srv(&mut feed, "vote"), "0 1 80 vote.default.mesh.internal.");
    assert_eq!(feed.a("tasks.vote.default"), "10.244.2.1");
    feed.turned(&mut engine);
    assert_eq!(srv(&mut feed, "vote"), "0 1 90 vote.default.mesh.internal.");
    assert_eq!(
        (feed.a("tasks.vote.default").as_str(), feed.a("stays.default").as_str()),
        ("10.244.2.9", "NXDomain")
    );
    assert!(feed.a("later.default").starts_with("10.200."));
}

#[test]
fn what_came_while_no_agent_ran_is_answered_when_the_kernel_has_it() {
    let kernel = FakeKernel::default();
    let vote = || [service_with("vote", port(80, 8080)), endpoints("vote", &["10.244.1.1"])];
    let moving = |vip: &str| {
        let vips = vec![vip.parse().unwrap()];
        Event::Service(Service { ports: vec![port(82, 8080)], vips, ..service("moving") }.into())
    };
    let mut first = engine(&kernel, Allocations::default());
    first.feed(vote().into_iter().chain([moving("10.200.0.8"), endpoints("moving", &["10.244.1.1"])]));
    first.synced(Unread::default());
    first.turn(true, now()).unwrap();
    let mut again = after_a_restart(&kernel, &first);
    again.feed(vote().into_iter().chain([moving("10.200.0.9"), endpoints("moving", &["10.244.1.1"])]));
    again.feed([service_with("new", port(81, 8080)), endpoints("new", &["10.244.1.2"])]);
    again.feed([dnsrr("db"), endpoints("db", &["10.244.1.3"]), endpoints("vote", &["10.244.1.4"])]);
    again.synced(Unread::default());
    let ops = again.prepare(true, now()).unwrap();
    let mut feed = feed(&again);
    feed.take_over(&again, &to_come(&again));
    assert!(feed.a("vote.default").starts_with("10.200."), "an endpoint moved, and no more");
    assert_eq!(feed.a("db.default"), "10.244.1.3", "it needs nothing of the kernel");
    assert_eq!((feed.a("new.default").as_str(), feed.a("moving.default").as_str()), ("ServFail", "ServFail"));
    let name = Name::from_ascii("new.default.mesh.internal.").unwrap();
    assert!(feed.names.publish(true).answer(&name, RecordType::A, None).unwrap().soon);
    assert_eq!(again.apply(&ops), vec![]);
    let services = again.take_settled();
    feed.update(&again, &services, None);
    assert!(feed.a("new.default").starts_with("10.200."));
    assert_eq!(
        (feed.a("moving.default").as_str(), feed.a("else.default").as_str()),
        ("10.200.0.9", "NXDomain")
    );
}

/// What the kernel serves, and what it needs nothing of it for, is answered; what has moved is not, whichever way it comes.
#[test]
fn what_is_to_come_is_what_the_kernel_has_no_entry_of() {
    for installs in [false, true] {
        let kernel = FakeKernel::default();
        let at = |name: &str, vip: &str, ports: &[u16]| {
            let ports = ports.iter().map(|n| port(*n, 8080)).collect();
            let vips = vec![vip.parse().unwrap()];
            Event::Service(Service { ports, vips, ..service(name) }.into())
        };
        let of = |name: &str| endpoints(name, &["10.244.1.1"]);
        let published_dnsrr = || {
            let ports = vec![published(90, 8080, Some(30090))];
            Event::Service(Service { mode: Mode::Dnsrr, ports, ..service("db") }.into())
        };
        let mut first = engine(&kernel, Allocations::default());
        first.feed([at("grows", "10.200.0.7", &[80]), at("moves", "10.200.0.8", &[80])]);
        first.feed([at("empty", "10.200.0.6", &[80]), at("loses", "10.200.0.5", &[80])]);
        first.feed(["grows", "moves", "loses"].map(of));
        first.synced(Unread::default());
        first.turn(true, now()).unwrap();
        let mut again = after_a_restart(&kernel, &first);
        again.feed([at("grows", "10.200.0.7", &[80, 81]), at("moves", "10.200.0.9", &[80])]);
        again.feed([at("empty", "10.200.0.6", &[80, 81]), at("takes", "10.200.0.5", &[80])]);
        again.feed([published_dnsrr(), at("new", "10.200.0.10", &[80])]);
        again.feed(["grows", "moves", "takes", "db", "new"].map(of));
        again.synced(Unread::default());
        if let Some(program) = kernel.lock().state.program.as_mut().filter(|_| installs) {
            program.uplinks.push("gone0".into());
        }
        let ops = again.prepare(true, now()).unwrap();
        assert_eq!(ops.iter().any(|op| matches!(op, Op::Install { .. })), installs, "{ops:?}");
        assert_eq!(to_come(&again), ["moves", "takes", "new"].map(key).into(), "{installs}");
    }
}

#[test]
fn who_may_ask_by_default_depends_on_the_address() {
    let ranges = PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None };
    let config = |flags: &[&str]| options(flags).config(ranges).unwrap().unwrap();
    let listen = "--dns-listen=vip,192.0.2.1:5300,127.0.0.53";
    let by_default = config(&[listen]);
    assert_eq!(by_default.inside, ["10.200.0.2", "127.0.0.53"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(by_default.outside(), Some("192.0.2.1:5300".parse().unwrap()));
    assert!(by_default.allow.len() > 5 && by_default.allow_outside == Some(vec![]));
    let named = config(&[listen, "--dns-allow=192.0.2.0/24"]);
    assert_eq!((named.allow.len(), named.allow_outside, named.allow_pods), (1, None, false));
    assert_eq!(config(&[]).outside(), None);
}

#[test]
fn a_zone_says_where_it_is_served() {
    let ranges = PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None };
    for (listen, want) in [
        ("vip", "10.200.0.2"),
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1,vip", "10.200.0.2"),
        ("192.0.2.9,192.0.2.1,192.0.2.9", "192.0.2.9"),
        ("127.0.0.53,192.0.2.1", "192.0.2.1"),
        ("127.0.0.53", "127.0.0.53"),
    ] {
        let zone = options(&[&format!("--dns-listen={listen}")]).zone(ranges).unwrap();
        assert_eq!(zone.servers.v4.map(|ip| ip.to_string()).as_deref(), Some(want), "{listen}");
    }
}

#[test]
fn names_of_the_machine_itself_are_not_forwarded() {
    let ranges = PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None };
    let refused = |zone: &str| {
        let flag = format!("--dns-forward={zone}=10.0.0.1");
        options(&[&flag]).config(ranges).err().map(|e| e.to_string())
    };
    for zone in ["localhost", "x.localhost", "127.in-addr.arpa", "0.127.in-addr.arpa"] {
        assert!(refused(zone).is_some_and(|told| told.contains(zone) && told.contains("itself")), "{zone}");
    }
    assert_eq!((refused("onion"), refused("in-addr.arpa")), (None, None));
}

#[test]
fn services_that_have_nothing_allocated_are_remembered_by_name() {
    let mut engine = engine(&FakeKernel::default(), Allocations::default());
    let mut vote = Service { ports: vec![port(80, 8080)], ..service("vote") };
    vote.dns.aliases = vec!["Poll".into()];
    engine.feed([Event::Service(vote.into()), dnsrr("db")]);
    engine.synced(Unread::default());
    let before = engine.generation();
    engine.turn(true, now()).unwrap();
    assert!(engine.generation() > before, "it is when the state is written");
    let allocations = engine.allocator().allocations();
    assert!(allocations.services.contains_key(&key("vote")));
    assert_eq!(labels(&engine, &allocations), ["db", "poll"].map(String::from).into());
}

fn options(flags: &[&str]) -> DnsOptions {
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        dns: DnsOptions,
    }
    <Flags as clap::Parser>::parse_from([&["x"], flags].concat()).dns
}

#[test]
fn upstreams_of_a_zone_that_is_named_twice_are_all_asked() {
    let dns = options(&[
        "--dns-upstream=192.0.2.1",
        "--dns-forward=corp.example=10.0.0.1,Corp.Example=10.0.0.2+10.0.0.1,.=192.0.2.2",
    ]);
    let forward = dns.forward();
    let at = |text: &str| parse_upstream(text).unwrap();
    assert_eq!(forward.upstreams, [at("192.0.2.1"), at("192.0.2.2")]);
    assert_eq!(forward.zones, ["corp.example=10.0.0.1+10.0.0.2".parse().unwrap()]);
}

#[test]
fn zones_of_virtual_ips_are_not_forwarded() {
    let ranges = PerFamily {
        v4: Some("10.200.32.0/20".parse().unwrap()),
        v6: Some("fd00:200::/112".parse().unwrap()),
    };
    let v6 = Name::from("fd00:200::1".parse::<IpAddr>().unwrap());
    let refused = |zone: &str| {
        let flag = format!("--dns-forward={zone}=10.0.0.1");
        options(&[&flag]).config(ranges).err().map(|e| e.to_string())
    };
    for zone in [
        "33.200.10.in-addr.arpa",
        "1.33.200.10.in-addr.arpa",
        "x.1.33.200.10.in-addr.arpa",
        &v6.trim_to(30).to_ascii(),
    ] {
        let told = refused(zone).unwrap_or_default();
        assert!(told.contains(zone.trim_end_matches('.')) && told.contains("--vip-cidr"), "{zone}: {told}");
    }
    // Of these some addresses are ours, and only those are answered here.
    for zone in
        ["200.10.in-addr.arpa", "10.in-addr.arpa", "48.200.10.in-addr.arpa", "corp.example", "arpa", "x.arpa"]
    {
        assert_eq!(refused(zone), None, "{zone}");
    }
    assert_eq!(refused(&v6.trim_to(29).to_ascii()), None);
}

#[test]
fn what_is_deleted_before_it_was_read_is_missing_without_a_turn() {
    let mut engine = engine(&FakeKernel::default(), Allocations::default());
    engine.synced(Unread::anything());
    let mut feed = feed(&engine);
    feed.turned(&mut engine);
    feed.published = true;
    assert_eq!((feed.a("x.default").as_str(), feed.a("default").as_str()), ("ServFail", "ServFail"));
    engine.synced(Unread::default());
    feed.look(&engine);
    assert_eq!((feed.a("x.default").as_str(), feed.a("default").as_str()), ("NXDomain", "NXDomain"));
}

#[test]
fn ranges_of_pods_are_taken_over_without_a_turn() {
    let mut engine = engine(&FakeKernel::default(), Allocations::default());
    engine.feed([dnsrr("db"), Event::Slice(slice("db", vec![endpoint("10.244.1.12", "n1")]))]);
    let at: SocketAddr = ([127, 0, 54, 1], 5300).into();
    let mut config = options(&[]).config(engine.settings().node.ranges).unwrap().unwrap();
    (config.listen, config.allow) = (vec![at], vec![]);
    let mut feed = feed(&engine);
    let zone = Zone::new("mesh.internal", engine.settings().node.ranges).unwrap();
    feed.server = Some(Server::start(&config, zone, BTreeSet::new(), DnsMetrics::default()).unwrap());
    engine.synced(Unread::default());
    feed.turned(&mut engine);
    // The pod. 127.0.0.1 is the node's own.
    let pod = UdpSocket::bind("127.0.0.2:0").unwrap();
    pod.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut question = Message::query();
    question.add_query(Query::query(Name::from_ascii("db.default.mesh.internal.").unwrap(), RecordType::A));
    let told = || {
        let mut buffer = [0; 512];
        pod.send_to(&question.to_vec().unwrap(), at).unwrap();
        let n = pod.recv(&mut buffer).ok()?;
        Some(Message::from_vec(&buffer[..n]).unwrap().metadata.response_code)
    };
    let begun = Instant::now();
    while ask::addresses(at, "mesh.internal.", RecordType::A).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", feed.problems());
    }
    assert_eq!(told(), None);
    let mut said = |range: &str| {
        engine.set_node(NodeSays { pods: vec![range.parse().unwrap()], ..NodeSays::default() });
        feed.look(&engine);
        // A datagram may be late on a busy machine.
        (0..20).find_map(|_| told())
    };
    assert_eq!(said("127.0.0.0/30"), Some(ResponseCode::NoError));
    assert_eq!(said("192.0.2.0/24"), Some(ResponseCode::Refused));
}

#[test]
fn endpoints_that_were_never_read_are_not_said_to_be_none() {
    let kernel = FakeKernel::default();
    let mut engine = engine(&kernel, Allocations::default());
    engine.feed([service_with("vote", port(80, 8080)), dnsrr("db"), dnsrr("part"), dnsrr("none")]);
    engine.feed([Event::Slice(slice("part", vec![endpoint("10.244.1.12", "n1")]))]);
    let unread = Unread { endpoints_of: ["vote", "db", "part"].map(key).into(), ..Unread::default() };
    engine.synced(unread);
    let mut feed = feed(&engine);
    feed.turned(&mut engine);
    for (name, want) in [
        ("db", "ServFail"),
        ("tasks.db", "ServFail"),
        ("db-0.db", "ServFail"),
        ("tasks.vote", "ServFail"),
        ("part", "10.244.1.12"),
        ("tasks.part", "10.244.1.12"),
        ("10-244-1-12.part", "10.244.1.12"),
        ("10-244-1-13.part", "ServFail"),
        ("none", ""),
        ("tasks.none", ""),
        ("x.none", "NXDomain"),
        ("nothing", "NXDomain"),
    ] {
        assert_eq!(feed.a(&format!("{name}.default")), want, "{name}");
    }
    assert!(feed.a("vote.default").starts_with("10.200."));
    let srv = |feed: &mut Feed, name: &str| {
        feed.told(None, &format!("_pg._tcp.{name}.default.mesh.internal."), RecordType::SRV)
    };
    assert_eq!(srv(&mut feed, "db"), "ServFail");
    assert_eq!(srv(&mut feed, "none"), "");
    assert!(srv(&mut feed, "part").starts_with("0 1 8080"));
    // A family that the service does not have is not missing.
    assert_eq!(feed.told(None, "db.default.mesh.internal.", RecordType::AAAA), "");
    // Who asks may be a pod that is in what can't be read.
    let mut short = |name: &str| feed.told(Some("10.244.1.99"), name, RecordType::A);
    assert_eq!((short("vote.").as_str(), short("a.db.").as_str()), ("ServFail", "ServFail"));
    assert_eq!((short("com.").as_str(), short("www.example.").as_str()), ("not ours", "not ours"));
}
