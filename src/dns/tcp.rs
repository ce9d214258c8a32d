//! DNS over TCP (RFC 7766).

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{
    forward::Forwarder,
    handler::{Action, Handler, Transport},
};

/// A connection without a question is closed after this long (RFC 7766, 6.2.3 leaves it to the server).
const IDLE: Duration = Duration::from_secs(10);
/// A client that does not take its answer has this long.
const SLOW: Duration = Duration::from_secs(5);

/// Connections that are open, and how many may be: each is a file of the agent's.
#[derive(Debug)]
pub struct Connections {
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Connections {
    /// At most so many, and of one client at most a quarter of them.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: Mutex::default() })
    }

    fn open(self: &Arc<Self>, client: IpAddr) -> Option<Open> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = open.values().sum();
        let of_client = open.entry(client).or_default();
        if all >= self.most || *of_client >= self.most.div_ceil(4) {
            return None;
        }
        *of_client += 1;
        Some(Open { of: self.clone(), client })
    }
}

/// One open connection.
struct Open {
    of: Arc<Connections>,
    client: IpAddr,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = self.of.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = open.get_mut(&self.client) {
            *n -= 1;
            if *n == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// Answers connections.
pub(super) async fn serve_tcp(
    listener: TcpListener,
    handler: Arc<Handler<Forwarder>>,
    connections: Arc<Connections>,
) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of files, mostly: someone has to give one back first.
                tracing::debug!("DNS can't accept: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(open) = connections.open(from.ip().to_canonical()) else {
            handler.metrics.limited("connections");
            continue;
        };
        let handler = handler.clone();
        tokio::spawn(async move {
            // It ends when the client does, or takes too long.
            let _ = converse(stream, from, &handler).await;
            drop(open);
        });
    }
}

async fn converse(mut stream: TcpStream, from: SocketAddr, handler: &Handler<Forwarder>) -> io::Result<()> {
    // An answer is one write.
    stream.set_nodelay(true)?;
    let mut packet = Vec::new();
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        packet.resize(usize::from(length), 0);
        timeout(IDLE, stream.read_exact(&mut packet)).await??;
        let reply = match handler.handle(&packet, from, Transport::Tcp) {
            Action::Reply(reply) => reply,
            Action::Ignore => return Ok(()),
            Action::Forward(asked) => {
                let Some(elsewhere) = &handler.elsewhere else { return Ok(()) };
                let answer = elsewhere.lookup(&asked.query).await;
                match handler.forwarded(&asked, &answer) {
                    Action::Reply(reply) => reply,
                    _ => return Ok(()),
                }
            }
        };
        let Ok(length) = u16::try_from(reply.len()) else { return Ok(()) };
        let mut bytes = Vec::with_capacity(reply.len() + 2);
        bytes.extend(length.to_be_bytes());
        bytes.extend(reply);
        timeout(SLOW, stream.write_all(&bytes)).await??;
    }
}
