//! Names of others, with upstreams on loopback that count what they are asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, CNAME, SOA, SRV},
    },
};

use super::{
    forward::{ForwardConfig, Forwarder, MOST_WAITING},
    server::{Server, more_files},
    server_tests::{at, config, connect, receive, serve, upstream_that},
    tests::{dnsrr, put, some, zone},
    upstream::Probe,
};
use crate::{
    metrics::DnsMetrics,
    model::{
        fixtures::{endpoint, slice},
        ids::PerFamily,
    },
};

/// How often an upstream was asked for each name.
type Asked = Arc<Mutex<BTreeMap<String, usize>>>;

/// An upstream that answers as `answer` says, or not at all, and counts; what the server asks to see who is there is not counted.
fn counting(answer: impl Fn(&Query, &mut Message) -> Option<()> + Send + 'static) -> (SocketAddr, Asked) {
    let asked = Asked::default();
    let count = asked.clone();
    let at = upstream_that(move |question| {
        let query = question.queries[0].clone();
        let name = query.name().to_ascii();
        if !name.starts_with("meshlb-") {
            *count.lock().unwrap().entry(name).or_default() += 1;
        }
        let mut message = question.into_response();
        answer(&query, &mut message).map(|()| message)
    });
    (at, asked)
}

fn refusing() -> (SocketAddr, Asked) {
    counting(|_, answer| {
        answer.metadata.response_code = ResponseCode::Refused;
        Some(())
    })
}

fn silent() -> (SocketAddr, Asked) {
    counting(|_, _| None)
}

/// Ports and numbers of questions, in the order in which they came.
type Heard = Arc<Mutex<Vec<(u16, u16)>>>;

/// One that answers nothing, and notes from which ports it was asked for some names.
fn hearing(of: impl Fn(&str) -> bool + Send + 'static) -> (SocketAddr, Heard) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    let heard = Heard::default();
    let notes = heard.clone();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let Ok(question) = Message::from_vec(&buffer[..n]) else { continue };
            if of(&question.queries[0].name().to_ascii()) {
                notes.lock().unwrap().push((from.port(), question.metadata.id));
            }
        }
    });
    (at, heard)
}

/// One that answers every name with an address; some of them take a while.
fn good() -> (SocketAddr, Asked) {
    counting(|query, answer| {
        if query.name().to_ascii().starts_with("slow.") {
            thread::sleep(Duration::from_millis(1000));
        }
        answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A([192, 0, 2, 1].into()))));
        Some(())
    })
}

fn packets(asked: &Asked) -> usize {
    asked.lock().unwrap().values().sum()
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn question(of: &str, kind: RecordType) -> Message {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name(of), kind));
    question
}

fn ask(at: SocketAddr, of: &str, kind: RecordType) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(at).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.send(&question(of, kind).to_vec().unwrap()).unwrap();
    let mut buffer = [0; 4096];
    let n = receive(&socket, &mut buffer).unwrap();
    Message::from_vec(&buffer[..n]).unwrap()
}

/// Code if not NOERROR, and the records of an answer, `+` before what is in the authority section.
fn told(answer: &Message) -> String {
    let code = Some(answer.metadata.response_code).filter(|code| *code != ResponseCode::NoError);
    let code = code.map(|code| format!("{code:?}")).into_iter();
    let record = |r: &Record| format!("{} {}", r.name, r.data);
    let answers = answer.answers.iter().map(record);
    let soa = answer.authorities.iter().map(|r| format!("+{}", r.name));
    code.chain(answers).chain(soa).collect::<Vec<_>>().join(", ")
}

