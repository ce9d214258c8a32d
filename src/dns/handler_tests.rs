//! Packets in, packets out.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, CNAME, NS, opt::EdnsOption},
    },
};
use ipnet::IpNet;
use proptest::prelude::*;

use super::{
    answer::Answer,
    handler::{Action, Elsewhere, Handler, Shared, Transport},
    limit::{Allowed, PRIVATE, Rate},
    message::{self, Packet},
    names::Names,
    quick,
    tests::{dnsrr, put, some},
    unknown::Unknown,
    zone::{is_localhost, is_loopback},
};
use crate::{
    metrics::DnsMetrics,
    model::{
        fixtures::{endpoint, service, slice},
        ids::{PerFamily, ServiceKey},
        unread::Unread,
    },
};

struct Others;

impl Elsewhere for Others {
    fn covers(&self, name: &Name) -> bool {
        // Single labels are the root zone's.
        name.to_ascii().ends_with("example.")
            || name.iter().count() == 1
            || name.to_ascii().ends_with("db.")
            || is_localhost(name)
            || is_loopback(name)
    }
    fn is_loop(&self, name: &Name, _: std::net::IpAddr) -> bool {
        name.to_ascii().starts_with("echo.")
    }
}

fn handler(mut names: Names, rate: u32) -> Handler<Others> {
    let many = (1..=300_u16).map(|i| endpoint(&format!("10.245.{}.{}", i / 256, i % 256), "n1")).collect();
    put(&mut names, &dnsrr("many"), &[slice("many", many)], PerFamily::default());
    let both = PerFamily { v4: "10.200.7.8".parse().ok(), v6: "fd00:200::8".parse().ok() };
    put(&mut names, &service("both"), &[], both);
    let private: Vec<IpNet> = PRIVATE.iter().map(|r| r.parse().unwrap()).collect();
    let shared = Shared {
        table: ArcSwap::new(names.publish(true)),
        node: ArcSwap::from_pointee(BTreeSet::from(["203.0.113.1".parse().unwrap()])),
        pods: ArcSwapOption::from_pointee(Allowed::default()),
    };
    Handler {
        shared: Arc::new(shared),
        elsewhere: Some(Arc::new(Others)),
        allowed: Allowed::new(private),
        rate: Rate::new(rate),
        metrics: DnsMetrics::default(),
        patient_until: Instant::now(),
        remembered: [b"db".to_vec()].into(),
    }
}

