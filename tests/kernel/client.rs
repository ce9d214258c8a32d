//! Clients: one-shot connections counted in a [`Tally`], load in the background, long flows, ping.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::ns::Netns;
use crate::runner::Proto;
use crate::server::socket;

/// What is sent where, how often. Start with [`Probe::new`] and change what matters.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The protocol.
    pub proto: Proto,
    /// Where to.
    pub dst: SocketAddr,
    /// How many connections (or UDP sockets with one datagram each), one after the other.
    pub n: usize,
    /// How long each waits for an answer.
    pub timeout: Duration,
    /// The source address.
    pub bind: Option<IpAddr>,
    /// The source port.
    pub source_port: Option<u16>,
    /// TCP: ends with a reset, so that the next one to the same place can have the source port.
    pub reset: bool,
    /// Bytes that are sent, and must come back.
    pub payload: usize,
    /// The pause between two.
    pub pause: Duration,
    /// How often a datagram is sent before it is given up (1).
    pub tries: u32,
    /// TCP: what is sent to a server that speaks HTTP (those of the demo).
    pub request: Option<&'static str>,
}

impl Probe {
    /// One connection with a time-out of five seconds. (An SCTP association of this kernel takes 3 s instead of 0.03 s about
    /// once in a hundred times, even from a host to itself.)
    pub fn new(proto: Proto, dst: impl Into<SocketAddr>) -> Probe {
        Probe {
            proto,
            dst: dst.into(),
            n: 1,
            timeout: Duration::from_secs(5),
            bind: None,
            source_port: None,
            reset: false,
            payload: 0,
            pause: Duration::ZERO,
            tries: 1,
            request: None,
        }
    }

    /// `n` of them.
    pub fn times(mut self, n: usize) -> Probe {
        self.n = n;
        self
    }

    /// From this address of the client.
    pub fn bound_to(mut self, addr: impl Into<IpAddr>) -> Probe {
        self.bind = Some(addr.into());
        self
    }

    /// From this port; TCP ends with a reset.
    pub fn bound_port(mut self, port: u16) -> Probe {
        self.source_port = Some(port);
        self.reset = true;
        self
    }

    /// TCP: closed as usual, from a given source port too.
    pub fn closed(mut self) -> Probe {
        self.reset = false;
        self
    }

    /// With that many bytes there and back.
    pub fn bytes(mut self, payload: usize) -> Probe {
        self.payload = payload;
        self
    }

    /// With another time-out.
    pub fn within(mut self, timeout: Duration) -> Probe {
        self.timeout = timeout;
        self
    }

    /// Runs it in a namespace.
    pub fn run(&self, ns: &Netns) -> Result<Tally> {
        ns.enter(|| {
            let mut tally = Tally { client: ns.name().to_owned(), probe: self.clone(), ..Tally::new(self) };
            for i in 0..self.n {
                if i > 0 && !self.pause.is_zero() {
                    thread::sleep(self.pause);
                }
                let start = Instant::now();
                let answer = self.once();
                tally.slowest = tally.slowest.max(start.elapsed());
                tally.add(answer);
            }
            Ok(tally)
        })
    }