/// An authority for `corp.example`, which knows nothing of our zone, whether or not it says so.
fn corp(query: &Query, answer: &mut Message) -> Option<()> {
    let alias = |of: &str, to: &str| Record::from_rdata(name(of), 60, RData::CNAME(CNAME(name(to))));
    let soa = || {
        let data = SOA::new(name("ns.corp.example."), name("h.corp.example."), 1, 1, 1, 1, 30);
        Record::from_rdata(name("corp.example."), 30, RData::SOA(data))
    };
    let asked = query.name().to_ascii();
    match asked.as_str() {
        "vote.corp.example." => {
            answer.add_answer(alias(&asked, "VOTE.default.mesh.internal."));
        }
        // In no order, and as if there were nothing.
        "far.corp.example." => {
            answer.add_answer(alias("step.corp.example.", "vote.default.mesh.internal."));
            answer.add_answer(alias(&asked, "step.corp.example."));
            answer.metadata.response_code = ResponseCode::NXDomain;
            answer.add_authority(soa());
        }
        "gone.corp.example." => {
            answer.add_answer(alias(&asked, "gone.default.mesh.internal."));
        }
        "_pg._tcp.corp.example." => {
            answer.add_answer(alias(&asked, "_pg._tcp.db.default.mesh.internal."));
        }
        "only4.corp.example." => {
            answer.add_answer(alias(&asked, "v4.corp.example."));
            answer.add_authority(soa());
        }
        "_x._tcp.corp.example." => {
            answer.add_answer(alias(&asked, "_y._tcp.corp.example."));
            let data = SRV::new(0, 1, 80, name("h.corp.example."));
            answer.add_answer(Record::from_rdata(name("_y._tcp.corp.example."), 60, RData::SRV(data)));
        }
        _ => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            answer.add_authority(soa());
        }
    }
    Some(())
}

#[test]
fn aliases_of_others_lead_to_our_names() {
    let (upstream, asked) = counting(corp);
    let (other, _) = good();
    let at = at(20);
    let mut config = config(at);
    config.forward.upstreams = vec![other];
    config.forward.zones = vec![format!("corp.example={upstream}").parse().unwrap()];
    let metrics = DnsMetrics::default();
    let _server = serve(&config, &mut some(), &metrics);
    use RecordType as T;
    let ours = "mesh.internal.";
    let cases = [
        ("vote", T::A, format!("vote.corp.example. VOTE.default.{ours}, VOTE.default.{ours} 10.200.7.7")),
        ("vote", T::AAAA, format!("vote.corp.example. VOTE.default.{ours}, +{ours}")),
        ("vote", T::CNAME, format!("vote.corp.example. VOTE.default.{ours}")),
        (
            "far",
            T::A,
            format!(
                "far.corp.example. step.corp.example., step.corp.example. vote.default.{ours}, vote.default.{ours} 10.200.7.7"
            ),
        ),
        ("gone", T::A, format!("NXDomain, gone.corp.example. gone.default.{ours}, +{ours}")),
        ("only4", T::AAAA, "only4.corp.example. v4.corp.example., +corp.example.".into()),
        (
            "_x._tcp",
            T::SRV,
            "_x._tcp.corp.example. _y._tcp.corp.example., _y._tcp.corp.example. 0 1 80 h.corp.example."
                .into(),
        ),
        ("nothing", T::A, "NXDomain, +corp.example.".into()),
    ];
    for round in 0..2 {
        for (label, kind, want) in &cases {
            let answer = ask(at, &format!("{label}.corp.example."), *kind);
            assert_eq!(told(&answer), *want, "{label} {kind}, round {round}");
            assert!(!answer.metadata.authoritative);
        }
        let srv = ask(at, "_pg._tcp.corp.example.", T::SRV);
        assert_eq!((srv.answers.len(), srv.additionals.len()), (3, 2), "{}", told(&srv));
    }
    // Each was asked once, and nothing besides.
    let asked = asked.lock().unwrap().clone();
    let once: Vec<_> = asked.iter().map(|(name, n)| format!("{name} {n}")).collect();
    assert_eq!(
        once,
        [
            "_pg._tcp.corp.example. 1",
            "_x._tcp.corp.example. 1",
            "far.corp.example. 1",
            "gone.corp.example. 1",
            "nothing.corp.example. 1",
            "only4.corp.example. 1",
            "vote.corp.example. 3",
        ]
    );
    assert_eq!((metrics.cache_hits.get(), metrics.cache_misses.get()), (9, 9));
    // Of both zones together.
    assert_eq!(told(&ask(at, "www.example.", T::A)), "www.example. 192.0.2.1");
    assert_eq!(metrics.cache_entries.get(), 10);
}