fn from(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn request(name: &str, kind: RecordType) -> Message {
    let mut request = Message::query();
    request.metadata.recursion_desired = true;
    request.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    request
}

fn send(handler: &Handler<Others>, request: &Message, client: &str, how: Transport) -> Action {
    handler.handle(&request.to_vec().unwrap(), from(client), how)
}

fn reply(action: Action) -> (Message, Vec<u8>) {
    match action {
        Action::Reply(bytes) => (Message::from_vec(&bytes).unwrap(), bytes),
        other => panic!("{other:?}"),
    }
}

fn ask(handler: &Handler<Others>, request: &Message) -> Message {
    let (answer, _) = reply(send(handler, request, "10.244.1.11:4000", Transport::Udp));
    assert_eq!(answer.metadata.id, request.metadata.id);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    answer
}

const VOTE: &str = "vote.default.mesh.internal.";

#[test]
fn the_question_is_repeated_letter_by_letter() {
    let handler = handler(some(), 0);
    let odd = "vOtE.deFAUlt.Mesh.INTERNAL.";
    let answer = ask(&handler, &request(odd, RecordType::A));
    assert_eq!(answer.queries[0].name().to_ascii(), odd);
    assert_eq!(answer.answers[0].name.to_ascii(), odd);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert!(answer.metadata.recursion_desired && !answer.metadata.authentic_data);
}

#[test]
fn of_a_question_no_more_is_kept_than_is_needed() {
    let mut much = request(VOTE, RecordType::A);
    let record = || Record::from_rdata(Name::root(), 0, RData::CNAME(CNAME(Name::root())));
    much.add_answers((0..9).map(|_| record())).add_additionals((0..9).map(|_| record()));
    much.add_authorities((0..9).map(|_| record()));
    let mut edns = Edns::new();
    edns.set_max_payload(1000).options_mut().insert(EdnsOption::Unknown(65_001, vec![7; 2000]));
    much.set_edns(edns);
    let bytes = much.to_vec().unwrap();
    assert!(bytes.len() > 2300);
    let Packet::Question(kept, query) = message::read(&bytes) else { panic!("it is one") };
    assert!(kept.to_vec().unwrap().len() <= 12 + 11);
    assert_eq!(kept.edns.unwrap().max_payload(), 1000);
    assert_eq!(query, much.queries[0]);
}

#[test]
fn what_is_refused_and_how() {
    let handler = handler(some(), 0);
    let code = |request: &Message| ask(&handler, request).metadata.response_code;
    assert_eq!(code(&request("www.elsewhere.", RecordType::A)), ResponseCode::Refused);
    assert_eq!(code(&request("echo.example.", RecordType::A)), ResponseCode::Refused);
    assert_eq!(code(&request("x.elsewhere.", RecordType::ANY)), ResponseCode::Refused);
    assert_eq!(code(&request("echo.example.", RecordType::ANY)), ResponseCode::Refused);
    assert_eq!(code(&request("mesh.internal.", RecordType::AXFR)), ResponseCode::Refused);
    let mut chaos = request("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&chaos), ResponseCode::Refused);
    let mut update = request(VOTE, RecordType::A);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(code(&update), ResponseCode::NotImp);
    // Of other operations not even that they have a question is known.
    for (op_code, code) in [(OpCode::Status, ResponseCode::NotImp), (OpCode::Query, ResponseCode::FormErr)] {
        let mut none = request(VOTE, RecordType::A);
        none.queries.clear();
        none.metadata.op_code = op_code;
        assert_eq!(ask(&handler, &none).metadata.response_code, code, "{op_code:?}");
    }
    let mut future = request(VOTE, RecordType::A);
    future.set_edns(Edns::new()).edns.as_mut().unwrap().set_version(1);
    let answer = ask(&handler, &future);
    // 16 is BADSIG as well, and is read as that.
    assert_eq!(u16::from(answer.metadata.response_code), u16::from(ResponseCode::BADVERS));
    assert_eq!(answer.edns.unwrap().version(), 0);
    let mut only_ours = request("www.example.", RecordType::A);
    only_ours.metadata.recursion_desired = false;
    assert_eq!(code(&only_ours), ResponseCode::Refused);
    assert!(matches!(
        send(&handler, &request("www.example.", RecordType::A), "10.0.0.1:4000", Transport::Udp),
        Action::Forward(_)
    ));
    // Our zone is never asked elsewhere, whatever it has.
    for name in ["nothing.default.mesh.internal.", "x.y.z.mesh.internal.", "mesh.internal."] {
        for kind in [RecordType::A, RecordType::DS, RecordType::HTTPS] {
            ask(&handler, &request(name, kind));
        }
    }
    let two = {
        let mut two = request(VOTE, RecordType::A);
        two.add_query(two.queries[0].clone());
        two
    };
    let answer = ask(&handler, &two);
    assert_eq!((answer.metadata.response_code, answer.queries.len()), (ResponseCode::FormErr, 0));
}

#[test]
fn all_types_are_one_record_of_others_too() {
    let handler = handler(some(), 0);
    for (name, ours) in [("x.example.", false), (VOTE, true)] {
        let answer = ask(&handler, &request(name, RecordType::ANY));
        let records: Vec<_> =
            answer.answers.iter().map(|r| format!("{} {}", r.record_type(), r.data)).collect();
        assert_eq!(records, ["HINFO RFC8482 "], "{name}");
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert_eq!(answer.metadata.authoritative, ours, "{name}");
    }
}

#[test]
fn who_is_not_allowed_gets_a_refusal_and_no_more() {
    let handler = handler(some(), 0);
    let question = request(VOTE, RecordType::A);
    let (answer, _) = reply(send(&handler, &question, "198.51.100.7:4000", Transport::Udp));
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(answer.answers.is_empty());
    let (own, _) = reply(send(&handler, &question, "203.0.113.1:4000", Transport::Udp));
    assert_eq!(own.metadata.response_code, ResponseCode::NoError);
    assert!(matches!(send(&handler, &question, "10.0.0.1:0", Transport::Udp), Action::Ignore));
    let mut answer = question.clone();
    answer.metadata.message_type = MessageType::Response;
    assert!(matches!(send(&handler, &answer, "10.0.0.1:4000", Transport::Udp), Action::Ignore));
}

#[test]
fn answers_are_cut_to_what_the_client_takes() {
    let handler = handler(some(), 0);
    let mut question = request("many.default.mesh.internal.", RecordType::A);
    let mut sizes = Vec::new();
    for payload in [None, Some(100), Some(1232), Some(4096)] {
        question.edns = payload.map(|n| {
            let mut edns = Edns::new();
            edns.set_max_payload(n);
            edns
        });
        let (answer, bytes) = reply(send(&handler, &question, "10.0.0.1:4000", Transport::Udp));
        assert!(answer.metadata.truncation);
        assert_eq!(answer.edns.is_some(), payload.is_some(), "OPT is answered with OPT, even when it is cut");
        let limit = payload.map_or(512, |n| n.clamp(512, 1232));
        assert!(
            bytes.len() <= usize::from(limit) && bytes.len() > usize::from(limit) - 40,
            "{}",
            bytes.len()
        );
        sizes.push(answer.answers.len());
    }
    assert!(sizes[0] > 20 && sizes[2] > 60, "what fits is there: {sizes:?}");
    let (answer, _) = reply(send(&handler, &question, "10.0.0.1:4000", Transport::Tcp));
    assert!(!answer.metadata.truncation);
    let mut all: Vec<_> = answer.answers.iter().map(|r| r.data.to_string()).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 300);
}

/// What need not be known is not a reason to ask again (RFC 2181, 9).
#[test]
fn an_answer_is_whole_without_those_who_could_have_given_it() {
    let handler = handler(some(), 0);
    let name = Name::from_ascii("www.example.").unwrap();
    let servers = |label: &'static str| {
        (0..20).map(move |i| {
            let server = Name::from_ascii(format!("{label}{i}.some-other-zone{i}.example.")).unwrap();
            Record::from_rdata(Name::from_ascii("example.").unwrap(), 60, RData::NS(NS(server)))
        })
    };
    let address = || Record::from_rdata(name.clone(), 60, RData::A(A([192, 0, 2, 1].into())));
    let alias = || Record::from_rdata(name.clone(), 60, RData::CNAME(CNAME(name.clone())));
    let told = |kind, answers: Vec<Record>, label: &'static str, edns: bool| {
        let mut question = request("www.example.", kind);
        question.edns = edns.then(Edns::new);
        let answer = Answer { answers, authorities: servers(label).collect(), ..Answer::default() };
        let Action::Forward(asked) = send(&handler, &question, "10.0.0.1:4000", Transport::Udp) else {
            panic!("not forwarded")
        };
        let (answer, bytes) = reply(handler.forwarded(asked, &answer));
        assert!(bytes.len() <= 512);
        (answer.metadata.truncation, answer.answers.len(), answer.authorities.len())
    };
    for edns in [false, true] {
        assert_eq!(told(RecordType::A, vec![address()], "ns", edns), (false, 1, 0));
        // Without an answer they say why, and for how long.
        let (cut, answers, some) = told(RecordType::AAAA, vec![alias()], "ns", edns);
        assert!(cut && answers == 1 && some > 0);
    }
    assert_eq!(told(RecordType::A, vec![address(); 3], "", false), (false, 3, 0));
}

