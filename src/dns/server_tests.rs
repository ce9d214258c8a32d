//! The server with real sockets, on loopback.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};

use super::{
    ask,
    forward::{ForwardConfig, ZoneForward},
    names::Names,
    server::{Config, Server},
    tests::{change, crowd, some, zone},
};
use crate::metrics::DnsMetrics;

/// An address of loopback for each test: a port that is free now may be another one's in a moment.
pub(super) fn at(test: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 53, test], 5300))
}

pub(super) fn config(listen: SocketAddr) -> Config {
    let allow = vec!["127.0.0.0/8".parse().unwrap()];
    Config {
        listen: vec![listen],
        allow,
        allow_outside: None,
        inside: vec![],
        allow_pods: false,
        rate: 0,
        forward: ForwardConfig { cache: 100, ..Default::default() },
        remembered: Default::default(),
        ports: super::ports::DEFAULT,
    }
}

pub(super) fn serve(config: &Config, names: &mut Names, metrics: &DnsMetrics) -> Server {
    let server = Server::start(config, zone(), BTreeSet::new(), metrics.clone()).unwrap();
    server.publish(names.publish(true));
    let begun = Instant::now();
    while ask::addresses(config.listen[0], "mesh.internal.", RecordType::A).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", server.problems());
        thread::sleep(Duration::from_millis(20));
    }
    server
}

/// The next datagram's length. A signal (a child of another test ends) interrupts a receive that has a limit of time, whatever its
/// handler says: signal(7).
pub(super) fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            received => return received,
        }
    }
}

/// An upstream that answers as `answer` says, or not at all.
pub(super) fn upstream_that(answer: impl Fn(Message) -> Option<Message> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let Ok(question) = Message::from_vec(&buffer[..n]) else { continue };
            if let Some(answer) = answer(question) {
                let _ = socket.send_to(&answer.to_vec().unwrap(), from);
            }
        }
    });
    at
}

/// An upstream that answers every name with one address; until it is told to stop.
fn upstream(address: [u8; 4], asked: &'static AtomicUsize, silent: &'static AtomicBool) -> SocketAddr {
    upstream_that(move |question| {
        if silent.load(Ordering::Relaxed) {
            return None;
        }
        let query: Query = question.queries[0].clone();
        if !query.name().to_ascii().starts_with("meshlb-") {
            asked.fetch_add(1, Ordering::Relaxed);
        }
        let mut answer = question.into_response();
        answer.metadata.recursion_available = true;
        answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A(address.into()))));
        Some(answer)
    })
}

/// An upstream that refuses, at once.
fn unwilling(code: ResponseCode) -> SocketAddr {
    upstream_that(move |question| {
        let mut answer = question.into_response();
        answer.metadata.response_code = code;
        Some(answer)
    })
}

/// What is answered, or the code.
fn outcome(at: SocketAddr, name: &str) -> Result<String, String> {
    ask::addresses(at, name, RecordType::A).map(|ips| format!("{ips:?}"))
}

#[test]
fn others_are_asked_and_one_that_dies_is_passed_over() {
    static ASKED: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
    static SILENT: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
    let first = upstream([192, 0, 2, 1], &ASKED[0], &SILENT[0]);
    let second = upstream([192, 0, 2, 1], &ASKED[1], &SILENT[1]);
    static CORP: (AtomicUsize, AtomicBool) = (AtomicUsize::new(0), AtomicBool::new(false));
    let corp = upstream([192, 0, 2, 2], &CORP.0, &CORP.1);
    let at = at(1);
    let mut config = config(at);
    config.forward.upstreams = vec![first, second];
    let zone: ZoneForward = format!("corp.example={corp}").parse().unwrap();
    config.forward.zones = vec![zone];
    let metrics = DnsMetrics::default();
    let server = serve(&config, &mut some(), &metrics);
    let a = |name: &str| outcome(at, name);
    assert_eq!(a("www.example."), Ok("[192.0.2.1]".into()));
    assert_eq!(a("x.corp.example."), Ok("[192.0.2.2]".into()));
    assert_eq!(a("vote.default.mesh.internal."), Ok("[10.200.7.7]".into()));
    assert_eq!(a("nothing.default.mesh.internal."), Err(ResponseCode::NXDomain.to_string()));
    let before = ASKED[0].load(Ordering::Relaxed) + ASKED[1].load(Ordering::Relaxed);
    assert_eq!(a("www.example."), Ok("[192.0.2.1]".into()));
    assert_eq!(ASKED[0].load(Ordering::Relaxed) + ASKED[1].load(Ordering::Relaxed), before, "the cache");
    assert_eq!(metrics.cache_hits.get(), 1);
    SILENT[0].store(true, Ordering::Relaxed);
    for i in 0..4 {
        assert_eq!(a(&format!("again{i}.example.")), Ok("[192.0.2.1]".into()), "{i}");
    }
    // Told, once it has been looked at.
    let begun = Instant::now();
    let told = format!("DNS upstream {first} does not answer");
    while !server.problems().contains(&told) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", server.problems());
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn one_that_will_not_answer_does_not_speak_for_the_others() {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    static SILENT: AtomicBool = AtomicBool::new(false);
    let good = upstream([192, 0, 2, 1], &ASKED, &SILENT);
    for (test, code) in [(5, ResponseCode::Refused), (6, ResponseCode::ServFail)] {
        let at = at(test);
        let mut config = config(at);
        config.forward.upstreams = vec![unwilling(code), good];
        let _server = serve(&config, &mut some(), &DnsMetrics::default());
        for i in 0..8 {
            assert_eq!(outcome(at, &format!("w{i}.example.")), Ok("[192.0.2.1]".into()), "{code} {i}");
        }
    }
    let at = at(7);
    let mut config = config(at);
    config.forward.upstreams = vec![unwilling(ResponseCode::Refused), unwilling(ResponseCode::ServFail)];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    assert_eq!(outcome(at, "www.example."), Err(ResponseCode::ServFail.to_string()));
}

#[test]
fn two_that_forward_to_each_other_are_a_loop() {
    let (one, other) = (at(8), at(9));
    let of = |at: SocketAddr, to: SocketAddr| {
        let mut config = config(at);
        config.forward.zones = vec![format!("corp.example={to}").parse().unwrap()];
        serve(&config, &mut some(), &DnsMetrics::default())
    };
    let (first, second) = (of(one, other), of(other, one));
    let begun = Instant::now();
    let looped = |server: &Server| server.problems().iter().any(|p| p.contains("a loop"));
    // The one that finds it first refuses the other, whose question then does not come back.
    while !looped(&first) && !looped(&second) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?} {:?}", first.problems(), second.problems());
        thread::sleep(Duration::from_millis(50));
    }
    // Answered at once, and not after each has waited for the other.
    let begun = Instant::now();
    assert!(outcome(one, "x.corp.example.").is_err());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

