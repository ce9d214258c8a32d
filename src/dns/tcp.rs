//! DNS over TCP (RFC 7766).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{
    forward::Forwarder,
    handler::{Action, Handler, Transport},
    places::Places,
};

/// A connection without a question is closed after this long (RFC 7766, 6.2.3 leaves it to the server).
const IDLE: Duration = Duration::from_secs(10);
/// So long a question waits that comes before the source has been read: clients wait for five seconds (resolv.conf(5)).
const EARLY: Duration = Duration::from_secs(5);
/// A client that does not take its answer has this long.
const SLOW: Duration = Duration::from_secs(5);

/// Answers connections.
pub(super) async fn serve_tcp(listener: TcpListener, handler: Arc<Handler<Forwarder>>, places: Arc<Places>) {
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
        // Who gets no answers takes no place from those who do.
        if !handler.is_allowed(from.ip()) {
            handler.metrics.limited("client");
            continue;
        }
        let Some(place) = places.take(from.ip()) else {
            handler.metrics.limited("connections");
            continue;
        };
        let handler = handler.clone();
        tokio::spawn(async move {
            // It ends when the client does, or takes too long.
            let _ = converse(stream, from, &handler).await;
            drop(place);
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
        let mut action = handler.handle(&packet, from, Transport::Tcp);
        // Silence is what makes a client ask again by UDP; here it would be an end, which clients take as final.
        let patience = Instant::now() + EARLY;
        while matches!(action, Action::Later) && Instant::now() < patience {
            tokio::time::sleep(EARLY / 50).await;
            action = handler.handle(&packet, from, Transport::Tcp);
        }
        let reply = match action {
            Action::Reply(reply) => reply,
            Action::Ignore => return Ok(()),
            Action::Later => {
                handler.metrics.limited("early");
                return Ok(());
            }
            Action::Forward(asked) => {
                let Some(elsewhere) = &handler.elsewhere else { return Ok(()) };
                let answer = elsewhere.lookup(&asked.query, from.ip()).await;
                match handler.forwarded(&asked, answer) {
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