/// A forged sender gets few answers that are many times as long as what they answer.
#[test]
fn what_amplifies_is_soon_told_to_come_by_tcp() {
    let handler = handler(some(), 40);
    let cut = |name: &str, how| {
        let question = request(name, RecordType::A);
        let length = question.to_vec().unwrap().len();
        let told = (0..20).filter(|_| {
            let (answer, bytes) = reply(send(&handler, &question, "10.0.0.1:4000", how));
            answer.answers.is_empty() && answer.metadata.truncation && bytes.len() <= length
        });
        told.count()
    };
    let many = "many.default.mesh.internal.";
    assert_eq!(cut(many, Transport::Udp), 16, "two for two seconds");
    assert_eq!((cut(VOTE, Transport::Udp), cut(many, Transport::Tcp)), (0, 0));
}

#[test]
fn too_fast_is_told_to_come_by_tcp_in_no_more_bytes() {
    let handler = handler(some(), 5);
    let question = request("tasks.vote.default.mesh.internal.", RecordType::A);
    let length = question.to_vec().unwrap().len();
    let mut cut = 0;
    for _ in 0..20 {
        let (answer, bytes) = reply(send(&handler, &question, "10.0.0.1:4000", Transport::Udp));
        if answer.metadata.truncation {
            cut += 1;
            assert!(answer.answers.is_empty() && bytes.len() <= length);
        }
    }
    assert_eq!(cut, 10);
    let (answer, _) = reply(send(&handler, &question, "10.0.0.1:4000", Transport::Tcp));
    assert_eq!(answer.answers.len(), 2);
    // Who may not ask either gets nothing at all any more.
    let strangers: Vec<_> =
        (0..20).map(|_| send(&handler, &question, "198.51.100.7:4000", Transport::Udp)).collect();
    assert_eq!(strangers.iter().filter(|a| matches!(a, Action::Ignore)).count(), 10);
}