    fn open(&self) -> io::Result<Socket> {
        let socket = socket(self.proto, self.dst.ip())?;
        socket.set_read_timeout(Some(self.timeout))?;
        socket.set_write_timeout(Some(self.timeout))?;
        let any: IpAddr = if self.dst.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let from = self.bind.unwrap_or(any);
        match self.source_port {
            None => bind_fresh(&socket, from)?,
            port => {
                socket.set_reuse_address(true)?;
                socket.bind(&SocketAddr::new(from, port.unwrap_or(0)).into())?;
            }
        }
        if self.reset && self.proto == Proto::Tcp {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        Ok(socket)
    }

    fn once(&self) -> Result<Answer, String> {
        let mut flow = self.connect()?;
        match self.proto {
            Proto::Udp => Ok(flow.hello),
            _ if self.payload == 0 => Ok(flow.hello),
            _ => flow.exchange(self.payload).map(|()| flow.hello),
        }
    }

    /// A connection that stays: for UDP a connected socket that has had one answer.
    fn connect(&self) -> Result<Flow, String> {
        let socket = self.open().map_err(|e| label(&e))?;
        let to = SockAddr::from(self.dst);
        let hello = match self.proto {
            Proto::Tcp => {
                socket.connect_timeout(&to, self.timeout).map_err(|e| label(&e))?;
                match self.request {
                    Some(request) => ask_http(&socket, request)?,
                    None => read_hello(&socket)?,
                }
            }
            Proto::Sctp => {
                socket.connect_timeout(&to, self.timeout).map_err(|e| label(&e))?;
                read_hello(&socket)?
            }
            Proto::Udp => {
                socket.connect(&to).map_err(|e| label(&e))?;
                ask(&socket, self.payload, self.tries)?
            }
        };
        Ok(Flow { socket, proto: self.proto, hello, unanswered: 0 })
    }
}

struct Flow {
    socket: Socket,
    proto: Proto,
    hello: Answer,
    /// Over UDP: what was sent less what came back.
    unanswered: usize,
}

impl Flow {
    /// Sends so many bytes and has them back.
    fn exchange(&mut self, size: usize) -> Result<(), String> {
        if self.proto == Proto::Udp {
            self.unanswered += 1;
            self.hello = ask(&self.socket, size, 1)?;
            self.unanswered -= 1;
            return Ok(());
        }
        let sent: Vec<u8> = (0..size).map(|i| b'a' + u8::try_from(i % 26).unwrap_or(0)).collect();
        let mut got = vec![0; size];
        thread::scope(|s| {
            let writer = s.spawn(|| (&self.socket).write_all(&sent).map_err(|e| label(&e)));
            let read = (&self.socket).read_exact(&mut got).map_err(|e| label(&e));
            writer.join().unwrap_or_else(|_| Err("panic".to_owned()))?;
            read
        })?;
        if got == sent { Ok(()) } else { Err("corrupted".to_owned()) }
    }

    /// Waits for datagrams that are late, for each as long as for an answer, and returns how many never came.
    fn lost(&self) -> usize {
        let mut buffer = [0; 2048];
        let late = (0..self.unanswered).take_while(|_| (&mut &self.socket).read(&mut buffer).is_ok());
        self.unanswered - late.count()
    }
}

fn ask(socket: &Socket, payload: usize, tries: u32) -> Result<Answer, String> {
    let datagram = vec![b'x'; payload.max(2)];
    let mut buffer = vec![0; 70_000];
    let mut last = "no try".to_owned();
    for _ in 0..tries {
        match socket.send(&datagram).and_then(|_| (&mut &*socket).read(&mut buffer)) {
            Ok(n) if n < payload => last = format!("short answer of {n} bytes"),
            Ok(n) => return Answer::parse(buffer.get(..n).unwrap_or_default()),
            Err(e) => last = label(&e),
        }
    }
    Err(last)
}

fn read_hello(socket: &Socket) -> Result<Answer, String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        match (&mut &*socket).read(&mut byte) {
            Ok(0) => return Err("EOF".to_owned()),
            Ok(_) => line.extend_from_slice(&byte),
            Err(e) => return Err(label(&e)),
        }
    }
    Answer::parse(&line)
}

/// A request and the whole answer, whose text is `NAME … PEER`.
fn ask_http(socket: &Socket, request: &str) -> Result<Answer, String> {
    let mut text = String::new();
    (&mut &*socket).write_all(request.as_bytes()).map_err(|e| label(&e))?;
    (&mut &*socket).read_to_string(&mut text).map_err(|e| label(&e))?;
    let parse = || -> Option<Answer> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut words = head.starts_with("HTTP/1.0 200 ").then(|| body.split_whitespace())?;
        let server = words.next()?.to_owned();
        let peer = SocketAddr::new(words.last()?.parse().ok()?, 0);
        Some(Answer { server, peer, local: SocketAddr::from(([0; 4], 0)) })
    };
    parse().ok_or_else(|| format!("not a server of ours: {text:?}"))
}

