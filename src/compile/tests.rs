//! What a service compiles to.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};

use super::{
    Assigned, CompiledService, Inputs, RealState, compile_service,
    service::{Drains, Kept},
};
use crate::model::{
    endpoints::{Endpoint, Slice},
    fixtures::{config, endpoint, facts, port, published, service, slice},
    ids::{Family, Mark, PerFamily, PortId, Protocol, Scope},
    kernel::{
        Element, RealServerConfig, RealServerKey, Target, VirtualServer, VirtualServerConfig,
        VirtualServerKey,
    },
    service::{Mode, PublishMode, Service, ServicePort, TargetPort, TrafficPolicy},
};

const MARK: Mark = Mark(0x100);
const OTHER: Mark = Mark(0x101);

fn assigned(service: &Service) -> Assigned {
    let split = service.internal_policy != service.external_policy;
    let mut out = Assigned::default();
    if service.mode == Mode::Vip {
        out.vips = PerFamily { v4: Some("10.200.0.5".parse().unwrap()), v6: None };
        if service.families.contains(&Family::V6) {
            out.vips.v6 = Some("fd00:200::5".parse().unwrap());
        }
    }
    for p in &service.ports {
        let host = p.publish.as_ref().is_some_and(|p| p.mode == PublishMode::Host);
        out.marks.insert((p.id(), Scope::Vip), MARK);
        if p.publish.is_some() {
            out.published.insert(p.id(), 30080);
            out.marks.insert((p.id(), Scope::Ingress), if split || host { OTHER } else { MARK });
        }
    }
    out
}

struct Case {
    service: Service,
    slices: Vec<std::sync::Arc<Slice>>,
    present: HashMap<VirtualServerKey, VirtualServer>,
    drains: Drains,
    kept: Kept,
    blocked: BTreeSet<(Protocol, u16)>,
    now: Timestamp,
}

impl Case {
    fn new(service: Service, endpoints: Vec<Endpoint>) -> Self {
        let slices = vec![slice(&service.key.name, endpoints)];
        Self {
            service,
            slices,
            present: HashMap::new(),
            drains: Drains::new(),
            kept: Kept::new(),
            blocked: BTreeSet::new(),
            now: Timestamp::from_second(1_800_000_000).unwrap(),
        }
    }

    fn compile(&self) -> CompiledService {
        let (config, facts) = (config(), facts());
        let inputs = Inputs {
            config: &config,
            facts: &facts,
            present: &self.present,
            drains: &self.drains,
            kept: &self.kept,
            blocked: &|protocol, port| self.blocked.contains(&(protocol, port)),
            now: self.now,
        };
        compile_service(&self.service, &self.slices, &assigned(&self.service), &inputs)
    }
}

fn v4(mark: Mark) -> VirtualServerKey {
    VirtualServerKey { family: Family::V4, mark }
}

fn reals(compiled: &CompiledService, key: VirtualServerKey) -> BTreeMap<String, u32> {
    compiled.virtual_servers[&key].reals.iter().map(|(r, c)| (r.to_string(), c.weight)).collect()
}

fn target(addr: &str, port: u16) -> Target {
    Target { addr: addr.parse().unwrap(), protocol: Protocol::Tcp, port }
}

fn vote(port: crate::model::service::ServicePort) -> Service {
    Service { ports: vec![port], ..service("vote") }
}

fn three() -> Vec<Endpoint> {
    vec![endpoint("10.244.1.11", "n1"), endpoint("10.244.2.11", "n2"), endpoint("10.244.3.11", "n3")]
}

#[test]
fn a_published_port_leads_to_the_same_mark_as_the_vip() {
    let out = Case::new(vote(published(80, 8080, None)), three()).compile();
    assert_eq!(
        reals(&out, v4(MARK)),
        [("10.244.1.11:8080".into(), 1), ("10.244.2.11:8080".into(), 1), ("10.244.3.11:8080".into(), 1)]
            .into()
    );
    let entries: Vec<_> = out.elements.iter().map(|(e, m)| (e.to_string(), m.unwrap())).collect();
    assert_eq!(
        entries,
        [
            ("vips 10.200.0.1,tcp:30080".to_owned(), MARK),
            ("vips 10.200.0.5,tcp:80".to_owned(), MARK),
            ("published 192.168.50.1,tcp:30080".to_owned(), MARK),
            ("loopback IPv4,tcp:30080".to_owned(), MARK),
        ]
    );
    assert!(out.shared.contains(&Element::Local("10.244.1.11".parse().unwrap())));
    assert!(!out.shared.contains(&Element::Local("10.244.2.11".parse().unwrap())));
    assert!(out.shared.contains(&Element::Endpoint("10.244.2.11".parse().unwrap())));
    assert_eq!(out.endpoints, (3, 3));
}

