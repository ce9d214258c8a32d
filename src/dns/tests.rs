//! Names and what they answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RData, RecordType},
};

use super::{
    answer::Answer,
    names::Names,
    records::{Context, ServiceNames},
    table::Table,
    unknown::Unknown,
    zone::Zone,
};
use crate::compile::endpoints::Place;
use crate::model::{
    endpoints::Slice,
    fixtures::{config, endpoint, port, service, slice},
    ids::{Family, PerFamily, ServiceKey},
    service::{DnsAnswer, Mode, Service, TargetPort, TrafficDistribution, TrafficPolicy},
    unread::Unread,
};

pub(super) fn zone() -> Arc<Zone> {
    Zone::new("mesh.internal", config().ranges).unwrap()
}

pub(super) fn vip(ip: &str) -> PerFamily<IpAddr> {
    PerFamily { v4: Some(ip.parse().unwrap()), v6: None }
}

/// Puts a service into the names.
pub(super) fn put(
    names: &mut Names,
    service: &Service,
    slices: &[Arc<Slice>],
    vips: PerFamily<IpAddr>,
) -> BTreeSet<ServiceKey> {
    let context = Context { place: Place { node: "n1", zone: Some("z1") }, vips };
    let new = ServiceNames::new(service, slices, context, names.get(&service.key).map(|old| &**old));
    names.set(&service.key, Some(new))
}

pub(super) fn dnsrr(name: &str) -> Service {
    let mut out = service(name);
    out.mode = Mode::Dnsrr;
    out.ports = vec![port(80, 8080)];
    out
}

/// VIP service `vote`, round robin `db`, each with endpoints.
pub(super) fn some() -> Names {
    let mut names = Names::new(zone());
    let mut vote = service("vote");
    vote.ports = vec![port(80, 8080)];
    vote.ports[0].name = Some("http".into());
    vote.dns.aliases = vec!["poll".into()];
    let ends = vec![endpoint("10.244.1.11", "n1"), endpoint("10.244.2.21", "n2")];
    put(&mut names, &vote, &[slice("vote", ends)], vip("10.200.7.7"));
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    let mut ends =
        vec![endpoint("10.244.1.31", "n1"), endpoint("10.244.2.32", "n2"), endpoint("10.244.2.33", "n2")];
    ends[0].hostname = Some("db-0".into());
    ends[1].target = Some("db-x.y".into());
    ends[2].ready = false;
    ends[2].serving = false;
    put(&mut names, &db, &[slice("db", ends)], PerFamily::default());
    names
}

pub(super) fn ask_as(table: &Table, client: Option<&str>, name: &str, kind: RecordType) -> Option<Answer> {
    let client = client.map(|ip| ip.parse().unwrap());
    table.answer(&Name::from_ascii(name).unwrap(), kind, client)
}

fn ask(table: &Table, name: &str, kind: RecordType) -> Answer {
    ask_as(table, None, name, kind).unwrap()
}

/// An answer in a line: code if not NOERROR, records without order, SOA's minimum.
fn told(answer: &Answer) -> String {
    let mut records: Vec<String> = answer.answers.iter().map(|r| r.data.to_string()).collect();
    records.sort();
    let mut out = records.join(" ");
    if answer.code != ResponseCode::NoError {
        out = format!("{:?} {out}", answer.code).trim().to_owned();
    }
    for record in &answer.authorities {
        if let RData::SOA(soa) = &record.data {
            assert_eq!(soa.minimum, record.ttl);
            out += &format!(" SOA {} {}", record.name, soa.minimum);
        }
    }
    out.trim().to_owned()
}

fn published(names: &mut Names) -> Arc<Table> {
    names.publish(true)
}

