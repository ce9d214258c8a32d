//! The client against a scripted kernel: what a real one does too rarely to be tested with it.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use nix::libc::{EEXIST, EINTR, EINVAL, ENOBUFS, ENOENT, EPERM, ESRCH};

use super::link::{Link, Transport};
use super::{Client, Error, MAX_BATCH, MAX_DUMPS};
use crate::{
    AddressFamily, Command, DestinationConfig, DestinationId, Object, ServiceConfig, ServiceId, Timeouts,
};

/// What a receive gives: a datagram, an error number, or nothing more (`WouldBlock`).
enum Step {
    Data(Vec<u8>),
    Errno(i32),
    Cut(Vec<u8>),
}

/// A request as the script sees it.
#[derive(Clone, Copy)]
struct Request {
    kind: u16,
    sequence: u32,
    command: u8,
}

type Script = Box<dyn FnMut(&[Request]) -> Vec<Step> + Send>;

/// Answers each datagram as its script says.
struct Kernel {
    script: Script,
    queue: VecDeque<Step>,
    sent: Arc<Mutex<Vec<Vec<Request>>>>,
}

impl Transport for Kernel {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut requests = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let buffer = NetlinkBuffer::new_checked(rest).unwrap();
            requests.push(Request {
                kind: buffer.message_type(),
                sequence: buffer.sequence_number(),
                command: rest[16],
            });
            rest = &rest[usize::try_from(buffer.length()).unwrap()..];
        }
        self.queue.extend((self.script)(&requests));
        self.sent.lock().unwrap().push(requests);
        Ok(())
    }

    fn receive(&mut self, buffer: &mut Vec<u8>, _wait: bool) -> io::Result<usize> {
        buffer.clear();
        match self.queue.pop_front() {
            Some(Step::Data(bytes)) => {
                buffer.extend(&bytes);
                Ok(bytes.len())
            }
            Some(Step::Cut(bytes)) => {
                buffer.extend(&bytes);
                Ok(bytes.len() + 1)
            }
            Some(Step::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(ErrorKind::WouldBlock.into()),
        }
    }

    fn set_timeout(&mut self, _timeout: Duration) -> io::Result<()> {
        Ok(())
    }
}

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(16 + payload.len()).unwrap().to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

fn ack(sequence: u32, errno: i32) -> Vec<u8> {
    let mut payload = (-errno).to_ne_bytes().to_vec();
    payload.extend([0; 16]);
    message(NLMSG_ERROR, 0x100, sequence, &payload)
}

fn done(sequence: u32) -> Vec<u8> {
    message(NLMSG_DONE, 2, sequence, &[0; 4])
}

/// A service with mark `mark` as an answer.
fn service(family: u16, flags: u16, sequence: u32, mark: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let id = ServiceId::fwmark(AddressFamily::Inet, mark);
    let answer = Command::AddService(id, ServiceConfig::new("rr")).to_message();
    super::request::encode(&mut out, answer, family, flags, sequence);
    out
}

/// The look-up of the family, answered with `id`; nothing means that it does not exist.
fn lookup(request: Request, id: Option<u16>) -> Vec<Step> {
    let Some(id) = id else { return vec![Step::Data(ack(request.sequence, ENOENT))] };
    let mut payload = vec![1, 2, 0, 0];
    // An attribute that no kernel sends today, and the id.
    payload.extend([8u16.to_ne_bytes(), 77u16.to_ne_bytes(), [1, 2], [3, 4]].concat());
    payload.extend([6u16.to_ne_bytes(), 1u16.to_ne_bytes(), id.to_ne_bytes(), [0, 0]].concat());
    vec![Step::Data(message(16, 0, request.sequence, &payload)), Step::Data(ack(request.sequence, 0))]
}

type Sent = Arc<Mutex<Vec<Vec<Request>>>>;

/// A client on a kernel whose family is 32; `script` answers everything but the look-up.
fn client(mut script: impl FnMut(&[Request]) -> Vec<Step> + Send + 'static) -> (Client, Sent) {
    raw_client(move |requests| match requests {
        [request] if request.kind == 16 => lookup(*request, Some(32)),
        _ => script(requests),
    })
    .unwrap()
}

fn raw_client(script: impl FnMut(&[Request]) -> Vec<Step> + Send + 'static) -> Result<(Client, Sent), Error> {
    let sent = Sent::default();
    let kernel = Kernel { script: Box::new(script), queue: VecDeque::new(), sent: sent.clone() };
    let link = Link::new(Box::new(kernel), Duration::from_millis(50)).unwrap();
    Ok((Client::on(link, MAX_BATCH)?, sent))
}

fn id(mark: u32) -> ServiceId {
    ServiceId::fwmark(AddressFamily::Inet, mark)
}