/// A connection, as soon as there is someone.
pub(super) fn connect(at: SocketAddr) -> TcpStream {
    let begun = Instant::now();
    loop {
        match TcpStream::connect(at) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                return stream;
            }
            Err(e) => assert!(begun.elapsed() < Duration::from_secs(20), "{e}"),
        }
    }
}

#[test]
fn what_comes_too_early_waits_over_tcp_too() {
    let at = at(10);
    let server = Server::start(&config(at), zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
    let mut stream = connect(at);
    let mut question = Message::query();
    question.add_query(Query::query(Name::from_ascii("vote.default.mesh.internal.").unwrap(), RecordType::A));
    let bytes = question.to_vec().unwrap();
    stream.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(&bytes).unwrap();
    thread::sleep(Duration::from_millis(300));
    server.publish(some().publish(true));
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 1));
    // And when it ends, its addresses are free again.
    drop(stream);
    server.stop();
    let begun = Instant::now();
    while UdpSocket::bind(at).is_err() || TcpListener::bind(at).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it goes on");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_may_not_ask_has_no_place() {
    let at = at(11);
    let mut config = config(at);
    config.allow = vec!["127.0.53.11/32".parse().unwrap()];
    let server = Server::start(&config, zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
    server.publish(some().publish(true));
    let mut stream = connect(at);
    let begun = Instant::now();
    // It is closed before anything is asked: the source address is 127.0.0.1's.
    assert!(matches!(stream.read(&mut [0; 2]), Ok(0) | Err(_)));
    assert!(begun.elapsed() < Duration::from_secs(4));
    // The node itself always may.
    server.set_node(&["127.0.0.1".parse().unwrap()].into(), None);
    assert_eq!(outcome(at, "vote.default.mesh.internal."), Ok("[10.200.7.7]".into()));
}