#[test]
fn what_names_answer() {
    let table = published(&mut some());
    use RecordType as T;
    let nothing = "SOA mesh.internal. 5";
    let none = "NXDomain SOA mesh.internal. 5";
    for (name, kind, want) in [
        ("vote.default.mesh.internal.", T::A, "10.200.7.7"),
        ("VoTe.dEfault.mesh.internal.", T::A, "10.200.7.7"),
        ("poll.default.mesh.internal.", T::A, "10.200.7.7"),
        ("vote.default.mesh.internal.", T::AAAA, nothing),
        ("vote.default.mesh.internal.", T::MX, nothing),
        ("vote.default.mesh.internal.", T::SRV, nothing),
        ("vote.default.mesh.internal.", T::ANY, "RFC8482 "),
        ("tasks.vote.default.mesh.internal.", T::A, "10.244.1.11 10.244.2.21"),
        ("tasks.poll.default.mesh.internal.", T::A, "10.244.1.11 10.244.2.21"),
        ("10-244-1-11.vote.default.mesh.internal.", T::A, "10.244.1.11"),
        ("_http._tcp.vote.default.mesh.internal.", T::SRV, "0 1 80 vote.default.mesh.internal."),
        ("_tcp.vote.default.mesh.internal.", T::A, nothing),
        ("_udp.vote.default.mesh.internal.", T::A, none),
        ("_http._udp.vote.default.mesh.internal.", T::SRV, none),
        ("x.vote.default.mesh.internal.", T::A, none),
        ("db.default.mesh.internal.", T::A, "10.244.1.31 10.244.2.32"),
        ("db-0.db.default.mesh.internal.", T::A, "10.244.1.31"),
        ("10-244-2-32.db.default.mesh.internal.", T::A, "10.244.2.32"),
        ("10-244-2-33.db.default.mesh.internal.", T::A, none),
        (
            "_pg._tcp.db.default.mesh.internal.",
            T::SRV,
            "0 1 8080 10-244-2-32.db.default.mesh.internal. 0 1 8080 db-0.db.default.mesh.internal.",
        ),
        ("default.mesh.internal.", T::A, nothing),
        ("other.mesh.internal.", T::A, none),
        ("vote.other.mesh.internal.", T::A, none),
        ("a.b.c.d.e.mesh.internal.", T::A, none),
        ("*.default.mesh.internal.", T::A, none),
        ("mesh.internal.", T::A, "10.200.0.2"),
        ("mesh.internal.", T::AAAA, "fd00:200::2"),
        ("mesh.internal.", T::NS, "mesh.internal."),
        ("mesh.internal.", T::TXT, nothing),
        ("7.7.200.10.in-addr.arpa.", T::PTR, "vote.default.mesh.internal."),
        ("11.1.244.10.in-addr.arpa.", T::PTR, "10-244-1-11.vote.default.mesh.internal."),
        ("31.1.244.10.in-addr.arpa.", T::PTR, "db-0.db.default.mesh.internal."),
        ("8.7.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
        ("007.7.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
        ("07.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
        ("7.7.200.10.IN-ADDR.arpa.", T::PTR, "vote.default.mesh.internal."),
        ("7.7.200.10.in-addr.arpa.", T::A, "SOA 200.10.in-addr.arpa. 5"),
        ("7.200.10.in-addr.arpa.", T::PTR, "SOA 200.10.in-addr.arpa. 5"),
        ("200.10.in-addr.arpa.", T::NS, "mesh.internal."),
        // What looks for services by DNS asks for (RFC 6763, 11), and other names that are no address's.
        ("b._dns-sd._udp.0.7.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
        ("x.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
        ("1.0-25.7.200.10.in-addr.arpa.", T::PTR, "NXDomain SOA 200.10.in-addr.arpa. 5"),
    ] {
        assert_eq!(told(&ask(&table, name, kind)), want.trim(), "{name} {kind}");
    }
    for name in [
        "example.com.",
        "vote.",
        "10.in-addr.arpa.",
        "99.1.244.10.in-addr.arpa.",
        ".",
        "b._dns-sd._udp.0.0.168.192.in-addr.arpa.",
        "x.10.in-addr.arpa.",
        "x.arpa.",
        // An endpoint that takes no connections: its name is not answered, so it has none.
        "33.2.244.10.in-addr.arpa.",
    ] {
        assert!(ask_as(&table, None, name, T::PTR).is_none(), "{name}");
    }
    let srv = ask(&table, "_pg._tcp.db.default.mesh.internal.", T::SRV);
    let mut more: Vec<_> = srv.additionals.iter().map(|r| format!("{} {}", r.name, r.data)).collect();
    more.sort();
    let host = "db.default.mesh.internal.";
    assert_eq!(more, [format!("10-244-2-32.{host} 10.244.2.32"), format!("db-0.{host} 10.244.1.31")]);
}

#[test]
fn nothing_is_said_before_the_source_has_told_everything() {
    let mut names = some();
    let table = names.publish(false);
    for name in ["vote.default.mesh.internal.", "mesh.internal.", "7.7.200.10.in-addr.arpa."] {
        assert_eq!(told(&ask(&table, name, RecordType::PTR)), "ServFail", "{name}");
    }
    names.set_unknown(Unknown::new(
        &Unread::default(),
        &BTreeSet::from([ServiceKey::new("default", "lost")]),
        &BTreeSet::new(),
    ));
    let table = names.publish(true);
    assert_eq!(told(&ask(&table, "lost.default.mesh.internal.", RecordType::A)), "ServFail");
    assert_eq!(told(&ask(&table, "vote.default.mesh.internal.", RecordType::A)), "10.200.7.7");
}

/// Of a range that is smaller than a zone the addresses' names are ours, and nothing else of it, wherever in the zone it begins.
#[test]
fn of_a_zone_that_is_shared_only_the_addresses_are_ours() {
    for (range, inside) in [("10.200.7.0/28", 3), ("10.200.7.16/28", 17)] {
        let ranges = PerFamily { v4: range.parse().ok(), v6: "fd00:200::/126".parse().ok() };
        let mut names = Names::new(Zone::new("mesh.internal", ranges).unwrap());
        let table = published(&mut names);
        for (name, kind, want) in [
            ("7.200.10.in-addr.arpa.", RecordType::SOA, None),
            ("7.200.10.in-addr.arpa.", RecordType::NS, None),
            ("x.7.200.10.in-addr.arpa.", RecordType::A, None),
            ("99.7.200.10.in-addr.arpa.", RecordType::PTR, None),
            (&format!("{inside}.7.200.10.in-addr.arpa."), RecordType::PTR, Some("NXDomain")),
            (&format!("x.{inside}.7.200.10.in-addr.arpa."), RecordType::PTR, Some("NXDomain")),
        ] {
            let got = ask_as(&table, None, name, kind).map(|answer| told(&answer));
            let want = want.map(|code| format!("{code} SOA 7.200.10.in-addr.arpa. 5"));
            assert_eq!(got, want, "{range} {name}");
        }
        let v6 = Name::from("fd00:200::".parse::<IpAddr>().unwrap()).trim_to(33).to_ascii();
        assert!(ask_as(&table, None, &v6, RecordType::SOA).is_none(), "{v6}");
    }
}

#[test]
fn a_service_without_endpoints() {
    let mut names = Names::new(zone());
    let mut vote = service("vote");
    vote.dns.ttl = 60;
    put(&mut names, &vote, &[], vip("10.200.7.7"));
    let mut db = dnsrr("db");
    db.dns.ttl = 2;
    put(&mut names, &db, &[], PerFamily::default());
    let table = published(&mut names);
    let a = |name| told(&ask(&table, name, RecordType::A));
    assert_eq!(a("vote.default.mesh.internal."), "10.200.7.7");
    assert_eq!(a("db.default.mesh.internal."), "SOA mesh.internal. 2");
    assert_eq!(a("tasks.vote.default.mesh.internal."), "SOA mesh.internal. 5");
    assert_eq!(ask(&table, "vote.default.mesh.internal.", RecordType::A).answers[0].ttl, 60);
}

#[test]
fn endpoints_that_end_answer_only_where_none_is_ready() {
    let mut names = Names::new(zone());
    let mut ends = vec![endpoint("10.244.1.1", "n1"), endpoint("10.244.1.2", "n1")];
    ends[1].ready = false;
    ends[1].terminating = true;
    let a = |names: &mut Names| told(&ask(&published(names), "db.default.mesh.internal.", RecordType::A));
    put(&mut names, &dnsrr("db"), &[slice("db", ends.clone())], PerFamily::default());
    assert_eq!(a(&mut names), "10.244.1.1");
    put(&mut names, &dnsrr("db"), &[slice("db", ends.split_off(1))], PerFamily::default());
    assert_eq!(a(&mut names), "10.244.1.2");
}

/// The slice that has the port has but an endpoint that ends, while others of the service are ready.
#[test]
fn where_a_port_is_found_there_is_a_name() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    db.ports[0].target = TargetPort::Name("pg".into());
    let mut ends = vec![endpoint("10.244.1.1", "n1")];
    (ends[0].ready, ends[0].terminating) = (false, true);
    let mut with = slice("db", ends);
    Arc::make_mut(&mut with).ports[0].name = Some("pg".into());
    let mut without = slice("db", vec![endpoint("10.244.1.2", "n1")]);
    Arc::make_mut(&mut without).key = ServiceKey::new("default", "db-2");
    put(&mut names, &db, &[with, without], PerFamily::default());
    let table = published(&mut names);
    let host = "10-244-1-1.db.default.mesh.internal.";
    let srv = ask(&table, "_pg._tcp.db.default.mesh.internal.", RecordType::SRV);
    assert_eq!(told(&srv), format!("0 1 8080 {host}"));
    assert_eq!(srv.additionals.iter().map(|r| r.data.to_string()).collect::<Vec<_>>(), ["10.244.1.1"]);
    assert_eq!(told(&ask(&table, host, RecordType::A)), "10.244.1.1");
    assert_eq!(told(&ask(&table, "tasks.db.default.mesh.internal.", RecordType::A)), "10.244.1.2");
}

#[test]
fn one_at_a_time_and_near_ones_only() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.dns.answer = DnsAnswer::Single;
    db.weights = [("heavy".to_owned(), 3)].into();
    let mut ends = vec![endpoint("10.244.1.1", "n1"), endpoint("10.244.2.2", "n2")];
    ends[0].target = Some("heavy".into());
    let slices = [slice("db", ends)];
    put(&mut names, &db, &slices, PerFamily::default());
    let table = published(&mut names);
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..400 {
        *counts.entry(told(&ask(&table, "db.default.mesh.internal.", RecordType::A))).or_insert(0) += 1;
    }
    assert_eq!(
        counts.into_iter().collect::<Vec<_>>(),
        [("10.244.1.1".into(), 300), ("10.244.2.2".into(), 100)]
    );
    let turns = names.get(&db.key).unwrap().turns.clone();
    db.internal_policy = TrafficPolicy::Local;
    put(&mut names, &db, &slices, PerFamily::default());
    assert!(Arc::ptr_eq(&turns, &names.get(&db.key).unwrap().turns), "turns go on");
    let table = published(&mut names);
    assert_eq!(told(&ask(&table, "db.default.mesh.internal.", RecordType::A)), "10.244.1.1");
    assert_eq!(told(&ask(&table, "tasks.db.default.mesh.internal.", RecordType::A)), "10.244.1.1 10.244.2.2");
}

#[test]
fn near_ones_are_preferred() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    db.distribution = TrafficDistribution::SameZone;
    let mut ends = vec![endpoint("10.244.1.1", "n2"), endpoint("10.244.2.2", "n3")];
    (ends[0].zone, ends[1].zone) = (Some("z1".into()), Some("z2".into()));
    put(&mut names, &db, &[slice("db", ends.clone())], PerFamily::default());
    let table = published(&mut names);
    assert_eq!(told(&ask(&table, "db.default.mesh.internal.", RecordType::A)), "10.244.1.1");
    let srv = ask(&table, "_pg._tcp.db.default.mesh.internal.", RecordType::SRV);
    assert_eq!(told(&srv), "0 1 8080 10-244-1-1.db.default.mesh.internal.");
    assert_eq!(told(&ask(&table, "tasks.db.default.mesh.internal.", RecordType::A)), "10.244.1.1 10.244.2.2");
    ends[0].ready = false;
    put(&mut names, &db, &[slice("db", ends)], PerFamily::default());
    let table = published(&mut names);
    assert_eq!(told(&ask(&table, "db.default.mesh.internal.", RecordType::A)), "10.244.2.2");
}

#[test]
fn both_families() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.families = vec![Family::V4, Family::V6];
    db.ports[0].name = Some("pg".into());
    let (mut a, mut b) = (endpoint("10.244.1.1", "n1"), endpoint("fd00:244::1", "n1"));
    (a.hostname, b.hostname) = (Some("db-0".into()), Some("db-0".into()));
    put(&mut names, &db, &[slice("db", vec![a]), slice("db", vec![b])], PerFamily::default());
    let table = published(&mut names);
    let name = "db.default.mesh.internal.";
    assert_eq!(told(&ask(&table, name, RecordType::A)), "10.244.1.1");
    assert_eq!(told(&ask(&table, name, RecordType::AAAA)), "fd00:244::1");
    let srv = ask(&table, &format!("_pg._tcp.{name}"), RecordType::SRV);
    assert_eq!(told(&srv), "0 1 8080 db-0.db.default.mesh.internal.");
    assert_eq!(srv.additionals.len(), 2);
    let ptr = Name::from("fd00:244::1".parse::<IpAddr>().unwrap()).to_ascii();
    assert_eq!(told(&ask(&table, &ptr, RecordType::PTR)), "db-0.db.default.mesh.internal.");
}

/// A label is what it is, whatever it would mean in another script.
#[test]
fn an_endpoint_that_looks_like_no_word_has_its_names() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    let mut end = endpoint("10.244.1.1", "n1");
    end.hostname = Some("xn--a".into());
    put(&mut names, &db, &[slice("db", vec![end])], PerFamily::default());
    let table = published(&mut names);
    let host = "xn--a.db.default.mesh.internal.";
    let ptr = ask_as(&table, None, "1.1.244.10.in-addr.arpa.", RecordType::PTR).unwrap();
    assert!(
        matches!(&ptr.answers[..], [one] if one.data.to_string().ends_with(".db.default.mesh.internal."))
    );
    let RData::PTR(target) = &ptr.answers[0].data else { panic!("{:?}", ptr.answers) };
    assert_eq!(target.0.to_ascii(), host);
    let srv = ask(&table, "_pg._tcp.db.default.mesh.internal.", RecordType::SRV);
    assert_eq!((srv.answers.len(), srv.additionals[0].name.to_ascii().as_str()), (1, host));
    assert_eq!(told(&ask(&table, host, RecordType::A)), "10.244.1.1");
}