fn add(mark: u32) -> Command {
    Command::AddService(id(mark), ServiceConfig::new("rr"))
}

fn destination() -> DestinationId {
    DestinationId::new(Ipv4Addr::new(10, 0, 0, 1).into(), 80)
}

fn acks(requests: &[Request]) -> Vec<Step> {
    requests.iter().map(|request| Step::Data(ack(request.sequence, 0))).collect()
}

#[test]
fn a_client_can_be_sent_to_another_thread() {
    fn send<T: Send>() {}
    send::<Client>();
    send::<Error>();
}

#[test]
fn results_line_up_and_invalid_commands_are_not_sent() {
    let (mut client, sent) = client(|requests| {
        let mut steps: Vec<Step> = requests
            .iter()
            .enumerate()
            .map(|(i, request)| Step::Data(ack(request.sequence, if i == 1 { EEXIST } else { 0 })))
            .collect();
        // Answers need not come in order, and those of nobody are passed over.
        steps.reverse();
        steps.insert(0, Step::Data(ack(9999, EPERM)));
        steps
    });
    let results = client.batch(&[add(1), add(0), add(2), Command::Flush]);
    assert!(results[0].is_ok());
    assert!(matches!(results[1], Err(Error::Invalid { .. })));
    assert!(matches!(results[2], Err(Error::AlreadyExists { object: Object::Service(s) }) if s == id(2)));
    assert!(results[3].is_ok());
    assert_eq!(client.writes(), 3);
    assert_eq!(sent.lock().unwrap().last().unwrap().len(), 3);
}

#[test]
fn a_large_batch_goes_in_datagrams_of_bounded_size() {
    let (mut client, sent) = client(acks);
    let commands: Vec<Command> = (1..=300).map(add).collect();
    assert!(client.batch(&commands).iter().all(Result::is_ok));
    let sizes: Vec<usize> = sent.lock().unwrap()[1..].iter().map(Vec::len).collect();
    assert_eq!(sizes, [128, 128, 44]);
    assert!(client.batch(&[]).is_empty());
}

#[test]
fn a_lost_answer_is_told_apart_from_the_others() {
    let (mut client, _) = client(|requests| {
        let mut steps = acks(requests);
        // The third answer and those after it did not fit.
        steps.truncate(2);
        steps.insert(1, Step::Errno(ENOBUFS));
        steps
    });
    let commands = [add(1), add(2), add(3)];
    let results = client.batch(&commands);
    assert!(results[0].is_ok() && results[1].is_ok());
    let error = results[2].as_ref().unwrap_err();
    assert!(matches!(error, Error::AnswerLost { object: Object::Service(s) } if *s == id(3)), "{error}");
    assert!(error.is_outcome_unknown());
}

#[test]
fn a_kernel_that_always_loses_does_not_hold_us() {
    let (mut client, _) = client(|_| (0..10_000).map(|_| Step::Errno(ENOBUFS)).collect());
    assert!(matches!(client.execute(&add(1)), Err(Error::AnswerLost { .. })));
}

#[test]
fn signals_do_not_disturb() {
    let (mut client, _) = client(|requests| {
        let mut steps = acks(requests);
        steps.insert(0, Step::Errno(EINTR));
        steps
    });
    assert!(client.execute(&add(1)).is_ok());
}

#[test]
fn silence_is_an_error_and_stops_the_batch() {
    let (mut client, sent) = client(|_| vec![]);
    let commands: Vec<Command> = (1..=200).map(add).collect();
    let results = client.batch(&commands);
    assert_eq!(results.len(), 200);
    assert!(matches!(results[0], Err(Error::TimedOut { .. })));
    assert!(matches!(results[199], Err(Error::NotSent { object: Object::Service(s) }) if s == id(200)));
    assert_eq!(sent.lock().unwrap().len(), 2);
    assert!(matches!(client.services(), Err(Error::TimedOut { object: Object::Services, .. })));
}

#[test]
fn late_answers_are_not_taken_for_others() {
    let mut first = None;
    let (mut client, _) = client(move |requests| {
        let sequence = requests[0].sequence;
        match first {
            None => {
                first = Some(sequence);
                vec![]
            }
            // The late one says EPERM.
            Some(late) => vec![Step::Data(ack(late, EPERM)), Step::Data(ack(sequence, 0))],
        }
    });
    assert!(matches!(client.execute(&add(1)), Err(Error::TimedOut { .. })));
    assert!(client.execute(&add(2)).is_ok());
}