#[test]
fn who_may_be_a_pod_of_the_node_is_not_refused_before_its_ranges_are_known() {
    let mut handler = handler(some(), 0);
    let question = request(VOTE, RecordType::A);
    let asks =
        |handler: &Handler<Others>, client: &str| match send(handler, &question, client, Transport::Udp) {
            Action::Ignore => "nothing".to_owned(),
            action => format!("{:?}", reply(action).0.metadata.response_code),
        };
    let (pod, other, private) = ("198.51.100.7:4000", "192.0.2.7:4000", "10.0.0.1:4000");
    handler.patient_until = Instant::now() + Duration::from_secs(20);
    handler.shared.pods.store(None);
    assert_eq!([pod, other, private].map(|from| asks(&handler, from)), ["nothing", "nothing", "NoError"]);
    handler.shared.pods.store(Some(Arc::new(Allowed::new(vec!["198.51.100.0/24".parse().unwrap()]))));
    assert_eq!([pod, other, private].map(|from| asks(&handler, from)), ["NoError", "Refused", "NoError"]);
    // A source that does not say them at all is not waited for for ever.
    handler.shared.pods.store(None);
    handler.patient_until = Instant::now();
    assert_eq!([pod, private].map(|from| asks(&handler, from)), ["Refused", "NoError"]);
}

