//! The sockets and the thread that serves them. Whatever goes wrong here is told and tried again; the rest of the agent goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::Notify,
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    counted::Counted,
    forward::{ForwardConfig, Forwarder},
    handler::{Action, Handler, Shared, Transport},
    limit::{Allowed, Rate},
    places::Places,
    table::Table,
    tcp::serve_tcp,
    upstream::Probe,
    zone::Zone,
};
use crate::metrics::DnsMetrics;

/// So long questions about our names go unanswered while the source has not told everything; after that, SERVFAIL.
const WAIT_FOR_SOURCE: Duration = Duration::from_secs(20);
/// An address that can't be had is tried again this often.
const RETRY: Duration = Duration::from_secs(5);
/// Packets that are read before others get a turn.
const AT_ONCE: usize = 64;
/// Asked of the kernel, which may give less: bursts wait there, and answers to a neighbour that has to be found first.
const BUFFER: usize = 4 << 20;

/// How it is served.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where.
    pub listen: Vec<SocketAddr>,
    /// To whom, besides this node.
    pub allow: Vec<IpNet>,
    /// Answers a second by UDP that a client gets; 0 is no limit.
    pub rate: u32,
    /// What is looked up elsewhere.
    pub forward: ForwardConfig,
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
}

type Handle = Handler<Forwarder>;

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
            // A lookup is up to six sockets: three sendings to two upstreams.
            let most = (files / 24).clamp(64, 1024);
            let forwarder = Forwarder::new(&config.forward, most, probe.clone(), metrics.clone());
            Some(Arc::new(forwarder.map_err(io::Error::other)?))
        };
        let shared = Arc::new(Shared {
            table: ArcSwap::from_pointee(Table::new(zone)),
            node: ArcSwap::from_pointee(node),
        });
        let server = Self {
            shared: shared.clone(),
            told: Arc::default(),
            problems: Arc::default(),
            probe,
            metrics: metrics.clone(),
            ended: Arc::default(),
        };
        let handler = Arc::new(Handler {
            shared,
            elsewhere,
            allowed: Allowed::new(config.allow.clone()),
            rate: Rate::new(config.rate),
            metrics,
            patient_until: Instant::now() + WAIT_FOR_SOURCE,
        });
        let connections = Places::new((files / 8).clamp(32, 4096), 4);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (listen, own) = (config.listen.clone(), server.clone());
        std::thread::Builder::new().name("dns".into()).spawn(move || {
            let counted = Counted(own.metrics.clone());
            let _recorder = ::metrics::set_default_local_recorder(&counted);
            let ended = own.ended.clone();
            runtime.block_on(async {
                tokio::select! {
                    () = own.run(listen, handler, connections) => {}
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

    /// Replaces the node's own addresses.
    pub fn set_node(&self, addresses: BTreeSet<IpAddr>) {
        self.shared.node.store(Arc::new(addresses));
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

    async fn run(self, listen: Vec<SocketAddr>, handler: Arc<Handle>, connections: Arc<Places>) {
        let told = self.told.clone();
        tokio::spawn(async move {
            if tokio::time::timeout(WAIT_FOR_SOURCE, told.notified()).await.is_err() {
                warn!("DNS answers SERVFAIL for services until the source has been read");
            }
        });
        let probe = self.probe.clone();
        let metrics = self.metrics.clone();
        tokio::spawn(async move { probe.watch(&metrics).await });
        let serving = listen.into_iter().map(|address| {
            let (server, handler, connections) = (self.clone(), handler.clone(), connections.clone());
            async move { server.keep(address, handler, connections).await }
        });
        futures::future::join_all(serving).await;
    }

    /// Serves an address, again and again.
    async fn keep(&self, address: SocketAddr, handler: Arc<Handle>, connections: Arc<Places>) {
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
                    both.spawn(serve_udp(udp, handler.clone()));
                    both.spawn(serve_tcp(tcp, handler.clone(), connections.clone()));
                    let ended = both.join_next().await;
                    // Neither socket may be left, or the address can't be had again.
                    both.shutdown().await;
                    format!("DNS on {address} has ended: {ended:?}")
                }
                // A node without IPv6.
                Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                    info!("no DNS on {address}: {e}");
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
fn bind(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
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
    Ok((UdpSocket::from_std(udp.into())?, TcpListener::from_std(tcp.into())?))
}

async fn serve_udp(socket: UdpSocket, handler: Arc<Handle>) {
    let socket = Arc::new(socket);
    // The largest datagram: a query that was cut would be another one.
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let mut read = match socket.recv_from(&mut buffer).await {
            Ok(read) => Some(read),
            Err(e) => {
                tracing::debug!("DNS can't receive: {e}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                None
            }
        };
        let mut n_read = 0;
        while let Some((n, from)) = read {
            match handler.handle(&buffer[..n], from, Transport::Udp) {
                Action::Ignore => {}
                Action::Later => handler.metrics.limited("early"),
                Action::Reply(reply) => send(&socket, &reply, from, &handler.metrics),
                Action::Forward(asked) => {
                    let (socket, handler) = (socket.clone(), handler.clone());
                    tokio::spawn(async move {
                        let Some(elsewhere) = &handler.elsewhere else { return };
                        let answer = elsewhere.lookup(&asked.query, from.ip()).await;
                        if let Action::Reply(reply) = handler.forwarded(&asked, &answer) {
                            send(&socket, &reply, from, &handler.metrics);
                        }
                    });
                }
            }
            n_read += 1;
            // What is read is answered: the last one of a round must not read another.
            read = if n_read < AT_ONCE { socket.try_recv_from(&mut buffer).ok() } else { None };
        }
        tokio::task::yield_now().await;
    }
}

/// An answer that can't be sent at once is lost: waiting for it would be waiting for a neighbour that may not be there, whom
/// anybody can name as the sender.
fn send(socket: &UdpSocket, reply: &[u8], to: SocketAddr, metrics: &DnsMetrics) {
    match socket.try_send_to(reply, to) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => metrics.limited("send"),
        Err(e) => tracing::debug!("DNS can't answer {to}: {e}"),
        Ok(_) => {}
    }
}

/// Lets this process have as many files as it may: each forwarded lookup and each connection is one. Gives how many.
fn more_files() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    // More than this is of no use, and some programs that we start close every number below the limit.
    let want = hard.min(65_536).max(soft);
    let now = if setrlimit(Resource::RLIMIT_NOFILE, want, hard).is_ok() { want } else { soft };
    usize::try_from(now).unwrap_or(usize::MAX)
}
