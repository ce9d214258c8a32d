//! The sockets and the thread that serves them. Whatever goes wrong here is told and tried again; the rest of the agent goes on.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::Interest,
    net::{TcpListener, UdpSocket},
    sync::Notify,
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    answer::Answer,
    forward::{ForwardConfig, Forwarder, Found},
    handler::{Action, Asked, Handler, Shared, Transport},
    limit::{Allowed, Rate},
    places::Places,
    ports::lookups,
    table::Table,
    tcp::serve_tcp,
    upstream::Probe,
    waiting::Budget,
    zone::Zone,
};
use crate::metrics::DnsMetrics;

/// So long questions about our names go unanswered while the source has not told everything; after that, SERVFAIL.
const WAIT_FOR_SOURCE: Duration = Duration::from_secs(20);
/// An address that can't be had is tried again this often.
const RETRY: Duration = Duration::from_secs(5);
/// Packets that are read before others get a turn.
const AT_ONCE: usize = 64;
/// So often does the second thread read before it has to be called again.
const ROUNDS: usize = 16;
/// Asked of the kernel, which may give less: bursts wait there, and answers to a neighbour that has to be found first.
const BUFFER: usize = 4 << 20;

/// How it is served.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where.
    pub listen: Vec<SocketAddr>,
    /// To whom, besides this node.
    pub allow: Vec<IpNet>,
    /// And to whom at addresses that others than this node and its pods reach, where those are fewer.
    pub allow_outside: Option<Vec<IpNet>>,
    /// Addresses that others do not reach.
    pub inside: Vec<IpAddr>,
    /// And to its pods, whose ranges the source says ([`Server::set_node`]).
    pub allow_pods: bool,
    /// Answers a second by UDP that a client gets; 0 is no limit.
    pub rate: u32,
    /// What is looked up elsewhere.
    pub forward: ForwardConfig,
    /// Services and aliases that there were when names were answered last, in lower case.
    pub remembered: HashSet<Vec<u8>>,
    /// Ports that the node has for who asks others.
    pub ports: usize,
}

impl Config {
    /// The first address that others than this node and its pods reach.
    pub fn outside(&self) -> Option<SocketAddr> {
        self.listen.iter().find(|at| !self.inside.contains(&at.ip())).copied()
    }
}

/// A running server.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
    told: Arc<Notify>,
    problems: Arc<Mutex<BTreeMap<SocketAddr, String>>>,
    probe: Arc<Probe>,
    metrics: DnsMetrics,
    ended: Arc<Notify>,
    allow_pods: bool,
}

type Handle = Handler<Forwarder>;

/// What all addresses share.
struct Serving {
    handler: Arc<Handle>,
    /// For addresses that others reach.
    outside: Arc<Handle>,
    inside: Vec<IpAddr>,
    connections: Arc<Places>,
    /// Bytes of answers that wait for clients to take them.
    waiting: Arc<Budget>,
    more: Option<SyncSender<Arc<Asking>>>,
}

impl Server {
    /// Starts serving, on a thread of its own, until [`Self::stop`]. Names are answered as soon as there are any
    /// ([`Self::publish`]). `node` are the node's own addresses, which may ask whatever they are.
    ///
    /// # Errors
    /// The thread can't be made, or an upstream's address can't be used.
    pub fn start(
        config: &Config,
        zone: Arc<Zone>,
        node: BTreeSet<IpAddr>,
        metrics: DnsMetrics,
    ) -> io::Result<Self> {
        let files = more_files();
        let probe = Arc::new(Probe::new(&config.forward.all()));
        let elsewhere = if config.forward.is_empty() {
            None
        } else {
            let most = lookups(files, config.ports);
            let forwarder = Forwarder::new(&config.forward, &zone.name, most, probe.clone(), metrics.clone());
            Some(Arc::new(forwarder.map_err(io::Error::other)?))
        };
        let shared = Arc::new(Shared {
            table: ArcSwap::from_pointee(Table::new(zone)),
            node: ArcSwap::from_pointee(node),
            pods: if config.allow_pods {
                ArcSwapOption::empty()
            } else {
                ArcSwapOption::from_pointee(Allowed::default())
            },
        });
        let server = Self {
            shared: shared.clone(),
            told: Arc::default(),
            problems: Arc::default(),
            probe,
            metrics: metrics.clone(),
            ended: Arc::default(),
            allow_pods: config.allow_pods,
        };
        let patient_until = Instant::now() + WAIT_FOR_SOURCE;
        let answering = |allow: &[IpNet]| {
            Arc::new(Handler {
                shared: shared.clone(),
                elsewhere: elsewhere.clone(),
                allowed: Allowed::new(allow.to_vec()),
                rate: Rate::new(config.rate),
                metrics: metrics.clone(),
                patient_until,
                remembered: config.remembered.clone(),
            })
        };
        let serving = Serving {
            handler: answering(&config.allow),
            outside: answering(config.allow_outside.as_ref().unwrap_or(&config.allow)),
            inside: config.inside.clone(),
            connections: Places::new((files / 8).clamp(32, 4096), 4),
            waiting: Arc::default(),
            more: second_reader(),
        };
        // What the second thread has others asked comes by a queue that is looked at after so many tasks of this one's.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().global_queue_interval(4).build()?;
        let (listen, own) = (config.listen.clone(), server.clone());
        std::thread::Builder::new().name("dns".into()).spawn(move || {
            let ended = own.ended.clone();
            runtime.block_on(async {
                tokio::select! {
                    () = own.run(listen, serving) => {}
                    () = ended.notified() => {}
                }
            });
        })?;
        Ok(server)
    }