#[test]
fn places_of_a_port_come_in_another_order_each_time() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    let ends = (1..=4).map(|i| endpoint(&format!("10.244.1.{i}"), "n1")).collect();
    put(&mut names, &db, &[slice("db", ends)], PerFamily::default());
    let table = published(&mut names);
    let mut first = BTreeMap::<String, usize>::new();
    for _ in 0..400 {
        let srv = ask(&table, "_pg._tcp.db.default.mesh.internal.", RecordType::SRV);
        assert_eq!(srv.answers.len(), 4);
        let RData::SRV(data) = &srv.answers[0].data else { panic!("{:?}", srv.answers) };
        // The addresses come in the order of the hosts.
        assert_eq!(data.target, srv.additionals[0].name);
        *first.entry(data.target.to_ascii()).or_default() += 1;
    }
    assert!(first.len() == 4 && first.values().all(|n| (50..150).contains(n)), "{first:?}");
}

/// The name that all endpoints have together is none of one of them.
#[test]
fn an_endpoint_that_is_called_tasks_has_a_name_of_its_own() {
    let mut names = Names::new(zone());
    let mut db = dnsrr("db");
    db.ports[0].name = Some("pg".into());
    let mut ends =
        vec![endpoint("10.244.1.1", "n1"), endpoint("10.244.1.2", "n1"), endpoint("10.244.1.3", "n1")];
    ends[0].hostname = Some("Tasks".into());
    ends[1].target = Some("tasks".into());
    (ends[2].hostname, ends[2].target) = (Some("tasks".into()), Some("db-2".into()));
    put(&mut names, &db, &[slice("db", ends)], PerFamily::default());
    let table = published(&mut names);
    let own = "db.default.mesh.internal.";
    let hosts = ["10-244-1-1", "10-244-1-2", "db-2"].map(|label| format!("{label}.{own}"));
    for (host, i) in hosts.iter().zip(1..) {
        assert_eq!(told(&ask(&table, host, RecordType::A)), format!("10.244.1.{i}"));
        assert_eq!(told(&ask(&table, &format!("{i}.1.244.10.in-addr.arpa."), RecordType::PTR)), *host);
    }
    let srv = told(&ask(&table, &format!("_pg._tcp.{own}"), RecordType::SRV));
    assert_eq!(srv, hosts.map(|host| format!("0 1 8080 {host}")).join(" "));
    let all = told(&ask(&table, &format!("tasks.{own}"), RecordType::A));
    assert_eq!(all, "10.244.1.1 10.244.1.2 10.244.1.3");
}