#[test]
fn one_that_refuses_and_one_that_is_dead_slow_nobody() {
    let ((refuses, refused), (dead, unheard), (good, asked)) = (refusing(), silent(), good());
    let at = at(21);
    let mut config = config(at);
    config.forward.upstreams = vec![refuses, dead, good];
    let server = serve(&config, &mut some(), &DnsMetrics::default());
    let timed = |name: &str| {
        let begun = Instant::now();
        assert_eq!(told(&ask(at, name, RecordType::A)), format!("{name} 192.0.2.1"));
        begun.elapsed()
    };
    // Nothing is known of them yet.
    assert!(timed("first.example.") < Duration::from_secs(1));
    let begun = Instant::now();
    while server.problems() != [format!("DNS upstream {dead} does not answer")] {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", server.problems());
        thread::sleep(Duration::from_millis(50));
    }
    let before = [packets(&refused), packets(&unheard), packets(&asked)];
    let mut took: Vec<_> = (0..20).map(|i| timed(&format!("w{i}.example."))).collect();
    took.sort();
    println!("of 20 lookups the slowest took {:?}", took[19]);
    assert!(took[19] < Duration::from_millis(300), "{took:?}");
    let after = [packets(&refused), packets(&unheard), packets(&asked)];
    assert_eq!(after, [before[0], before[1], before[2] + 20]);
    for _ in 0..5 {
        timed("w7.example.");
    }
    assert_eq!(
        [packets(&refused), packets(&unheard), packets(&asked)],
        after,
        "what is cached costs nothing"
    );
}

#[test]
fn where_nobody_answers_that_is_said_in_time_and_remembered() {
    let ((one, first), (other, second)) = (refusing(), silent());
    let at = at(22);
    let mut config = config(at);
    config.forward.upstreams = vec![one, other];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let begun = Instant::now();
    assert_eq!(told(&ask(at, "www.example.", RecordType::A)), "ServFail");
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(4700), "{took:?}");
    let before = [packets(&first), packets(&second)];
    assert_eq!(before[0], 1, "who refuses is not asked again");
    for _ in 0..5 {
        assert_eq!(told(&ask(at, "www.example.", RecordType::A)), "ServFail");
    }
    assert_eq!([packets(&first), packets(&second)], before);
    // Not for long.
    thread::sleep(Duration::from_millis(2100));
    ask(at, "www.example.", RecordType::A);
    assert_eq!(packets(&first), 2);
}

/// A question as it is sent by TCP.
fn by_tcp(of: &str) -> Vec<u8> {
    let question = question(of, RecordType::A).to_vec().unwrap();
    [&u16::try_from(question.len()).unwrap().to_be_bytes()[..], &question].concat()
}

/// The next answer of a connection, if there is one.
fn next_of(stream: &mut TcpStream) -> Option<Message> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).unwrap();
    Some(Message::from_vec(&answer).unwrap())
}

#[test]
fn a_slow_name_holds_up_no_other_of_its_connection() {
    let (slow, _) = good();
    let at = at(23);
    let mut config = config(at);
    config.forward.upstreams = vec![slow];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let bytes = ["slow.example.", "vote.default.mesh.internal."].map(by_tcp).concat();
    let begun = Instant::now();
    stream.write_all(&bytes).unwrap();
    // What has been asked is answered, though nothing more will be.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut next = || (told(&next_of(&mut stream).unwrap()), begun.elapsed());
    let (first, at_once) = next();
    assert_eq!(first, "vote.default.mesh.internal. 10.200.7.7");
    assert!(at_once < Duration::from_millis(600), "{at_once:?}");
    assert_eq!(next().0, "slow.example. 192.0.2.1");
}