    /// Replaces what is answered.
    pub fn publish(&self, table: Arc<Table>) {
        self.metrics.names.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
        let synced = table.is_synced();
        self.shared.table.store(table);
        if synced {
            self.told.notify_one();
        }
    }

    /// Ends serving: the addresses are free again a moment later.
    pub fn stop(&self) {
        self.ended.notify_one();
    }

    /// Takes over the node's own addresses, and the ranges of its pods, where the source has said them.
    pub fn set_node(&self, addresses: &BTreeSet<IpAddr>, pods: Option<&[IpNet]>) {
        if **self.shared.node.load() != *addresses {
            self.shared.node.store(Arc::new(addresses.clone()));
        }
        if let Some(pods) = pods.filter(|_| self.allow_pods) {
            let pods = Allowed::new(pods.to_vec());
            if self.shared.pods.load().as_deref() != Some(&pods) {
                self.shared.pods.store(Some(Arc::new(pods)));
            }
        }
    }

    /// What is wrong at present.
    pub fn problems(&self) -> Vec<String> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out: Vec<_> = problems.values().cloned().collect();
        out.extend(self.probe.problems());
        out
    }

    fn tell(&self, address: SocketAddr, problem: Option<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => drop(problems.insert(address, problem)),
            None => {
                problems.remove(&address);
                info!("DNS on {address}");
            }
        }
    }

    async fn run(self, listen: Vec<SocketAddr>, serving: Serving) {
        let told = self.told.clone();
        tokio::spawn(async move {
            if tokio::time::timeout(WAIT_FOR_SOURCE, told.notified()).await.is_err() {
                warn!("DNS answers SERVFAIL for services until the source has been read");
            }
        });
        let probe = self.probe.clone();
        let metrics = self.metrics.clone();
        tokio::spawn(async move { probe.watch(&metrics).await });
        if let Some(elsewhere) = serving.handler.elsewhere.clone() {
            tokio::spawn(async move { elsewhere.watch().await });
        }
        let all = listen.into_iter().map(|address| self.keep(address, &serving));
        futures::future::join_all(all).await;
    }

    /// Serves an address, again and again.
    async fn keep(&self, address: SocketAddr, serving: &Serving) {
        let text = address.to_string();
        loop {
            let sockets = bind(address);
            for transport in ["udp", "tcp"] {
                self.metrics.listening(&text, transport, sockets.is_ok());
            }
            let ended = match sockets {
                Ok((udp, tcp)) => {
                    self.tell(address, None);
                    let mut both = JoinSet::new();
                    let inside = serving.inside.contains(&address.ip());
                    let handler = if inside { &serving.handler } else { &serving.outside }.clone();
                    let asking =
                        Asking { udp, handler: handler.clone(), runtime: tokio::runtime::Handle::current() };
                    both.spawn(serve_udp(Arc::new(asking), serving.more.clone()));
                    both.spawn(serve_tcp(tcp, handler, serving.connections.clone(), serving.waiting.clone()));
                    let ended = both.join_next().await;
                    // Neither socket may be left, or the address can't be had again.
                    both.shutdown().await;
                    format!("DNS on {address} has ended: {ended:?}")
                }
                // A node without IPv6.
                Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                    info!("no DNS on {address}: {e}");
                    self.metrics.not_listening(&text);
                    return;
                }
                Err(e) => format!("DNS can't be served on {address}: {e}"),
            };
            self.tell(address, Some(ended));
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Sockets of both kinds. The address need not be there yet: the route that makes it ours may come later, and may go.
fn bind(address: SocketAddr) -> io::Result<(Udp, TcpListener)> {
    let socket = |kind, protocol| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        } else {
            socket.set_freebind_v4(true)?;
        }
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let udp = socket(Type::DGRAM, Protocol::UDP)?;
    // The right to have more than net.core.rmem_max and wmem_max is the agent's, mostly.
    if setsockopt(&udp, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = udp.set_recv_buffer_size(BUFFER);
    }
    if setsockopt(&udp, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = udp.set_send_buffer_size(BUFFER);
    }
    udp.bind(&address.into())?;
    let tcp = socket(Type::STREAM, Protocol::TCP)?;
    // Connections of the process before may still be closing.
    tcp.set_reuse_address(true)?;
    tcp.bind(&address.into())?;
    tcp.listen(1024)?;
    let udp = Udp { plain: udp.try_clone()?.into(), waiting: UdpSocket::from_std(udp.into())? };
    Ok((udp, TcpListener::from_std(tcp.into())?))
}