#[test]
fn a_changed_family_is_looked_up_and_only_missing_commands_repeated() {
    let mut family = 32;
    let (mut client, sent) = raw_client(move |requests| {
        if requests[0].kind == 16 {
            let steps = lookup(requests[0], Some(family));
            family = 33;
            return steps;
        }
        let errno = if requests[0].kind == 33 { 0 } else { ENOENT };
        requests.iter().map(|request| Step::Data(ack(request.sequence, errno))).collect()
    })
    .unwrap();
    assert_eq!(client.family_id(), 32);
    assert!(client.batch(&[add(1), add(2)]).iter().all(Result::is_ok));
    assert_eq!(client.family_id(), 33);
    assert_eq!(client.writes(), 4);
    let kinds: Vec<u16> = sent.lock().unwrap().iter().map(|datagram| datagram[0].kind).collect();
    assert_eq!(kinds, [16, 32, 16, 33]);
}

#[test]
fn a_read_follows_a_changed_family_too() {
    let mut family = 32;
    let (mut client, _) = raw_client(move |requests| {
        let request = requests[0];
        if request.kind == 16 {
            let steps = lookup(request, Some(family));
            family = 33;
            return steps;
        }
        if request.kind == 32 {
            return vec![Step::Data(ack(request.sequence, ENOENT))];
        }
        vec![Step::Data(service(33, 2, request.sequence, 7)), Step::Data(done(request.sequence))]
    })
    .unwrap();
    let services = client.services().unwrap();
    assert_eq!(services.len(), 1);
    assert_eq!(services[0].id, id(7));
}

#[test]
fn a_module_that_is_gone_is_no_ipvs() {
    assert!(matches!(raw_client(|requests| lookup(requests[0], None)).map(|_| ()), Err(Error::NoIpvs)));

    let mut loaded = true;
    let (mut client, _) = raw_client(move |requests| {
        if requests[0].kind == 16 {
            let steps = lookup(requests[0], loaded.then_some(32));
            loaded = false;
            return steps;
        }
        requests.iter().map(|request| Step::Data(ack(request.sequence, ENOENT))).collect()
    })
    .unwrap();
    let results = client.batch(&[add(1), add(2)]);
    assert!(results.iter().all(|result| matches!(result, Err(Error::NoIpvs))), "{results:?}");
    assert!(matches!(client.services(), Err(Error::NoIpvs)));
}

#[test]
fn an_interrupted_dump_is_taken_again() {
    let mut dumps = 0;
    let (mut client, _) = client(move |requests| {
        let sequence = requests[0].sequence;
        dumps += 1;
        let flags = if dumps < 3 { 2 | NLM_F_DUMP_INTR } else { 2 };
        let mut both = service(32, flags, sequence, 1);
        both.extend(service(32, 2, sequence, 2));
        vec![Step::Data(both), Step::Data(done(sequence))]
    });
    let marks: Vec<ServiceId> = client.services().unwrap().into_iter().map(|service| service.id).collect();
    assert_eq!(marks, [id(1), id(2)]);
}

#[test]
fn a_dump_that_is_always_interrupted_ends() {
    let (mut client, sent) = client(|requests| {
        let sequence = requests[0].sequence;
        vec![Step::Data(service(32, 2 | NLM_F_DUMP_INTR, sequence, 1)), Step::Data(done(sequence))]
    });
    assert!(matches!(client.services(), Err(Error::DumpInterrupted { object: Object::Services })));
    assert_eq!(sent.lock().unwrap().len(), 1 + MAX_DUMPS);
    let mut seen = 0;
    assert!(matches!(client.for_each_service(|_| seen += 1), Err(Error::DumpInterrupted { .. })));
    assert_eq!(seen, 1);
}

#[test]
fn a_dump_with_a_hole_is_taken_again_without_the_rest_of_the_first() {
    let mut dumps = 0;
    let (mut client, _) = client(move |requests| {
        let sequence = requests[0].sequence;
        dumps += 1;
        match dumps {
            1 => vec![
                Step::Data(service(32, 2, sequence, 1)),
                Step::Errno(ENOBUFS),
                Step::Data(service(32, 2, sequence, 3)),
                Step::Data(done(sequence)),
            ],
            // A datagram that did not fit into our buffer.
            2 => vec![Step::Cut(service(32, 2, sequence, 1)), Step::Data(done(sequence))],
            _ => vec![Step::Data(service(32, 2, sequence, 5)), Step::Data(done(sequence))],
        }
    });
    let marks: Vec<ServiceId> = client.services().unwrap().into_iter().map(|service| service.id).collect();
    assert_eq!(marks, [id(5)]);
}

#[test]
fn an_unreadable_service_spoils_its_dump_and_not_the_next() {
    let mut dumps = 0;
    let (mut client, _) = client(move |requests| {
        let sequence = requests[0].sequence;
        dumps += 1;
        let first = if dumps == 1 {
            // A service without an address family.
            message(32, 2, sequence, &[1, 1, 0, 0, 4, 0, 1, 0])
        } else {
            service(32, 2, sequence, 1)
        };
        vec![Step::Data(first), Step::Data(service(32, 2, sequence, 2)), Step::Data(done(sequence))]
    });
    let error = client.services().unwrap_err();
    assert!(error.to_string().contains("IPVS_SVC_ATTR_AF"), "{error}");
    assert_eq!(client.services().unwrap().len(), 2);
}