#[test]
fn aliases_come_and_go_and_have_one_owner() {
    let mut names = some();
    let a = |names: &mut Names, name: &str| {
        told(&ask(&published(names), &format!("{name}.default.mesh.internal."), RecordType::A))
    };
    let mut other = service("other");
    other.dns.aliases = vec!["poll".into(), "vote".into(), "mine".into()];
    other.created = 10;
    put(&mut names, &other, &[], vip("10.200.9.9"));
    assert_eq!(a(&mut names, "poll"), "10.200.7.7");
    assert_eq!(a(&mut names, "mine"), "10.200.9.9");
    assert_eq!(
        names.conflicts(&other.key),
        [
            "spec.dns.aliases[0]: poll is an alias of default/vote, which asked for it first",
            "spec.dns.aliases[1]: vote is the name of the service default/vote",
        ]
    );
    let vote = ServiceKey::new("default", "vote");
    assert_eq!(names.set(&vote, None), BTreeSet::from([other.key.clone()]));
    assert_eq!(names.conflicts(&other.key), Vec::<String>::new());
    assert_eq!(a(&mut names, "poll"), "10.200.9.9");
    assert_eq!(a(&mut names, "vote"), "10.200.9.9");
    other.dns.aliases.clear();
    put(&mut names, &other, &[], vip("10.200.9.9"));
    assert!(a(&mut names, "poll").starts_with("NXDomain"));
    names.set(&other.key, None);
    names.set(&ServiceKey::new("default", "db"), None);
    let table = published(&mut names);
    assert!(told(&ask(&table, "default.mesh.internal.", RecordType::A)).starts_with("NXDomain"));
    assert!(table.is_empty());
    assert!(ask_as(&table, None, "11.1.244.10.in-addr.arpa.", RecordType::PTR).is_none());
}