#[test]
fn local_for_published_ports_alone_splits_the_scopes_and_fails_closed() {
    let service = Service { external_policy: TrafficPolicy::Local, ..vote(published(80, 8080, None)) };
    let out = Case::new(service.clone(), three()).compile();
    assert_eq!(reals(&out, v4(MARK)).len(), 3);
    assert_eq!(reals(&out, v4(OTHER)), [("10.244.1.11:8080".into(), 1)].into());

    // Without an endpoint here the entries stay: that is refused by the guard, not passed on.
    let out = Case::new(service, vec![endpoint("10.244.2.11", "n2")]).compile();
    assert!(!out.virtual_servers.contains_key(&v4(OTHER)));
    assert_eq!(out.elements[&Element::Published(target("192.168.50.1", 30080))], Some(Mark::NOWHERE));
    assert_eq!(out.elements[&Element::Loopback(Family::V4, Protocol::Tcp, 30080)], Some(Mark::NOWHERE));
}

#[test]
fn host_mode_answers_only_where_an_endpoint_is() {
    let mut p = published(80, 8080, None);
    p.publish.as_mut().unwrap().mode = PublishMode::Host;
    let here = Case::new(vote(p.clone()), three()).compile();
    assert_eq!(reals(&here, v4(OTHER)), [("10.244.1.11:8080".into(), 1)].into());
    let elsewhere = Case::new(vote(p), vec![endpoint("10.244.2.11", "n2")]).compile();
    assert!(!elsewhere.virtual_servers.contains_key(&v4(OTHER)));
    assert!(elsewhere.ports[0].not_published.is_some());
    assert!(elsewhere.elements.keys().all(|e| !matches!(e, Element::Published(_))));
}

#[test]
fn an_endpoint_that_is_not_ready_gets_nothing_and_a_terminating_one_only_when_it_is_the_last() {
    let mut endpoints = three();
    endpoints[0].ready = false;
    endpoints[0].serving = false;
    endpoints[1].ready = false;
    endpoints[1].terminating = true;
    let out = Case::new(vote(port(80, 8080)), endpoints.clone()).compile();
    assert_eq!(reals(&out, v4(MARK)), [("10.244.3.11:8080".into(), 1)].into());
    endpoints.pop();
    let out = Case::new(vote(port(80, 8080)), endpoints).compile();
    assert_eq!(reals(&out, v4(MARK)), [("10.244.2.11:8080".into(), 1)].into());
    assert_eq!(out.endpoints, (0, 2));
}

fn with_present(case: &mut Case, addr: &str) -> RealServerKey {
    let real = RealServerKey { addr: addr.parse().unwrap(), port: 8080 };
    let config = VirtualServerConfig { scheduler: "rr".into(), flags: 0 };
    let none = VirtualServer { config, protocol: Some(Protocol::Tcp), reals: Arc::default() };
    let server = case.compile().virtual_servers.get(&v4(MARK)).cloned().unwrap_or(none);
    let server = case.present.entry(v4(MARK)).or_insert(server);
    Arc::make_mut(&mut server.reals).insert(real, RealServerConfig { weight: 1 });
    real
}

#[test]
fn a_removed_tcp_endpoint_drains_until_its_deadline_which_does_not_move() {
    let mut case = Case::new(vote(port(80, 8080)), three());
    let gone = with_present(&mut case, "10.244.9.9");
    let out = case.compile();
    assert_eq!(out.virtual_servers[&v4(MARK)].reals[&gone].weight, 0);
    let until = case.now + SignedDuration::from_secs(30);
    assert_eq!(out.reals[&(v4(MARK), gone)].state, RealState::Draining(until));

    case.drains = out.drains().collect();
    case.now += SignedDuration::from_secs(10);
    let again = case.compile();
    assert_eq!(again.reals[&(v4(MARK), gone)].state, RealState::Draining(until));

    case.now = until;
    assert!(!case.compile().virtual_servers[&v4(MARK)].reals.contains_key(&gone));
}

#[test]
fn a_draining_endpoint_that_comes_back_takes_connections_again() {
    let mut case = Case::new(vote(port(80, 8080)), three());
    let real = with_present(&mut case, "10.244.1.11");
    case.drains.insert((v4(MARK), real), case.now + SignedDuration::from_secs(5));
    let out = case.compile();
    assert_eq!(out.virtual_servers[&v4(MARK)].reals[&real].weight, 1);
    assert_eq!(out.drains().count(), 0);
}

#[test]
fn a_removed_udp_endpoint_goes_at_once() {
    let mut p = port(53, 8080);
    p.protocol = Protocol::Udp;
    let mut case = Case::new(vote(p), three());
    let gone = with_present(&mut case, "10.244.9.9");
    assert!(!case.compile().virtual_servers[&v4(MARK)].reals.contains_key(&gone));
}

#[test]
fn target_ports_by_name_by_the_only_port_and_by_number() {
    let mut p = port(80, 0);
    p.target = TargetPort::Name("web".into());
    let mut case = Case::new(vote(p), three());
    assert!(case.compile().virtual_servers.is_empty());
    let mut named = (*case.slices[0]).clone();
    named.ports[0].name = Some("web".into());
    named.ports[0].port = Some(9000);
    case.slices = vec![named.into()];
    assert!(reals(&case.compile(), v4(MARK)).contains_key("10.244.1.11:9000"));
    case.service.ports[0].target = TargetPort::Inferred;
    assert!(reals(&case.compile(), v4(MARK)).contains_key("10.244.1.11:9000"), "the slice's only TCP port");
}