#[test]
fn before_the_source_has_been_read_there_is_silence_and_then_an_error() {
    let mut handler = handler(some(), 0);
    handler.shared.table.store(some().publish(false));
    let question = request(VOTE, RecordType::A);
    assert_eq!(ask(&handler, &question).metadata.response_code, ResponseCode::ServFail);
    handler.patient_until = Instant::now() + Duration::from_secs(60);
    assert!(matches!(send(&handler, &question, "10.0.0.1:4000", Transport::Udp), Action::Later(_)));
    // Names that may turn out to be ours wait too; the world's don't.
    for (name, kind, later) in [
        ("vote.", RecordType::A, true),
        ("tasks.vote.", RecordType::A, true),
        ("_http._tcp.vote.", RecordType::SRV, true),
        ("11.1.244.10.in-addr.arpa.", RecordType::PTR, true),
        ("www.example.", RecordType::A, false),
        ("a.b.example.", RecordType::A, false),
    ] {
        let action = send(&handler, &request(name, kind), "10.0.0.1:4000", Transport::Udp);
        assert_eq!(matches!(action, Action::Later(_)), later, "{name}");
    }
    // When patience ends they fail: what others say of them would be taken for the truth.
    handler.patient_until = Instant::now();
    for (name, kind, code) in [
        ("vote.", RecordType::A, ResponseCode::ServFail),
        ("tasks.vote.", RecordType::A, ResponseCode::ServFail),
        ("_http._tcp.vote.", RecordType::SRV, ResponseCode::ServFail),
        ("11.1.244.10.in-addr.arpa.", RecordType::PTR, ResponseCode::ServFail),
        ("www.elsewhere.", RecordType::A, ResponseCode::Refused),
    ] {
        let answer = ask(&handler, &request(name, kind));
        assert_eq!(answer.metadata.response_code, code, "{name}");
        assert!(!answer.metadata.authoritative);
    }
    // What is not ours does not have to wait.
    let other = request("www.example.", RecordType::A);
    assert!(matches!(send(&handler, &other, "10.0.0.1:4000", Transport::Udp), Action::Forward(_)));
    handler.shared.table.store(some().publish(true));
    assert_eq!(ask(&handler, &question).metadata.response_code, ResponseCode::NoError);
}

#[test]
fn what_the_kernel_does_not_serve_yet_is_silence_and_then_an_error() {
    let mut handler = handler(some(), 0);
    let (meant, coming) = (
        [ServiceKey::new("far", "lost")].into(),
        ["new", "alias"].map(|n| ServiceKey::new("default", n)).into(),
    );
    let mut names = some();
    names.set_unknown(Unknown::new(&Unread::default(), &meant, &coming));
    handler.shared.table.store(names.publish(true));
    handler.patient_until = Instant::now() + Duration::from_secs(60);
    let by = |handler: &Handler<Others>, name: &str, kind| match send(
        handler,
        &request(name, kind),
        "10.244.1.11:4000",
        Transport::Udp,
    ) {
        Action::Later(_) => "later".into(),
        action => format!("{:?}", reply(action).0.metadata.response_code),
    };
    use RecordType as T;
    let new = [
        ("new.default.mesh.internal.", T::A),
        ("tasks.new.Default.mesh.internal.", T::A),
        ("alias.default.mesh.internal.", T::AAAA),
        ("new.", T::A),
        ("9.9.200.10.in-addr.arpa.", T::PTR),
    ];
    for (name, kind) in new {
        assert_eq!(by(&handler, name, kind), "later", "{name}");
    }
    // Of these nothing is awaited.
    for (name, want) in [
        (VOTE, "NoError"),
        ("x.far.mesh.internal.", "ServFail"),
        ("far.mesh.internal.", "ServFail"),
        // As a search list makes of a name of the world.
        ("example.com.default.mesh.internal.", "NXDomain"),
        ("other.default.mesh.internal.", "NXDomain"),
    ] {
        assert_eq!(by(&handler, name, T::A), want, "{name}");
    }
    let alias = {
        let target = RData::CNAME(CNAME(Name::from_ascii(new[0].0).unwrap()));
        Record::from_rdata(Name::from_ascii("new.example.").unwrap(), 60, target)
    };
    let action = send(&handler, &request("new.example.", T::A), "10.244.1.11:4000", Transport::Udp);
    let Action::Forward(asked) = action else { panic!("not forwarded") };
    let answer = Answer { answers: vec![alias], ..Answer::default() };
    assert!(matches!(handler.forwarded(asked, &answer), Action::Later(_)));
    handler.patient_until = Instant::now();
    for (name, kind) in new {
        assert_eq!(by(&handler, name, kind), "ServFail", "{name}");
    }
}