#[test]
fn an_alias_does_not_speak_for_a_service_that_can_not_be_read() {
    let mut names = some();
    let of = |names: &mut Names| told(&ask(&published(names), "poll.default.mesh.internal.", RecordType::A));
    assert_eq!(of(&mut names), "10.200.7.7");
    names.set_unknown(Unknown::new(
        &Unread::default(),
        &BTreeSet::from([ServiceKey::new("default", "poll")]),
        &BTreeSet::new(),
    ));
    assert_eq!(of(&mut names), "ServFail");
}

#[test]
fn short_names_are_for_pods_that_are_known() {
    let mut names = some();
    let mut far = service("vote");
    far.key = ServiceKey::new("shop", "vote");
    let mut ends = slice("vote", vec![endpoint("10.244.3.1", "n1"), endpoint("192.168.50.1", "n1")]);
    Arc::make_mut(&mut ends).key = ServiceKey::new("shop", "vote-4");
    put(&mut names, &far, &[ends], vip("10.200.8.8"));
    put(
        &mut names,
        &service("host"),
        &[slice("host", vec![endpoint("192.168.50.1", "n1")])],
        vip("10.200.8.9"),
    );
    let table = published(&mut names);
    let a = |client: &str, name: &str| {
        ask_as(&table, Some(client), name, RecordType::A).map_or("not ours".into(), |a| told(&a))
    };
    assert_eq!(a("10.244.1.11", "vote."), "10.200.7.7");
    assert_eq!(a("10.244.3.1", "VOTE."), "10.200.8.8");
    assert_eq!(a("10.244.2.33", "poll."), "10.200.7.7", "a pod that is not ready has names too");
    assert_eq!(a("10.244.1.11", "tasks.vote."), "10.244.1.11 10.244.2.21");
    assert_eq!(a("10.244.1.11", "db-0.db."), "10.244.1.31");
    assert_eq!(a("10.244.1.11", "nothing."), "not ours");
    assert_eq!(a("10.244.1.11", "com.vote."), "not ours");
    assert_eq!(a("10.244.9.9", "vote."), "not ours");
    assert_eq!(a("192.168.50.1", "vote."), "not ours", "an address in two namespaces tells nothing");
}