#[test]
fn pods_may_ask_where_nobody_is_named() {
    for (allow_pods, may) in [(true, true), (false, false)] {
        let at = at(if may { 12 } else { 13 });
        let config = Config { allow: vec![], allow_pods, ..config(at) };
        let server = Server::start(&config, zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
        server.publish(some().publish(true));
        server.set_node(&BTreeSet::new(), Some(&["127.0.0.0/30".parse().unwrap()]));
        connect(at);
        let outcome = outcome(at, "vote.default.mesh.internal.");
        assert_eq!(outcome.is_ok_and(|answer| answer.contains("10.200.7.7")), may);
    }
}

/// All private addresses may ask where none but the node's pods can, and pods alone where others can.
#[test]
fn at_an_address_that_others_reach_fewer_may_ask() {
    let at = at(16);
    for (inside, pods, may) in [
        (vec![at.ip()], "192.0.2.0/24", true),
        (vec![], "192.0.2.0/24", false),
        (vec![], "127.0.0.0/30", true),
    ] {
        let config = Config { allow_outside: Some(vec![]), inside, allow_pods: true, ..config(at) };
        let server = Server::start(&config, zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
        server.publish(some().publish(true));
        server.set_node(&BTreeSet::new(), Some(&[pods.parse().unwrap()]));
        connect(at);
        let outcome = outcome(at, "vote.default.mesh.internal.");
        assert_eq!(outcome.is_ok_and(|answer| answer.contains("10.200.7.7")), may, "{pods}");
        server.stop();
        let begun = Instant::now();
        while TcpStream::connect(at).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(5), "it goes on");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn pods_whose_ranges_are_not_known_yet_wait_over_tcp() {
    let at = at(14);
    let config = Config { allow: vec![], allow_pods: true, ..config(at) };
    let server = Server::start(&config, zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
    server.publish(some().publish(true));
    let mut stream = connect(at);
    let bytes = {
        let mut question = Message::query();
        let name = Name::from_ascii("vote.default.mesh.internal.").unwrap();
        question.add_query(Query::query(name, RecordType::A));
        question.to_vec().unwrap()
    };
    stream.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(&bytes).unwrap();
    assert!(outcome(at, "vote.default.mesh.internal.").unwrap_err().starts_with("no answer"));
    server.set_node(&BTreeSet::new(), Some(&["127.0.0.0/30".parse().unwrap()]));
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    assert_eq!(outcome(at, "vote.default.mesh.internal."), Ok("[10.200.7.7]".into()));
}

#[test]
fn an_upstream_that_asks_us_is_a_loop() {
    let at = at(2);
    let mut config = config(at);
    // It is ourselves, which the command line would not let through; a forwarder in between does the same.
    config.forward.upstreams = vec![at];
    let server = serve(&config, &mut some(), &DnsMetrics::default());
    let begun = Instant::now();
    while !server.problems().iter().any(|p| p.contains("a loop")) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", server.problems());
        thread::sleep(Duration::from_millis(50));
    }
    // What the upstream asks for others is refused; our own names are there for everyone.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(at).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    for (name, code) in
        [("www.example.", ResponseCode::Refused), ("vote.default.mesh.internal.", ResponseCode::NoError)]
    {
        let mut question = Message::query();
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        socket.send(&question.to_vec().unwrap()).unwrap();
        let mut buffer = [0; 1500];
        let n = receive(&socket, &mut buffer).unwrap();
        assert_eq!(Message::from_vec(&buffer[..n]).unwrap().metadata.response_code, code, "{name}");
    }
}

#[test]
fn a_port_that_is_taken_is_told_and_had_later() {
    let at = at(3);
    let taken = UdpSocket::bind(at).unwrap();
    let server = Server::start(&config(at), zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
    server.publish(some().publish(true));
    let begun = Instant::now();
    while server.problems().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(
        server.problems(),
        [format!("DNS can't be served on {at}: Address already in use (os error 98)")]
    );
    drop(taken);
    while ask::addresses(at, "vote.default.mesh.internal.", RecordType::A).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", server.problems());
    }
    assert!(server.problems().is_empty());
}

/// 1,000 changes a second under load: every answer is one that was right at the time, and none is missing.
#[test]
fn answers_hold_while_everything_changes() {
    const SERVICES: u32 = 500;
    let at = at(4);
    let mut names = crowd(SERVICES);
    let server = serve(&config(at), &mut names, &DnsMetrics::default());
    let stop = AtomicBool::new(false);
    let (changes, answers) = thread::scope(|scope| {
        let clients: Vec<_> = (0..2_u32)
            .map(|k| {
                let stop = &stop;
                scope.spawn(move || {
                    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                    socket.connect(at).unwrap();
                    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    let mut buffer = [0; 1500];
                    let mut n = 0_u32;
                    while !stop.load(Ordering::Relaxed) {
                        let i = (n * 2 + k) * 7919 % SERVICES;
                        let name = Name::from_ascii(format!("tasks.s{i}.default.mesh.internal.")).unwrap();
                        let mut question = Message::query();
                        question.add_query(Query::query(name, RecordType::A));
                        socket.send(&question.to_vec().unwrap()).unwrap();
                        let length = receive(&socket, &mut buffer).expect("an answer");
                        let answer = Message::from_vec(&buffer[..length]).unwrap();
                        assert_eq!(answer.metadata.id, question.metadata.id);
                        let mut ips: Vec<_> = answer.answers.iter().map(|r| r.data.to_string()).collect();
                        ips.sort();
                        let pair = |turn: u8| {
                            let base = format!("10.{}.{}", 100 + turn, i / 125);
                            vec![format!("{base}.{}", i % 125 * 2), format!("{base}.{}", i % 125 * 2 + 1)]
                        };
                        let as_text = |turn| {
                            let mut pair = pair(turn);
                            pair.sort();
                            pair
                        };
                        assert!(ips == as_text(0) || ips == as_text(1), "s{i}: {ips:?}");
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        let begun = Instant::now();
        let mut changes = 0_u32;
        while begun.elapsed() < Duration::from_secs(2) {
            for _ in 0..10 {
                change(&mut names, changes * 31 % SERVICES, (changes / SERVICES % 2) as u8 + 1);
                changes += 1;
            }
            server.publish(names.publish(true));
            thread::sleep(Duration::from_millis(8));
        }
        stop.store(true, Ordering::Relaxed);
        (changes, clients.into_iter().map(|c| c.join().unwrap()).sum::<u32>())
    });
    println!("{changes} changes and {answers} answers in 2 s");
    assert!(changes > 500 && answers > 500, "{changes} changes, {answers} answers");
}