/// What is never ours is looked up elsewhere from the start, and what may be ours waits for who may have asked for that.
#[test]
fn before_the_source_has_been_read_only_what_may_be_ours_waits() {
    let mut handler = handler(some(), 0);
    handler.shared.table.store(some().publish(false));
    use RecordType as T;
    let (pod, node) = ("10.244.1.11:4000", "203.0.113.1:4000");
    let one = Name::from("::1".parse::<std::net::IpAddr>().unwrap()).to_ascii();
    let cases = [
        ("localhost.", T::A, pod, false),
        ("LocalHost.", T::HTTPS, pod, false),
        ("tasks.localhost.", T::A, pod, false),
        ("_http._tcp.localhost.", T::SRV, pod, false),
        ("1.0.0.127.in-addr.arpa.", T::PTR, pod, false),
        ("53.0.127.in-addr.arpa.", T::PTR, pod, false),
        (&one, T::PTR, pod, false),
        ("1.0.0.10.in-addr.arpa.", T::PTR, pod, true),
        ("1.0.0.10.in-addr.arpa.", T::PTR, node, true),
        ("vote.", T::A, pod, true),
        ("vote.", T::A, node, false),
        ("vote.", T::MX, pod, true),
        ("com.", T::DS, pod, false),
        ("com.", T::DNSKEY, pod, false),
        ("com.", T::NS, pod, false),
        ("com.", T::SOA, pod, false),
        ("tasks.example.", T::A, pod, true),
        ("tasks.example.", T::DS, pod, true),
        ("tasks.example.", T::A, node, false),
        ("db-0.db.", T::A, pod, true),
        ("db-0.DB.", T::AAAA, pod, true),
        ("db-0.db.", T::A, node, false),
        ("www.db-0.db.", T::A, pod, false),
        ("db.example.", T::A, pod, false),
        ("_http._tcp.example.", T::SRV, pod, true),
        ("_http._tcp.example.", T::SRV, node, false),
    ];
    for patient in [true, false] {
        let wait = Duration::from_secs(if patient { 60 } else { 0 });
        handler.patient_until = Instant::now() + wait;
        for (name, kind, client, waits) in cases {
            let action = send(&handler, &request(name, kind), client, Transport::Udp);
            match action {
                Action::Forward(_) => assert!(!waits, "{name} {kind} {client}"),
                Action::Later(_) => assert!(waits && patient, "{name} {kind} {client}"),
                other => {
                    assert_eq!(
                        reply(other).0.metadata.response_code,
                        ResponseCode::ServFail,
                        "{name} {kind}"
                    );
                    assert!(waits && !patient, "{name} {kind} {client}");
                }
            }
        }
    }
}

#[test]
fn a_forwarded_answer_is_not_ours() {
    let handler = handler(some(), 0);
    let Action::Forward(asked) =
        send(&handler, &request("www.example.", RecordType::A), "10.0.0.1:4000", Transport::Udp)
    else {
        panic!("not forwarded")
    };
    let (answer, _) = reply(handler.forwarded(asked, &Answer::code(ResponseCode::NXDomain)));
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(!answer.metadata.authoritative && answer.metadata.recursion_available);
}