#[test]
fn a_service_hides_neither_a_zone_of_the_world_nor_localhost() {
    let mut names = some();
    for name in ["com", "localhost"] {
        put(&mut names, &service(name), &[], vip("10.200.8.10"));
    }
    let table = published(&mut names);
    let of = |name: &str, kind| {
        ask_as(&table, Some("10.244.1.11"), name, kind).map_or("not ours".into(), |a| told(&a))
    };
    use RecordType as T;
    for kind in [T::DS, T::DNSKEY, T::NS, T::SOA] {
        assert_eq!(of("com.", kind), "not ours", "{kind}");
    }
    assert_eq!(of("com.", T::A), "10.200.8.10");
    assert_eq!(of("com.", T::MX), "SOA com. 5");
    assert_eq!(of("db-0.db.", T::AAAA), "SOA db-0.db. 5");
    for name in ["localhost.", "tasks.localhost."] {
        assert_eq!(of(name, T::A), "not ours", "{name}");
    }
    assert_eq!(of("localhost.default.mesh.internal.", T::A), "10.200.8.10");
}

/// So many services with two endpoints each.
pub(super) fn crowd(n: u32) -> Names {
    let mut names = Names::new(zone());
    for i in 0..n {
        change(&mut names, i, 0);
    }
    names
}