#[test]
fn nothing_leads_to_ipvs_while_nobody_takes_connections() {
    let vips = |out: &CompiledService| out.elements.keys().filter(|e| matches!(e, Element::Vip(_))).count();
    let mut case = Case::new(vote(published(80, 8080, None)), three());
    assert_eq!(vips(&case.compile()), 2, "VIP and ingress address");
    // All that is left drains: what it has goes on, what is new is refused by the guard.
    case.slices.clear();
    with_present(&mut case, "10.244.1.11");
    let out = case.compile();
    assert_eq!(vips(&out), 0);
    assert_eq!(out.virtual_servers[&v4(MARK)].reals.len(), 1);
    // Published ports are still ours, so that no socket of the host answers on them.
    let published = |out: &CompiledService| {
        out.elements
            .iter()
            .filter(|(e, _)| !matches!(e, Element::Vip(_)))
            .map(|(_, mark)| *mark)
            .collect::<Vec<_>>()
    };
    assert_eq!(published(&out), [Some(Mark::NOWHERE); 2]);
    case.present.clear();
    let out = case.compile();
    assert_eq!(vips(&out), 0);
    assert_eq!(published(&out), [Some(Mark::NOWHERE); 2]);
    assert!(out.virtual_servers.is_empty());
    let udp = Case::new(
        vote(ServicePort { protocol: Protocol::Udp, ..crate::model::fixtures::published(80, 8080, None) }),
        Vec::new(),
    )
    .compile();
    assert_eq!(published(&udp), [Some(MARK); 2]);
    assert!(udp.virtual_servers.is_empty());
    // And a service that is not published leaves nothing.
    let mut case = Case::new(vote(port(80, 8080)), Vec::new());
    case.slices.clear();
    assert!(case.compile().virtual_servers.is_empty() && case.compile().elements.is_empty());
}

#[test]
fn a_range_keeps_the_port_that_the_client_asked_for() {
    let mut p = published(7000, 0, Some(7000));
    p.end_port = Some(7002);
    p.target = TargetPort::Inferred;
    let case = Case::new(vote(p), three());
    let out = case.compile();
    assert!(reals(&out, v4(MARK)).contains_key("10.244.1.11:0"));
    let vips = out.elements.keys().filter(|e| e.to_string().starts_with("vips 10.200.0.5")).count();
    assert_eq!(vips, 3);
}

#[test]
fn dnsrr_publishes_without_a_vip() {
    let service = Service { mode: Mode::Dnsrr, ..vote(published(80, 8080, None)) };
    let out = Case::new(service, three()).compile();
    assert!(out.vips.is_empty());
    let vips: Vec<_> =
        out.elements.keys().filter(|e| matches!(e, Element::Vip(_))).map(ToString::to_string).collect();
    assert_eq!(vips, ["vips 10.200.0.1,tcp:30080"]);
}

#[test]
fn both_families_have_a_virtual_server_each_with_the_same_mark() {
    let service = Service { families: vec![Family::V4, Family::V6], ..vote(published(80, 8080, None)) };
    let mut case = Case::new(service, three());
    case.slices.push(slice("vote", vec![endpoint("fd00:244:1::11", "n1")]));
    let out = case.compile();
    let v6 = VirtualServerKey { family: Family::V6, mark: MARK };
    assert_eq!(reals(&out, v6), [("[fd00:244:1::11]:8080".into(), 1)].into());
    assert_eq!(out.elements[&Element::Vip(target("fd00:200::1", 30080))], Some(MARK));
    assert_eq!(out.elements[&Element::Published(target("fd00:50::1", 30080))], Some(MARK));
}

#[test]
fn a_host_network_endpoint_of_this_node_is_let_through_the_guard() {
    let out = Case::new(vote(published(80, 8080, None)), vec![endpoint("192.168.50.1", "n1")]).compile();
    assert!(out.shared.contains(&Element::Own(target("192.168.50.1", 8080))));
}

#[test]
fn a_port_held_by_a_host_socket_is_not_published_here_and_the_vip_stays() {
    let mut case = Case::new(vote(published(80, 8080, None)), three());
    case.blocked.insert((Protocol::Tcp, 30080));
    let out = case.compile();
    assert!(out.ports[0].not_published.as_deref().unwrap().contains("30080"));
    let entries: Vec<_> = out.elements.keys().map(ToString::to_string).collect();
    assert_eq!(entries, ["vips 10.200.0.5,tcp:80"]);
}

#[test]
fn weights_go_by_target_name() {
    let mut endpoints = three();
    endpoints[0].target = Some("vote-a".into());
    let mut service = vote(port(80, 8080));
    service.weights.insert("vote-a".into(), 3);
    let out = Case::new(service, endpoints).compile();
    assert_eq!(reals(&out, v4(MARK))["10.244.1.11:8080"], 3);
    assert_eq!(reals(&out, v4(MARK))["10.244.2.11:8080"], 1);
    let id = PortId { port: 80, protocol: Protocol::Tcp };
    assert_eq!(out.ports[0].spec.id(), id);
}
