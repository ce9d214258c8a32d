//! What a fuzzer feeds (`fuzz/`), and unit tests with random bytes: packets of clients, and answers of upstreams. Whatever they
//! are, nothing panics, and what is answered is a message that keeps its limits.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use hickory_net::NetError;
use hickory_proto::{
    op::{DnsResponse, Message, Query},
    rr::{Name, RecordType},
};

use super::{
    answer::Answer,
    cache::Cache,
    handler::{Action, Elsewhere, Handler, Shared, Transport},
    limit::{Allowed, Rate},
    message::LARGEST_UDP,
    names::Names,
    pool::told,
    records::{Context, ServiceNames},
    zone::Zone,
};
use crate::{
    compile::endpoints::Place,
    metrics::DnsMetrics,
    model::{
        endpoints::{Endpoint, Slice, SlicePort},
        ids::{Family, PerFamily, Protocol, ServiceKey},
        service::{
            Dns, FamilyPolicy, Mode, Scheduler, Service, ServicePort, TargetPort, TrafficDistribution,
            TrafficPolicy,
        },
    },
};

/// Someone else answers for everything.
struct Others;

impl Elsewhere for Others {
    fn covers(&self, _: &Name) -> bool {
        true
    }
    fn is_loop(&self, _: &Name, _: IpAddr) -> bool {
        false
    }
}

static HANDLER: LazyLock<Option<Handler<Others>>> = LazyLock::new(handler);

/// One that knows a service in mode DNSRR with more endpoints than a datagram holds.
fn handler() -> Option<Handler<Others>> {
    let key = ServiceKey::new("default", "vote");
    let port = |name: &str| ServicePort {
        name: Some(name.into()),
        protocol: Protocol::Tcp,
        port: 80,
        end_port: None,
        target: TargetPort::Number(8080),
        publish: None,
    };
    let service = Service {
        key: key.clone(),
        mode: Mode::Dnsrr,
        service_name: "vote".into(),
        vips: vec![],
        families: vec![Family::V4],
        family_policy: FamilyPolicy::SingleStack,
        weights: [].into(),
        ports: vec![port("http")],
        scheduler: Scheduler::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        distribution: TrafficDistribution::Any,
        drain: Duration::from_secs(30),
        publish_not_ready: false,
        dns: Dns { aliases: vec!["poll".into()], ..Dns::default() },
        created: 0,
        granted: None,
    };
    let endpoint = |i: u8| Endpoint {
        address: [10, 244, 1, i].into(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some("n1".into()),
        zone: None,
        hints: None,
        target: None,
        hostname: None,
    };
    let slice = Slice {
        key: key.clone(),
        service_name: "vote".into(),
        family: Family::V4,
        ports: vec![SlicePort { name: Some("http".into()), protocol: Protocol::Tcp, port: Some(8080) }],
        endpoints: (0..200).map(endpoint).collect(),
    };
    let ranges = PerFamily { v4: "10.200.0.0/16".parse().ok(), v6: "fd00:200::/112".parse().ok() };
    let mut names = Names::new(Zone::new("mesh.internal", ranges).ok()?);
    let context = Context { place: Place { node: "n1", zone: None }, vips: PerFamily::default() };
    names.set(&key, Some(ServiceNames::new(&service, &[Arc::new(slice)], context, None)));
    Some(Handler {
        shared: Arc::new(Shared {
            table: ArcSwap::new(names.publish(true)),
            node: ArcSwap::from_pointee(BTreeSet::new()),
            pods: ArcSwapOption::from_pointee(Allowed::default()),
        }),
        elsewhere: Some(Arc::new(Others)),
        allowed: Allowed::new("10.0.0.0/8".parse().into_iter().collect()),
        rate: Rate::new(0),
        metrics: DnsMetrics::default(),
        patient_until: Instant::now(),
        remembered: [].into(),
    })
}

/// A pod.
fn client() -> SocketAddr {
    ([10, 244, 1, 11], 4000).into()
}

/// Handles a packet of a client, by both transports.
pub fn packet(bytes: &[u8]) {
    let Some(handler) = &*HANDLER else { return };
    for (transport, limit) in [(Transport::Udp, LARGEST_UDP), (Transport::Tcp, u16::MAX)] {
        match handler.handle(bytes, client(), transport) {
            Action::Reply(reply) => check(&reply, limit),
            Action::Forward(asked) => {
                if let Action::Reply(reply) = handler.forwarded(asked, &Answer::default()) {
                    check(&reply, limit);
                }
            }
            Action::Ignore | Action::Later(_) => {}
        }
    }
}

/// Takes in what an upstream says, and gives it to a client as it came and as it was kept.
pub fn upstream(bytes: &[u8]) {
    let Some(handler) = &*HANDLER else { return };
    let answer = DnsResponse::from_buffer(bytes.to_vec()).map_err(NetError::from);
    let question = answer.as_ref().ok().and_then(|answer| answer.queries.first().cloned());
    let Ok(answer) = told(answer) else { return };
    let name = Name::from_ascii("www.example.").unwrap_or_default();
    let query = question.unwrap_or_else(|| Query::query(name, RecordType::A));
    let cache = Cache::new(10, Name::root());
    cache.put(query.clone(), &answer, Instant::now());
    let kept = cache.get(&query, Instant::now());
    let mut request = Message::query();
    request.metadata.recursion_desired = true;
    request.add_query(query);
    let Ok(request) = request.to_vec() else { return };
    for answer in kept.iter().chain([&answer]) {
        for (transport, limit) in [(Transport::Udp, LARGEST_UDP), (Transport::Tcp, u16::MAX)] {
            if let Action::Forward(asked) = handler.handle(&request, client(), transport)
                && let Action::Reply(reply) = handler.forwarded(asked, answer)
            {
                check(&reply, limit);
            }
        }
    }
}

fn check(reply: &[u8], limit: u16) {
    assert!(reply.len() <= limit.into(), "{} bytes", reply.len());
    let read = Message::from_vec(reply);
    assert!(read.is_ok(), "{read:?}: {reply:?}");
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::MessageType,
        rr::{RData, Record, rdata::A},
    };
    use proptest::prelude::*;

    use super::*;

    fn question() -> Message {
        let mut question = Message::query();
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(
            Name::from_ascii("tasks.vote.default.mesh.internal.").unwrap(),
            RecordType::A,
        ));
        question
    }

    #[test]
    fn a_question_is_answered_and_an_answer_is_taken_in() {
        assert!(HANDLER.is_some());
        packet(&question().to_vec().unwrap());
        let mut answer = question();
        answer.metadata.message_type = MessageType::Response;
        let name = Name::from_ascii("www.example.").unwrap();
        answer.add_answer(Record::from_rdata(name, 60, RData::A(A([192, 0, 2, 1].into()))));
        upstream(&answer.to_vec().unwrap());
    }

    proptest! {
        #[test]
        fn no_byte_makes_it_panic(
            at in 0_usize..200,
            byte in any::<u8>(),
            tail in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut bytes = question().to_vec().unwrap();
            bytes.extend(tail);
            let n = bytes.len();
            bytes[at % n] = byte;
            packet(&bytes);
            upstream(&bytes);
            bytes[2] |= 0x80;
            upstream(&bytes);
        }
    }
}