/// Of two lookups of a name the first fails last.
#[test]
fn a_late_failure_is_not_the_answer_where_there_is_one() {
    let refused = Mutex::new(false);
    let (moody, asked) = counting(move |query, answer| {
        // It will not, the first time.
        if query.name().to_ascii() == "www.example."
            && !std::mem::replace(&mut *refused.lock().unwrap(), true)
        {
            answer.metadata.response_code = ResponseCode::Refused;
            return Some(());
        }
        answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A([192, 0, 2, 1].into()))));
        Some(())
    });
    let (dead, _) = silent();
    let at = at(24);
    let mut config = config(at);
    config.forward.upstreams = vec![moody, dead];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let www = || told(&ask(at, "www.example.", RecordType::A));
    let good = "www.example. 192.0.2.1";
    thread::scope(|scope| {
        let begun = Instant::now();
        let first = scope.spawn(www);
        while packets(&asked) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(3), "the upstream is not asked");
            thread::sleep(Duration::from_millis(10));
        }
        // Who asks at once waits for the same lookup.
        thread::sleep(Duration::from_millis(1100));
        assert_eq!(www(), good);
        assert_eq!(first.join().unwrap(), good);
        assert!(begun.elapsed() > Duration::from_secs(3), "the first one did not fail");
    });
    assert_eq!(www(), good);
    assert_eq!(packets(&asked), 2);
}

#[test]
fn an_alias_that_leads_nowhere_yet_is_asked_for_again_soon() {
    let found = Mutex::new(false);
    let (upstream, asked) = counting(move |query, answer| {
        let (www, far) = (query.name().clone(), name("far.example."));
        answer.add_answer(Record::from_rdata(www, 60, RData::CNAME(CNAME(far.clone()))));
        if query.name().to_ascii() == "www.example." && std::mem::replace(&mut *found.lock().unwrap(), true) {
            answer.add_answer(Record::from_rdata(far, 60, RData::A(A([192, 0, 2, 1].into()))));
        }
        Some(())
    });
    let at = at(25);
    let mut config = config(at);
    config.forward.upstreams = vec![upstream];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let www = || told(&ask(at, "www.example.", RecordType::A));
    for _ in 0..2 {
        assert_eq!(www(), "www.example. far.example.");
    }
    assert_eq!(packets(&asked), 1);
    thread::sleep(Duration::from_millis(2100));
    for _ in 0..2 {
        assert_eq!(www(), "www.example. far.example., far.example. 192.0.2.1");
    }
    assert_eq!(packets(&asked), 2);
}

#[test]
fn what_is_no_question_ends_a_connection_and_takes_no_answer_away() {
    // Sendings again must not heap up there.
    let (slow, _) = counting(|query, answer| {
        if query.name().to_ascii().starts_with("slow.") {
            thread::sleep(Duration::from_millis(150));
        }
        answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A([192, 0, 2, 1].into()))));
        Some(())
    });
    let at = at(26);
    let mut config = config(at);
    config.forward.upstreams = vec![slow];
    let metrics = DnsMetrics::default();
    let _server = serve(&config, &mut some(), &metrics);
    let no_query = {
        let mut answer = by_tcp("www.example.");
        answer[4] |= 0x80;
        answer
    };
    // Too long, of which the rest comes too; cut, by the client's end; an answer; none at all.
    let too_long = [&5000_u16.to_be_bytes()[..], &[7; 5000]].concat();
    for (i, bad) in [too_long, vec![0, 50, 1], no_query, vec![0, 0]].into_iter().enumerate() {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let slow = format!("slow.w{i}.example.");
        let more = if i == 1 { Vec::new() } else { by_tcp("vote.default.mesh.internal.") };
        stream.write_all(&[by_tcp(&slow), bad, more].concat()).unwrap();
        if i == 1 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let answers: Vec<_> = std::iter::from_fn(|| next_of(&mut stream)).map(|a| told(&a)).collect();
        assert_eq!(answers, [format!("{slow} 192.0.2.1")], "{i}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it ends, and is not reset");
    }
}