#[test]
fn garbage_is_malformed() {
    let (mut client, _) = client(|_| vec![Step::Data(vec![1, 2, 3])]);
    assert!(matches!(client.services(), Err(Error::Malformed { .. })));
    let error = client.execute(&add(1)).unwrap_err();
    assert!(matches!(error, Error::Malformed { object: Object::Service(s), .. } if s == id(1)), "{error}");
}

#[test]
fn a_dump_may_end_in_an_error() {
    let (mut client, _) = client(|requests| {
        let sequence = requests[0].sequence;
        vec![Step::Data(message(NLMSG_DONE, 2, sequence, &(-EPERM).to_ne_bytes()))]
    });
    let error = client.services().unwrap_err();
    assert!(matches!(error, Error::PermissionDenied { object: Object::Services }), "{error}");
}

#[test]
fn one_service_is_read_or_is_not_there() {
    let (mut client, sent) = client(|requests| {
        let sequence = requests[0].sequence;
        if sequence == 2 {
            vec![Step::Data(service(32, 0, sequence, 4)), Step::Data(ack(sequence, 0))]
        } else {
            vec![Step::Data(ack(sequence, ESRCH))]
        }
    });
    assert_eq!(client.service(&id(4)).unwrap().unwrap().id, id(4));
    assert_eq!(client.service(&id(4)).unwrap(), None);
    assert_eq!(sent.lock().unwrap()[1][0].command, 4);
    assert_eq!(client.writes(), 0);
}

#[test]
fn errors_say_what_and_why() {
    let v6 = ServiceId::fwmark(AddressFamily::Inet6, 256);
    let masquerade = DestinationConfig::masquerade(1);
    let sip = ServiceConfig { pe_name: Some("sip".into()), ..ServiceConfig::new("nosuch") };
    let cases = [
        (
            Command::AddService(v6, ServiceConfig::new("rr")),
            EEXIST,
            "IPVS service FWM 256 IPv6 already exists",
        ),
        (Command::DelService(id(5)), ESRCH, "IPVS service FWM 5 does not exist"),
        (
            Command::DelDestination(id(5), destination()),
            ENOENT,
            "destination 10.0.0.1:80 of IPVS service FWM 5 does not exist",
        ),
        (
            Command::AddDestination(id(5), destination(), masquerade),
            ESRCH,
            "IPVS service FWM 5 does not exist",
        ),
        (
            Command::AddDestination(v6, destination(), masquerade),
            EINVAL,
            "destination 10.0.0.1:80 cannot serve IPVS service FWM 256 IPv6: they are of different address families",
        ),
        (
            Command::AddService(id(5), ServiceConfig::new("nosuch")),
            ENOENT,
            "IPVS service FWM 5: the kernel has no scheduler \"nosuch\"",
        ),
        (
            Command::SetService(id(5), sip),
            ENOENT,
            "IPVS service FWM 5: the kernel has no scheduler \"nosuch\" or no persistence engine \"sip\"",
        ),
        (
            Command::Flush,
            EPERM,
            "no permission for all IPVS services: CAP_NET_ADMIN is needed, in the initial user namespace",
        ),
        (
            Command::SetTimeouts(Timeouts::default()),
            EINVAL,
            "cannot set the IPVS timeouts: Invalid argument (os error 22): because",
        ),
    ];
    for (command, errno, text) in cases {
        let message = Some("because".to_owned());
        assert_eq!(Error::of_command(&command, errno, message).to_string(), text);
    }
}

/// The kernel that this runs on, with a buffer that holds only part of the answers.
#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn a_real_kernel_that_loses_answers_is_read_back() {
    assert_eq!(std::env::var("MESHLB_KERNEL_TESTS").as_deref(), Ok("1"), "set MESHLB_KERNEL_TESTS=1");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let mut client =
        Client::open_with(crate::Options { receive_buffer: 8 << 10, ..Default::default() }).unwrap();
    client.batch_size = 400;
    let commands: Vec<Command> = (1..=400).map(add).collect();
    let results = client.batch(&commands);
    let done = results.iter().filter(|result| result.is_ok()).count();
    let lost = results.iter().filter(|result| matches!(result, Err(Error::AnswerLost { .. }))).count();
    eprintln!("{done} answered, {lost} lost");
    assert!(done > 0 && lost > 0);
    assert_eq!(done + lost, 400);
    // All were run nevertheless, and the socket is as good as before.
    assert_eq!(client.services().unwrap().len(), 400);
    client.execute(&Command::Flush).unwrap();
    assert_eq!(client.services().unwrap().len(), 0);
}
