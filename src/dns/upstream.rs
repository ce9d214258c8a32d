//! Looks whether upstreams answer, and whether one of them is ourselves.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RecordType},
};
use tokio::net::UdpSocket;

use super::choice::Random;
use crate::metrics::DnsMetrics;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);
/// An upstream has this long to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// The zone of what is asked. RFC 6761, 6.4: no resolver has names in it, and most don't ask anyone else.
const ZONE: &str = "meshlb-probe.invalid.";

/// Looks at all upstreams.
#[derive(Debug)]
pub struct Probe(Vec<Watched>);

/// One upstream and what it is asked. A question that comes back to us shows a loop.
#[derive(Debug)]
struct Watched {
    upstream: SocketAddr,
    name: Name,
    /// The question has come back since it was asked.
    echoed: AtomicBool,
    looped: AtomicBool,
    down: AtomicBool,
}

impl Probe {
    /// Of these upstreams.
    pub fn new(upstreams: &[SocketAddr]) -> Self {
        let mut random = Random::default();
        let watched = upstreams.iter().map(|upstream| Watched {
            upstream: *upstream,
            // Labels of letters, digits and dashes are a name.
            name: Name::from_ascii(format!("{:016x}.{ZONE}", random.number())).unwrap_or_default(),
            echoed: AtomicBool::new(false),
            looped: AtomicBool::new(false),
            down: AtomicBool::new(false),
        });
        Self(watched.collect())
    }

    /// Whether a question is one of these; that it was asked is remembered.
    pub fn is_echo(&self, name: &Name) -> bool {
        let echo = self.0.iter().find(|w| w.name == *name);
        if let Some(watched) = echo {
            watched.echoed.store(true, Ordering::Relaxed);
        }
        echo.is_some()
    }

    /// Whether a client is an upstream that forwards to us what we forward to it.
    pub fn is_loop(&self, client: IpAddr) -> bool {
        self.0.iter().any(|w| w.upstream.ip() == client && w.looped.load(Ordering::Relaxed))
    }

    /// What is wrong with upstreams at present.
    pub fn problems(&self) -> Vec<String> {
        let mut out = Vec::new();
        for watched in &self.0 {
            let upstream = watched.upstream;
            if watched.down.load(Ordering::Relaxed) {
                out.push(format!("DNS upstream {upstream} does not answer"));
            }
            if watched.looped.load(Ordering::Relaxed) {
                out.push(format!(
                    "DNS upstream {upstream} sends our own questions back to us, a loop: what it asks is refused but for \
                     our zone; take it out of --dns-upstream, or have it forward only our zone here"
                ));
            }
        }
        out
    }

    /// Looks at all of them again and again.
    pub async fn watch(&self, metrics: &DnsMetrics) {
        futures::future::join_all(self.0.iter().map(|watched| watched.watch(metrics))).await;
    }
}

impl Watched {
    async fn watch(&self, metrics: &DnsMetrics) {
        loop {
            self.echoed.store(false, Ordering::Relaxed);
            let answer = tokio::time::timeout(PATIENCE, self.ask(self.upstream)).await;
            let up = matches!(answer, Ok(Ok(())));
            metrics.upstream_up(&self.upstream.to_string(), up);
            self.down.store(!up, Ordering::Relaxed);
            self.looped.store(self.echoed.load(Ordering::Relaxed), Ordering::Relaxed);
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn ask(&self, upstream: SocketAddr) -> std::io::Result<()> {
        let mut request = Message::query();
        let id = request.metadata.id;
        request.metadata.recursion_desired = true;
        request.add_query(Query::query(self.name.clone(), RecordType::A));
        let bytes = request.to_vec().map_err(std::io::Error::other)?;
        let any: SocketAddr = if upstream.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(upstream).await?;
        let mut buffer = [0; 512];
        // A datagram may get lost.
        for _ in 0..2 {
            socket.send(&bytes).await?;
            let read = tokio::time::timeout(PATIENCE / 3, socket.recv(&mut buffer)).await;
            match read {
                Ok(Ok(n)) if n >= 2 && buffer[..2] == id.to_be_bytes() => return Ok(()),
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(e)) => return Err(e),
            }
        }
        Err(std::io::ErrorKind::TimedOut.into())
    }
}