/// One answer is many clients', and some look for their own letters in it.
#[test]
fn a_forwarded_answer_has_the_letters_of_its_question() {
    let handler = handler(some(), 0);
    let told = Name::from_ascii("www.example.").unwrap();
    let other = Name::from_ascii("other.example.").unwrap();
    let alias = Record::from_rdata(told, 60, RData::CNAME(CNAME(other.clone())));
    let address = Record::from_rdata(other, 60, RData::A(A([192, 0, 2, 1].into())));
    let theirs = Answer { answers: vec![alias.clone(), address], ..Answer::default() };
    let to_us = Record::from_rdata(alias.name, 60, RData::CNAME(CNAME(Name::from_ascii(VOTE).unwrap())));
    let to_us = Answer { answers: vec![to_us], ..Answer::default() };
    for (asked, answer, target) in [
        ("wWw.example.", &theirs, "other.example."),
        ("www.example.", &theirs, "other.example."),
        ("wWw.example.", &to_us, VOTE),
    ] {
        let action = send(&handler, &request(asked, RecordType::A), "10.0.0.1:4000", Transport::Udp);
        let Action::Forward(question) = action else { panic!("not forwarded") };
        let (answer, _) = reply(handler.forwarded(question, answer));
        let names: Vec<_> = answer.answers.iter().map(|record| record.name.to_ascii()).collect();
        assert_eq!(names, [asked, target]);
    }
}

/// That both ways lead to the same is to be worth something.
#[test]
fn the_commonest_questions_go_the_quick_way() {
    let handler = handler(some(), 0);
    let table = handler.shared.table.load();
    let mut question = request(VOTE, RecordType::A);
    for edns in [None, Some(Edns::new())] {
        question.edns = edns;
        for (name, goes) in
            [(VOTE, true), ("Db.default.MESH.internal.", true), ("no.default.mesh.internal.", false)]
        {
            question.queries[0].set_name(Name::from_ascii(name).unwrap());
            let bytes = question.to_vec().unwrap();
            let read = quick::Question::read(&bytes).unwrap();
            assert_eq!(read.service(&table).is_some(), goes, "{name}");
        }
    }
}

#[test]
fn an_alias_to_a_name_of_ours_is_early_or_fails_as_the_name_does() {
    let mut handler = handler(some(), 0);
    let question = request("vote.example.", RecordType::A);
    let target = RData::CNAME(CNAME(Name::from_ascii(VOTE).unwrap()));
    let alias = Record::from_rdata(question.queries[0].name().clone(), 60, target);
    let forwarded = |handler: &Handler<Others>| {
        let action = send(handler, &question, "10.244.1.11:4000", Transport::Udp);
        let Action::Forward(asked) = action else { panic!("not forwarded") };
        handler.forwarded(asked, &Answer { answers: vec![alias.clone()], ..Answer::default() })
    };
    assert_eq!(reply(forwarded(&handler)).0.answers.len(), 2);
    handler.shared.table.store(some().publish(false));
    let (answer, _) = reply(forwarded(&handler));
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::ServFail, 0));
    handler.patient_until = Instant::now() + Duration::from_secs(60);
    assert!(matches!(forwarded(&handler), Action::Later(_)));
}

/// Bytes that are almost a query.
fn nearly(base: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12).prop_map(move |changes| {
        let mut bytes = base.clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes
    })
}