/// A socket as the runtime waits for it and, a copy of it, as it is read and written without waiting.
struct Udp {
    waiting: UdpSocket,
    plain: std::net::UdpSocket,
}

/// Where questions come from, and who answers them.
struct Asking {
    udp: Udp,
    handler: Arc<Handle>,
    /// The runtime that looks names up elsewhere.
    runtime: tokio::runtime::Handle,
}

impl Asking {
    /// Reads so many packets and answers them.
    ///
    /// # Errors
    /// `WouldBlock` when there is none left; anything else that kept it from reading.
    fn round(self: &Arc<Self>, buffer: &mut [u8], most: usize) -> io::Result<()> {
        for _ in 0..most {
            let (n, from) = self.udp.plain.recv_from(buffer)?;
            self.answer(buffer.get(..n).unwrap_or_default(), from);
        }
        Ok(())
    }

    fn answer(self: &Arc<Self>, bytes: &[u8], from: SocketAddr) {
        match self.handler.handle(bytes, from, Transport::Udp) {
            Action::Ignore => {}
            Action::Later(_) => self.handler.metrics.limited("early"),
            Action::Reply(reply) => self.send(&reply, from),
            Action::Forward(asked) => {
                let Some(elsewhere) = &self.handler.elsewhere else { return };
                // Here, and not in a task: what has no place must not be kept, and what is known has to wait for nothing.
                match elsewhere.find(&asked.query, from.ip()) {
                    Found::Answer(answer) => self.forwarded(asked, &answer, from),
                    Found::Later(lookup) => {
                        let own = Arc::clone(self);
                        self.runtime.spawn(async move {
                            let answer = lookup.answer().await;
                            own.forwarded(asked, &answer, from);
                        });
                    }
                    // A resolver asks again after silence, when there may be a place; SERVFAIL it takes as final, or it asks again
                    // at once, and that of everyone would be a storm.
                    Found::NoPlace => {}
                }
            }
        }
    }

    fn forwarded(&self, asked: Box<Asked>, answer: &Answer, from: SocketAddr) {
        match self.handler.forwarded(asked, answer) {
            Action::Reply(reply) => self.send(&reply, from),
            Action::Later(_) => self.handler.metrics.limited("early"),
            Action::Ignore | Action::Forward(_) => {}
        }
    }

    /// An answer that can't be sent at once is lost: waiting for it would be waiting for a neighbour that may not be there, whom
    /// anybody can name as the sender.
    fn send(&self, reply: &[u8], to: SocketAddr) {
        match self.udp.plain.send_to(reply, to) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.handler.metrics.limited("send"),
            Err(e) => tracing::debug!("DNS can't answer {to}: {e}"),
            Ok(_) => {}
        }
    }
}

/// The largest datagram: a query that was cut would be another one.
fn buffer() -> Vec<u8> {
    vec![0; usize::from(u16::MAX)]
}

/// Reads until the runtime drops it. While there is more than it answers in a round, a second thread reads too.
async fn serve_udp(asking: Arc<Asking>, more: Option<SyncSender<Arc<Asking>>>) {
    let mut buffer = buffer();
    loop {
        let read = match asking.udp.waiting.readable().await {
            // The runtime learns from WouldBlock that there is nothing left.
            Ok(()) => asking.udp.waiting.try_io(Interest::READABLE, || asking.round(&mut buffer, AT_ONCE)),
            Err(e) => Err(e),
        };
        match read {
            Ok(()) => {
                if let Some(more) = &more {
                    let _ = more.try_send(asking.clone());
                }
                tokio::task::yield_now().await;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                tracing::debug!("DNS can't receive: {e}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// A thread that reads where there is more than one can answer; none where there is one processor only. It ends with its sender.
fn second_reader() -> Option<SyncSender<Arc<Asking>>> {
    std::thread::available_parallelism().ok().filter(|n| n.get() > 1)?;
    let (sender, receiver) = sync_channel::<Arc<Asking>>(1);
    let read = move || {
        let mut buffer = buffer();
        while let Ok(asking) = receiver.recv() {
            // Not for ever: what it holds is the address, and who wants it back has to get it.
            let _ = (0..ROUNDS).try_for_each(|_| asking.round(&mut buffer, AT_ONCE));
        }
    };
    std::thread::Builder::new().name("dns-more".into()).spawn(read).ok().map(|_| sender)
}

/// Lets this process have as many files as it may: each forwarded lookup and each connection is one. Gives how many.
pub(super) fn more_files() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    // More than this is of no use, and some programs that we start close every number below the limit.
    let want = hard.min(65_536).max(soft);
    let now = if setrlimit(Resource::RLIMIT_NOFILE, want, hard).is_ok() { want } else { soft };
    usize::try_from(now).unwrap_or(usize::MAX)
}