/// An answer that its client does not take is no reason not to look another one up.
#[test]
fn lookups_go_on_while_an_answer_is_not_taken() {
    let (slow, _) = good();
    let at = at(27);
    let mut config = config(at);
    config.forward.upstreams = vec![slow];
    let metrics = DnsMetrics::default();
    let mut names = some();
    let many =
        (0..3000_u16).map(|i| endpoint(&format!("10.245.{}.{}", i / 250, i % 250 + 1), "n1")).collect();
    put(&mut names, &dnsrr("many"), &[slice("many", many)], PerFamily::default());
    let _server = serve(&config, &mut names, &metrics);
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(&by_tcp("slow.example.")).unwrap();
    // More than sockets hold.
    stream.write_all(&by_tcp("many.default.mesh.internal.").repeat(150)).unwrap();
    let begun = Instant::now();
    while metrics.cache_entries.get() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(4), "the lookup stands still");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(begun.elapsed() > Duration::from_millis(500), "{:?}", begun.elapsed());
    // Who takes them after all has all of them.
    let answers: Vec<_> = (0..151).map(|_| next_of(&mut stream).unwrap().answers.len()).collect();
    assert_eq!(answers.iter().filter(|n| **n > 100).count(), 150, "{answers:?}");
    assert_eq!(answers.iter().filter(|n| **n <= 1).count(), 1);
}

#[test]
fn what_waits_for_the_source_is_looked_up_once() {
    let (upstream, asked) = counting(|query, answer| {
        let target = RData::CNAME(CNAME(name("vote.default.mesh.internal.")));
        // Nobody keeps it.
        answer.add_answer(Record::from_rdata(query.name().clone(), 0, target));
        Some(())
    });
    let at = at(28);
    let mut config = config(at);
    config.forward.upstreams = vec![upstream];
    let server = Server::start(&config, zone(), BTreeSet::new(), DnsMetrics::default()).unwrap();
    let mut stream = connect(at);
    stream.write_all(&by_tcp("vote.corp.example.")).unwrap();
    thread::sleep(Duration::from_millis(700));
    assert_eq!(packets(&asked), 1);
    server.publish(some().publish(true));
    let answer = next_of(&mut stream).unwrap();
    assert_eq!(answer.answers.len(), 2, "{}", told(&answer));
    assert_eq!(packets(&asked), 1);
}

#[test]
fn a_zone_whose_upstream_is_dead_takes_no_place_from_others() {
    let ((dead, _), (good, _)) = (silent(), good());
    let config = ForwardConfig {
        upstreams: vec![good],
        zones: vec![format!("corp.example={dead}").parse().unwrap()],
        cache: 100,
    };
    let metrics = DnsMetrics::default();
    let probe = Arc::new(Probe::new(&config.all()));
    let forwarder = Forwarder::new(&config, &zone().name, 8, probe, metrics.clone()).unwrap();
    let lookup = async |i: u8, of: &str| {
        forwarder.lookup(&Query::query(name(of), RecordType::A), [10, 0, 0, i].into()).await
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let names: Vec<_> = (0..8).map(|i| format!("w{i}.corp.example.")).collect();
        let waiting = futures::future::join_all((0..8).zip(&names).map(|(i, of)| lookup(i, of)));
        let others = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            futures::future::join_all((0..4).map(|i| lookup(i, "www.example."))).await
        };
        let (dead, others) = futures::future::join(waiting, others).await;
        assert!(
            others.iter().all(|answer| answer.as_ref().is_some_and(|a| a.answers.len() == 1)),
            "{others:?}"
        );
        // Half of the places are its own; who has none gets no answer, and may ask again.
        assert_eq!(dead.iter().filter(|answer| answer.is_none()).count(), 4);
        assert!(dead.iter().flatten().all(|answer| answer.code == ResponseCode::ServFail));
    });
}

/// Who asks it the same again and again.
#[test]
fn who_waits_for_a_dead_zone_is_in_nobody_elses_way() {
    let ((dead, _), (good, _)) = (silent(), good());
    let config = ForwardConfig {
        upstreams: vec![good],
        zones: vec![format!("corp.example={dead}").parse().unwrap()],
        cache: 100,
    };
    let probe = Arc::new(Probe::new(&config.all()));
    let forwarder = Forwarder::new(&config, &zone().name, 8, probe, DnsMetrics::default()).unwrap();
    let lookup = async |i: u8, of: &str| {
        forwarder.lookup(&Query::query(name(of), RecordType::A), [10, 0, 0, i].into()).await
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let waiting = (0..MOST_WAITING).map(|i| lookup(u8::from(i % 2 == 0), "www.corp.example."));
        let waiting = futures::future::join_all(waiting);
        let others = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            futures::future::join_all([0, 1, 2].map(|i| lookup(i, "www.example."))).await
        };
        let (dead, others) = futures::future::join(waiting, others).await;
        let answered = |answer: &Option<Arc<_>>| answer.is_some();
        assert!(others.iter().all(answered), "{others:?}");
        assert_eq!(dead.iter().flatten().count(), MOST_WAITING / 2);
    });
}