fn with_edns(name: &str) -> Vec<u8> {
    let mut request = request(name, RecordType::A);
    request.set_edns(Edns::new());
    request.to_vec().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_is_too_much(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..600),
            nearly(with_edns(VOTE)),
            nearly(with_edns("_pg._tcp.db.default.mesh.internal.")),
            nearly(with_edns("7.7.200.10.in-addr.arpa.")),
            nearly(with_edns("vote.")),
        ],
        tcp: bool,
        client in prop::sample::select(vec!["10.244.1.11:99", "[::1]:5", "8.8.8.8:53", "[::ffff:10.0.0.1]:7"]),
    ) {
        thread_local! {
            static HANDLER: Handler<Others> = handler(some(), 0);
        }
        let how = if tcp { Transport::Tcp } else { Transport::Udp };
        HANDLER.with(|handler| {
            let action = handler.handle(&bytes, from(client), how);
            let action = match action {
                Action::Forward(asked) => handler.forwarded(asked, &Answer::code(ResponseCode::NXDomain)),
                other => other,
            };
            if let Action::Reply(reply) = action {
                let answer = Message::from_vec(&reply).expect("what is answered is a message");
                assert_eq!(answer.metadata.message_type, MessageType::Response);
                assert_eq!(reply[..2], bytes[..2], "with the id of its question");
                assert!(tcp || reply.len() <= 1232);
            }
        });
    }
    /// What is answered to the commonest question is what would be answered to it by way of a message.
    #[test]
    fn the_quick_way_leads_to_the_same_answer(
        bytes in prop_oneof![2 => asking(), 1 => asking().prop_flat_map(nearly)],
        tcp: bool,
        rate in prop::sample::select(vec![0, 2]),
    ) {
        let how = if tcp { Transport::Tcp } else { Transport::Udp };
        // Both by one table: its serial is the second in which it was made.
        let table = handler(some(), rate).shared.table.load_full();
        // A fast one and a slow one: each counts.
        let of = |quick: bool| {
            let handler = handler(some(), rate);
            handler.shared.table.store(table.clone());
            (0..6).map(|_| {
                let question = quick::Question::read(&bytes).filter(|_| quick);
                match handler.take(&bytes, from("10.244.1.11:99"), how, question) {
                    Action::Reply(reply) => comparable(&reply),
                    other => format!("{other:?}").split('(').next().unwrap_or_default().to_owned(),
                }
            }).collect::<Vec<_>>()
        };
        for (quick, slow) in of(true).iter().zip(of(false)) {
            prop_assert_eq!(quick, &slow);
        }
    }
}

/// Questions about names that have addresses and about others, by all kinds of clients.
fn asking() -> impl Strategy<Value = Vec<u8>> {
    let names = ["vote", "db", "many", "poll", "both", "tasks.vote", "vote.other", "nothing"];
    let zones =
        ["default.mesh.internal.", "DEFAULT.mesh.Internal.", "default.mesh.internal.example.", "default."];
    let kinds = [RecordType::A, RecordType::AAAA, RecordType::TXT];
    let edns =
        prop::option::of((any::<u16>(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2)));
    let select = |of: &[&'static str]| prop::sample::select(of.to_vec());
    let asked = (select(&names), select(&zones), prop::sample::select(kinds.to_vec()));
    (asked, edns, any::<[bool; 4]>(), any::<u16>()).prop_map(|((name, zone, kind), edns, flags, id)| {
        let mut request = request(&format!("{name}.{zone}"), kind);
        let metadata = &mut request.metadata;
        metadata.id = id;
        [metadata.recursion_desired, metadata.checking_disabled] = [flags[0], flags[1]];
        [metadata.authentic_data, metadata.authoritative] = [flags[2], flags[3]];
        request.edns = edns.map(|(payload, dnssec_ok, newer, option)| {
            let mut edns = Edns::new();
            edns.set_max_payload(payload).set_dnssec_ok(dnssec_ok).set_version(u8::from(newer));
            if option {
                edns.options_mut().insert(EdnsOption::Unknown(65_001, vec![7; 8]));
            }
            edns
        });
        request.to_vec().unwrap()
    })
}

/// An answer but for the order of its addresses. Of one that is cut, not how many it has: the library leaves one out that would fit,
/// since it writes each name as a whole before it makes it a pointer; and it makes no more than about a hundred of them pointers.
fn comparable(reply: &[u8]) -> String {
    let mut message = Message::from_vec(reply).unwrap();
    let mut records: Vec<_> = message.answers.drain(..).map(|record| record.to_string()).collect();
    records.sort();
    // As it is, whatever a library makes of it.
    let (flags, question) = (&reply[..6], &reply[12..reply.len().min(40)]);
    if message.metadata.truncation {
        return format!("{flags:?} {} {question:?} {message:?}", records.is_empty());
    }
    let length = Some(reply.len()).filter(|_| records.len() < 100);
    format!("{length:?} {flags:?} {question:?} {records:?} {message:?}")
}