/// The errno by its name, `timeout` for none in time.
fn label(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return "timeout".to_owned(),
        io::ErrorKind::UnexpectedEof => return "EOF".to_owned(),
        _ => {}
    }
    error.raw_os_error().map_or_else(|| error.to_string(), |n| format!("{:?}", Errno::from_raw(n)))
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The server's name.
    pub server: String,
    /// Whom it saw.
    pub peer: SocketAddr,
    /// The address it was reached at.
    pub local: SocketAddr,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Result<Answer, String> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().next().unwrap_or_default();
        let parse = || -> Option<Answer> {
            let mut words = line.split(' ');
            Some(Answer {
                server: words.next()?.to_owned(),
                peer: words.next()?.strip_prefix("peer=")?.parse().ok()?,
                local: words.next()?.strip_prefix("local=")?.parse().ok()?,
            })
        };
        parse().ok_or_else(|| format!("not a server of ours: {line:?}"))
    }
}

/// What came of a [`Probe`].
#[derive(Debug, Clone)]
pub struct Tally {
    /// The namespace it was sent from.
    pub client: String,
    /// What was asked.
    pub probe: Probe,
    /// Answers by the server's name.
    pub servers: BTreeMap<String, usize>,
    /// Errors by name: `ECONNREFUSED`, `timeout`, ….
    pub errors: BTreeMap<String, usize>,
    /// The client's addresses as the servers saw them, with the server's name.
    pub peers: BTreeSet<(String, IpAddr)>,
    /// All answers, in order.
    pub answers: Vec<Answer>,
    /// The slowest of them.
    pub slowest: Duration,
}

impl Tally {
    fn new(probe: &Probe) -> Tally {
        Tally {
            client: String::new(),
            probe: probe.clone(),
            servers: BTreeMap::new(),
            errors: BTreeMap::new(),
            peers: BTreeSet::new(),
            answers: Vec::new(),
            slowest: Duration::ZERO,
        }
    }

    fn add(&mut self, answer: Result<Answer, String>) {
        match answer {
            Ok(answer) => {
                *self.servers.entry(answer.server.clone()).or_default() += 1;
                self.peers.insert((answer.server.clone(), answer.peer.ip()));
                self.answers.push(answer);
            }
            Err(error) => *self.errors.entry(error).or_default() += 1,
        }
    }

    /// The number of answers.
    pub fn answered(&self) -> usize {
        self.servers.values().sum()
    }

    /// The number of errors.
    pub fn failed(&self) -> usize {
        self.errors.values().sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.probe;
        write!(f, "{} -> {} {} ({} times):", self.client, p.proto, p.dst, p.n)?;
        for (server, n) in &self.servers {
            let seen: BTreeSet<_> = self.peers.iter().filter(|(s, _)| s == server).map(|(_, p)| p).collect();
            write!(f, " {n}x {server} saw {seen:?},")?;
        }
        for (error, n) in &self.errors {
            write!(f, " {n}x {error},")?;
        }
        write!(f, " slowest {:?}", self.slowest)
    }
}

/// Connections opened all the time by threads in a namespace.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<LoadReport>>>,
}

/// What became of a [`Load`].
#[derive(Debug, Clone, Default)]
pub struct LoadReport {
    /// Connections that were answered, by server.
    pub servers: BTreeMap<String, usize>,
    /// When the first and the last of them were, since the start.
    pub times: BTreeMap<String, (Duration, Duration)>,
    /// Every error, with the time since the start.
    pub errors: Vec<(Duration, String)>,
    /// The slowest.
    pub slowest: Duration,
}