/// RFC 6891, 7: it says that it does not understand.
#[test]
fn an_upstream_that_does_not_know_edns_is_asked_without() {
    for (code, bare, test) in [
        (ResponseCode::FormErr, false, 37),
        (ResponseCode::NotImp, false, 38),
        (ResponseCode::FormErr, true, 39),
    ] {
        // Questions with EDNS, and without. What is sent again has the same number.
        let asked = Arc::new(Mutex::new([BTreeSet::new(), BTreeSet::new()]));
        let count = asked.clone();
        let upstream = upstream_that(move |question| {
            let (query, edns) = (question.queries[0].clone(), question.edns.is_some());
            let name = query.name().to_ascii();
            if !name.starts_with("meshlb-") {
                count.lock().unwrap()[usize::from(!edns)].insert(question.metadata.id);
            }
            let mut answer = question.into_response();
            answer.edns = None;
            if edns || name.starts_with("odd.") {
                answer.metadata.response_code = code;
                if bare {
                    answer.queries.clear();
                }
            } else {
                let data = RData::A(A([192, 0, 2, 1].into()));
                answer.add_answer(Record::from_rdata(query.name().clone(), 60, data));
            }
            Some(answer)
        });
        let at = at(test);
        let mut config = config(at);
        config.forward.upstreams = vec![upstream];
        let _server = serve(&config, &mut some(), &DnsMetrics::default());
        // That it is EDNS is known by an answer without alone.
        assert_eq!(told(&ask(at, "odd.example.", RecordType::A)), "ServFail");
        let counts = || asked.lock().unwrap().clone().map(|ids| ids.len());
        assert_eq!(counts(), [1, 1]);
        for name in ["www.example.", "w2.example.", "w3.example."] {
            assert_eq!(told(&ask(at, name, RecordType::A)), format!("{name} 192.0.2.1"), "{code}");
        }
        assert_eq!(counts(), [2, 4]);
    }
}

/// What is sent again is sent by the same socket: each has a port, of which the node has few.
#[test]
fn a_lookup_takes_a_port_of_each_upstream_and_no_more() {
    let (upstream, from) = hearing(|name| name == "www.example.");
    let at = at(36);
    let mut config = config(at);
    config.forward.upstreams = vec![upstream];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(&question("www.example.", RecordType::A).to_vec().unwrap(), at).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while from.lock().unwrap().len() < 3 && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
    let sent = from.lock().unwrap().clone();
    assert!(sent.len() >= 3 && sent[..3].iter().all(|one| *one == sent[0]), "{sent:?}");
}

#[test]
fn upstreams_that_are_known_to_be_dead_are_not_waited_for() {
    let (dead, _) = silent();
    let at = at(29);
    let mut config = config(at);
    config.forward.upstreams = vec![dead];
    let server = serve(&config, &mut some(), &DnsMetrics::default());
    let begun = Instant::now();
    while server.problems().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(50));
    }
    let begun = Instant::now();
    assert_eq!(told(&ask(at, "www.example.", RecordType::A)), "ServFail");
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
}

/// However many names there are none of.
#[test]
fn a_datagram_that_is_lost_is_sent_again_soon() {
    let lost = Mutex::new(BTreeSet::new());
    let (lossy, asked) = counting(move |query, answer| {
        let of = query.name().to_ascii();
        if !of.starts_with("lost.") {
            return corp(query, answer);
        }
        if lost.lock().unwrap().insert(of) {
            return None;
        }
        answer.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A([192, 0, 2, 1].into()))));
        Some(())
    });
    let at = at(30);
    let mut config = config(at);
    config.forward.upstreams = vec![lossy];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    for i in 0..40 {
        assert_eq!(told(&ask(at, &format!("w{i}.corp.example."), RecordType::A)), "NXDomain, +corp.example.");
    }
    let begun = Instant::now();
    assert_eq!(told(&ask(at, "lost.example.", RecordType::A)), "lost.example. 192.0.2.1");
    let took = begun.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_millis(2500)).contains(&took), "{took:?}");
    assert_eq!(asked.lock().unwrap()["lost.example."], 2);
}