/// Service number `i` with endpoints of its own.
pub(super) fn change(names: &mut Names, i: u32, turn: u8) {
    let name = format!("s{i}");
    let ip = |k: u8| format!("10.{}.{}.{}", 100 + turn % 2, i / 125, i % 125 * 2 + u32::from(k));
    let ends = vec![endpoint(&ip(0), "n1"), endpoint(&ip(1), "n2")];
    let [a, b] = (i as u16).to_be_bytes();
    put(names, &service(&name), &[slice(&name, ends)], vip(&format!("10.200.{a}.{b}")));
}

#[test]
fn a_change_leaves_the_rest_alone() {
    let mut names = crowd(2000);
    let before = published(&mut names);
    change(&mut names, 7, 1);
    let after = published(&mut names);
    // Its name; two addresses that went and two that came.
    assert!(before.names.unshared(&after.names) <= 1);
    assert!(before.addresses.unshared(&after.addresses) <= 4);
    assert_eq!(
        told(&ask(&before, "tasks.s7.default.mesh.internal.", RecordType::A)),
        "10.100.0.14 10.100.0.15"
    );
    assert_eq!(
        told(&ask(&after, "tasks.s7.default.mesh.internal.", RecordType::A)),
        "10.101.0.14 10.101.0.15"
    );
}

/// Figures: `cargo test --release --lib dns::tests::what_it_costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_it_costs() {
    use std::time::Instant;
    let memory = || {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find(|l| l.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let empty = memory();
    let begun = Instant::now();
    let mut names = crowd(10_000);
    let mut table = published(&mut names);
    println!("10,000 services: {:?}, {} KiB", begun.elapsed(), memory() - empty);
    let mut times: Vec<_> = (0..10_000_u32)
        .map(|i| {
            let begun = Instant::now();
            change(&mut names, i * 7919 % 10_000, (i % 2) as u8 + 1);
            table = published(&mut names);
            begun.elapsed()
        })
        .collect();
    times.sort();
    println!("one change: median {:?}, p99 {:?}", times[5_000], times[9_900]);
    let question = Name::from_ascii("s77.default.mesh.internal.").unwrap();
    let begun = Instant::now();
    for _ in 0..1_000_000 {
        std::hint::black_box(table.answer(&question, RecordType::A, None));
    }
    println!("one answer: {:?}", begun.elapsed() / 1_000_000);
}