impl LoadReport {
    /// The number of answers.
    pub fn answered(&self) -> usize {
        self.servers.values().sum()
    }

    /// Takes an answer in.
    fn add(&mut self, server: String, first: Duration, last: Duration, n: usize) {
        let times = self.times.entry(server.clone()).or_insert((first, last));
        *times = (times.0.min(first), times.1.max(last));
        *self.servers.entry(server).or_default() += n;
    }

    /// From the first to the last answer of servers whose names begin so.
    pub fn span_of(&self, prefix: &str) -> Duration {
        let times = self.times.iter().filter(|(server, _)| server.starts_with(prefix)).map(|(_, t)| t);
        let (first, last) = times.fold((Duration::MAX, Duration::ZERO), |a, t| (a.0.min(t.0), a.1.max(t.1)));
        last.saturating_sub(first)
    }
}

impl Load {
    /// Starts `threads` of them, each sending the probe (its `n` does not count) again and again with its pause between.
    pub fn start(ns: &Arc<Netns>, probe: &Probe, threads: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let start = Instant::now();
        let threads = (0..threads)
            .map(|_| {
                let (ns, stop, probe) = (Arc::clone(ns), Arc::clone(&stop), probe.clone());
                thread::spawn(move || {
                    ns.enter(|| {
                        let mut report = LoadReport::default();
                        while !stop.load(Ordering::Relaxed) {
                            let began = Instant::now();
                            match probe.once() {
                                Ok(answer) => report.add(answer.server, start.elapsed(), start.elapsed(), 1),
                                Err(e) => report.errors.push((start.elapsed(), e)),
                            }
                            report.slowest = report.slowest.max(began.elapsed());
                            thread::sleep(probe.pause);
                        }
                        Ok(report)
                    })
                })
            })
            .collect();
        Load { stop, threads }
    }