/// Lookups take ports that are there for it, which are no listeners: a published port has to stay free of them.
#[test]
fn lookups_take_ports_of_clients() {
    let (upstream, from) = hearing(|name| !name.starts_with("meshlb-"));
    let ports = || from.lock().unwrap().iter().map(|(port, _)| *port).collect::<BTreeSet<u16>>();
    let at = at(31);
    let mut config = config(at);
    config.forward.upstreams = vec![upstream];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for i in 0..100 {
        let question = question(&format!("w{i}.example."), RecordType::A);
        client.send_to(&question.to_vec().unwrap(), at).unwrap();
    }
    let begun = Instant::now();
    while ports().len() < 100 {
        assert!(begun.elapsed() < Duration::from_secs(3), "{from:?}");
        thread::sleep(Duration::from_millis(10));
    }
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let range: Vec<u16> = range.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let ports = ports();
    let outside: Vec<_> = ports.iter().filter(|port| !(range[0]..=range[1]).contains(port)).collect();
    assert!(outside.is_empty(), "not within {range:?}: {outside:?}");
    // Without a peer (state 7) a socket takes what comes from anybody.
    let sockets = std::fs::read_to_string("/proc/thread-self/net/udp").unwrap();
    let state = |port: u16| {
        let mut lines = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines
            .find(|of| of.get(1).is_some_and(|at| at.ends_with(&format!(":{port:04X}"))))
            .map(|of| of[3].to_owned())
    };
    let states: Vec<_> = ports.iter().filter_map(|port| state(*port)).collect();
    assert!(states.len() > 50 && states.iter().all(|state| state == "01"), "{states:?}");
}

/// An upstream that takes its time for each answer, but reads all questions at once: they would be lost.
fn taking(time: Duration) -> (SocketAddr, Asked) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    let answers = socket.try_clone().unwrap();
    let asked = Asked::default();
    let count = asked.clone();
    let (later, due) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = later.send((Instant::now() + time, buffer[..n].to_vec(), from));
        }
    });
    thread::spawn(move || {
        for (due, question, from) in due {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let question = Message::from_vec(&question).unwrap();
            let query = question.queries[0].clone();
            let mut answer = question.into_response();
            let data = RData::A(A([192, 0, 2, 1].into()));
            answer.add_answer(Record::from_rdata(query.name().clone(), 60, data));
            let _ = answers.send_to(&answer.to_vec().unwrap(), from);
            *count.lock().unwrap().entry(query.name().to_ascii()).or_default() += 1;
        }
    });
    (at, asked)
}

#[test]
fn a_slow_upstream_is_asked_for_more_than_a_thousand_names_at_once() {
    const EACH: u16 = 550;
    if more_files() < 20_000 {
        assert!(std::env::var_os("MESHLB_NO_SKIP").is_none(), "no files for so many lookups (RLIMIT_NOFILE)");
        println!("this process may not have files for so many lookups");
        return;
    }
    let (slow, _) = taking(Duration::from_millis(1300));
    let at = at(35);
    let mut config = config(at);
    config.forward.upstreams = vec![slow];
    config.forward.cache = 10_000;
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    let ask_all = |client: u8| {
        let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, client], 0))).unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..EACH {
                    let mut question = question(&format!("w{i}.client{client}.example."), RecordType::A);
                    question.metadata.id = i;
                    socket.send(&question.to_vec().unwrap()).unwrap();
                    // Together they take a fraction of what the upstream does, and no queue of a slow machine is full.
                    if i % 10 == 0 {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
            });
            let mut answered = BTreeSet::new();
            let mut buffer = [0; 1500];
            while answered.len() < EACH.into() {
                let Ok(n) = receive(&socket, &mut buffer) else { break };
                let answer = Message::from_vec(&buffer[..n]).unwrap();
                assert_eq!(answer.answers.len(), 1, "{}", told(&answer));
                answered.insert(answer.metadata.id);
            }
            answered.len()
        })
    };
    let ask_all = &ask_all;
    let answered = thread::scope(|scope| {
        [1, 2].map(|client| scope.spawn(move || ask_all(client))).map(|client| client.join().unwrap())
    });
    assert_eq!(answered, [usize::from(EACH); 2], "all are answered");
}

