//! DNS over TCP (RFC 7766).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{
        OwnedSemaphorePermit, Semaphore,
        mpsc::{Receiver, Sender, channel},
    },
    time::timeout,
    try_join,
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

/// Questions of one connection that are answered at a time.
const AT_ONCE: usize = 16;

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

/// Answers the questions of a connection, several at a time and each as soon as it can be (RFC 7766, 6.2.1.1).
async fn converse(mut stream: TcpStream, from: SocketAddr, handler: &Handler<Forwarder>) -> io::Result<()> {
    // An answer is one write.
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.split();
    let (asked, questions) = channel(1);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    try_join!(read(reader, places, asked), answer(writer, questions, from, handler))?;
    Ok(())
}

/// A question, and its place among those of its connection.
type Question = (Vec<u8>, OwnedSemaphorePermit);

/// Reads until the client ends. Who has asked enough at once is read no further until it has an answer.
async fn read(mut from: ReadHalf<'_>, places: Arc<Semaphore>, to: Sender<Question>) -> io::Result<()> {
    loop {
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let length = match timeout(IDLE, from.read_u16()).await {
            Ok(Ok(length)) => length,
            // What has been asked is answered all the same.
            Ok(Err(_)) | Err(_) => return Ok(()),
        };
        let mut packet = vec![0; usize::from(length)];
        timeout(IDLE, from.read_exact(&mut packet)).await??;
        to.send((packet, place)).await.map_err(io::Error::other)?;
    }
}

/// Writes answers as they come, until there are no more questions.
async fn answer(
    mut to: WriteHalf<'_>,
    mut questions: Receiver<Question>,
    from: SocketAddr,
    handler: &Handler<Forwarder>,
) -> io::Result<()> {
    let mut running = FuturesUnordered::new();
    let mut more = true;
    loop {
        tokio::select! {
            question = questions.recv(), if more => match question {
                Some((packet, place)) => running.push(async move {
                    let reply = reply(&packet, from, handler).await;
                    drop(place);
                    reply
                }),
                None => more = false,
            },
            Some(reply) = running.next() => {
                // What has no answer ends the connection: silence would have the client wait.
                let reply = reply.ok_or(io::ErrorKind::ConnectionAborted)?;
                let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
                let mut bytes = Vec::with_capacity(reply.len() + 2);
                bytes.extend(length.to_be_bytes());
                bytes.extend(reply);
                timeout(SLOW, to.write_all(&bytes)).await??;
            }
            else => return Ok(()),
        }
    }
}

/// The answer to one question.
async fn reply(packet: &[u8], from: SocketAddr, handler: &Handler<Forwarder>) -> Option<Vec<u8>> {
    let patience = Instant::now() + EARLY;
    loop {
        let action = match handler.handle(packet, from, Transport::Tcp) {
            Action::Forward(asked) => {
                let answer = handler.elsewhere.as_ref()?.lookup(&asked.query, from.ip()).await;
                handler.forwarded(&asked, answer)
            }
            other => other,
        };
        match action {
            Action::Reply(reply) => return Some(reply),
            // Silence is what makes a client ask again by UDP; here it would be an end, which clients take as final.
            Action::Later if Instant::now() < patience => tokio::time::sleep(EARLY / 50).await,
            Action::Later => {
                handler.metrics.limited("early");
                return None;
            }
            Action::Ignore | Action::Forward(_) => return None,
        }
    }
}