    /// Ends it and adds up.
    pub fn stop(mut self) -> Result<LoadReport> {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = LoadReport::default();
        for thread in self.threads.drain(..) {
            let Ok(report) = thread.join() else { bail!("a thread of the load panicked") };
            let report = report?;
            for (server, n) in &report.servers {
                let (first, last) = report.times.get(server).copied().unwrap_or_default();
                sum.add(server.clone(), first, last, *n);
            }
            sum.errors.extend(report.errors);
            sum.slowest = sum.slowest.max(report.slowest);
        }
        sum.errors.sort();
        Ok(sum)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Connections that stay and exchange a line now and then.
pub struct Flows {
    stop: Arc<AtomicBool>,
    reports: Arc<Mutex<Vec<FlowReport>>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// How one of the [`Flows`] went.
#[derive(Debug, Clone, Default)]
pub struct FlowReport {
    /// The servers that answered, in order, without repetition (over UDP it can change).
    pub servers: Vec<String>,
    /// The exchanges that worked.
    pub exchanges: usize,
    /// Errors, with the time since the start. Over TCP and SCTP the first one ends the flow.
    pub errors: Vec<(Duration, String)>,
    /// Over UDP, once it has ended: what was never answered. An error `timeout` may have been a machine that stood still.
    pub lost: usize,
}

impl FlowReport {
    /// Over UDP: one server answered all of it.
    pub fn undisturbed(&self) -> bool {
        self.servers.len() == 1 && self.lost == 0 && self.errors.iter().all(|(_, e)| e == "timeout")
    }
}

impl Flows {
    /// Opens `n` of them, one thread each, and returns when all have had their first answer or error.
    pub fn start(ns: &Arc<Netns>, probe: &Probe, n: usize, interval: Duration) -> Result<Flows> {
        let stop = Arc::new(AtomicBool::new(false));
        let reports = Arc::new(Mutex::new(vec![FlowReport::default(); n]));
        let begun = Instant::now();
        let (ready, wait) = std::sync::mpsc::channel();
        let mut threads = Vec::new();
        for i in 0..n {
            let (ns, stop, reports, probe, ready) =
                (Arc::clone(ns), Arc::clone(&stop), Arc::clone(&reports), probe.clone(), ready.clone());
            threads.push(thread::spawn(move || {
                let update = |f: &dyn Fn(&mut FlowReport)| {
                    let mut all = reports.lock().unwrap_or_else(PoisonError::into_inner);
                    all.get_mut(i).map(f);
                };
                let error = |e: &str| update(&|r| r.errors.push((begun.elapsed(), e.to_owned())));
                let connected = ns.enter(|| Ok(probe.connect()));
                let mut flow = match connected? {
                    Ok(flow) => flow,
                    Err(e) => {
                        error(&e);
                        let _ = ready.send(());
                        return Ok(());
                    }
                };
                update(&|r| r.servers.push(flow.hello.server.clone()));
                let _ = ready.send(());
                while !stop.load(Ordering::Relaxed) {
                    thread::sleep(interval);
                    match flow.exchange(probe.payload.max(6)) {
                        Ok(()) => update(&|r| {
                            r.exchanges += 1;
                            if r.servers.last() != Some(&flow.hello.server) {
                                r.servers.push(flow.hello.server.clone());
                            }
                        }),
                        Err(e) => {
                            error(&e);
                            if probe.proto != Proto::Udp {
                                return Ok(());
                            }
                        }
                    }
                }
                let lost = flow.lost();
                update(&|r| r.lost = lost);
                Ok(())
            }));
        }
        for _ in 0..n {
            wait.recv_timeout(probe.timeout * 3).context("a flow neither connects nor fails")?;
        }
        Ok(Flows { stop, reports, threads })
    }

    /// How they are now.
    pub fn now(&self) -> Vec<FlowReport> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Closes them and says how they went.
    pub fn stop(mut self) -> Result<Vec<FlowReport>> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let Ok(result) = thread.join() else { bail!("a flow's thread panicked") };
            result?;
        }
        Ok(self.now())
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One echo request. `Ok` is the time it took; the error is an errno's name or `timeout`.
pub fn ping(ns: &Netns, dst: IpAddr, timeout: Duration) -> Result<Result<Duration, String>> {
    ns.enter(|| Ok(ping_here(dst, timeout)))
}

fn ping_here(dst: IpAddr, timeout: Duration) -> Result<Duration, String> {
    let (domain, protocol, request, reply) = match dst {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let go = || -> io::Result<Option<Duration>> {
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
        socket.set_read_timeout(Some(timeout))?;
        socket.connect(&SocketAddr::new(dst, 0).into())?;
        let start = Instant::now();
        socket.send(&[request, 0, 0, 0, 0, 0, 0, 1, b'm', b'e', b's', b'h'])?;
        let mut buffer = [0; 128];
        let n = (&mut &socket).read(&mut buffer)?;
        Ok((n > 0 && buffer.first() == Some(&reply)).then(|| start.elapsed()))
    };
    match go() {
        Ok(Some(took)) => Ok(took),
        Ok(None) => Err("another ICMP message".to_owned()),
        Err(e) => Err(label(&e)),
    }
}

/// A source port that nothing in this run has had lately: the kernel draws them by lot, and one that it draws twice while IPVS
/// remembers the first flow (TCP two minutes after its end, UDP five after its last packet) goes where that went, which no count
/// of a scheduler's turns expects, or has answers in that one's name (docs/coexistence.md, known limits).
fn bind_fresh(socket: &Socket, from: IpAddr) -> io::Result<()> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 32768;
    const PORTS: u16 = 28232; // net.ipv4.ip_local_port_range ends at 60999
    for _ in 0..PORTS {
        let port = FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS;
        match socket.bind(&SocketAddr::new(from, port).into()) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}