#[test]
fn who_asks_the_same_at_once_takes_no_further_place() {
    let (slow, asked) = taking(Duration::from_millis(300));
    let config = ForwardConfig { upstreams: vec![slow], zones: vec![], cache: 100 };
    let probe = Arc::new(Probe::new(&config.all()));
    let forwarder = Forwarder::new(&config, &zone().name, 8, probe, DnsMetrics::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let found = runtime.block_on(async {
        let queries =
            ["a", "b", "c", "d"].map(|label| Query::query(name(&format!("{label}.example.")), RecordType::A));
        let clients = (0..100).map(|client| [10, 0, 0, client].into());
        let lookups = clients.flat_map(|client| queries.iter().map(move |query| (query, client)));
        futures::future::join_all(lookups.map(|(query, client)| forwarder.lookup(query, client))).await
    });
    assert_eq!(found.iter().flatten().filter(|answer| answer.answers.len() == 1).count(), 400);
    assert_eq!(packets(&asked), 4);
}

/// One that does not answer questions about names that nobody has, and refuses others, is asked for the rest all the same.
#[test]
fn an_upstream_that_answers_is_none_that_is_down() {
    let (moody, asked) = counting(|query, answer| {
        if query.name().to_ascii().starts_with("meshlb-") {
            return None;
        }
        answer.add_answer(Record::from_rdata(query.name().clone(), 0, RData::A(A([192, 0, 2, 1].into()))));
        Some(())
    });
    let at = at(32);
    let mut config = config(at);
    config.forward.upstreams = vec![moody];
    let server = serve(&config, &mut some(), &DnsMetrics::default());
    let begun = Instant::now();
    while server.problems().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(told(&ask(at, "www.example.", RecordType::A)), "www.example. 192.0.2.1");
    assert_eq!(server.problems(), Vec::<String>::new());
    assert_eq!(packets(&asked), 1);
}

#[test]
fn names_that_nobody_has_are_someones_who_was_named_for_them() {
    let ((everyones, asked), (theirs, _)) = (good(), good());
    let at = at(33);
    let mut config = config(at);
    config.forward.upstreams = vec![everyones];
    config.forward.zones = vec![format!("onion={theirs}").parse().unwrap()];
    let _server = serve(&config, &mut some(), &DnsMetrics::default());
    assert_eq!(told(&ask(at, "www.onion.", RecordType::A)), "www.onion. 192.0.2.1");
    assert_eq!(told(&ask(at, "www.invalid.", RecordType::A)), "NXDomain, +invalid.");
    assert_eq!(told(&ask(at, "www.localhost.", RecordType::A)), "www.localhost. 127.0.0.1");
    assert_eq!(packets(&asked), 0);
}

/// Of two upstreams at one address, and of one upstream for two zones.
#[test]
fn upstreams_are_counted_by_port_and_zone() {
    let ((one, _), (other, _)) = (good(), good());
    let at = at(34);
    let mut config = config(at);
    config.forward.upstreams = vec![one];
    config.forward.zones = vec![
        format!("corp.example={other}").parse().unwrap(),
        format!("more.example={other}").parse().unwrap(),
    ];
    let metrics = DnsMetrics::default();
    let _server = serve(&config, &mut some(), &metrics);
    for name in ["a.example.", "a.corp.example.", "b.corp.example.", "a.more.example."] {
        assert_eq!(told(&ask(at, name, RecordType::A)), format!("{name} 192.0.2.1"));
    }
    for (upstream, zone, n) in [(one, ".", 1), (other, "corp.example.", 2), (other, "more.example.", 1)] {
        assert_eq!(metrics.upstream(upstream, &name(zone), "udp", "success").get(), n, "{upstream} {zone}");
    }
}
