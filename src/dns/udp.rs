//! Sockets by which upstreams are asked.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use hickory_net::runtime::{DnsUdpSocket, RuntimeProvider, TokioRuntimeProvider, TokioTime};
use tokio::{
    io::ReadBuf,
    net::UdpSocket,
    time::{Sleep, sleep},
};

use super::message::HEADER;

/// A datagram may get lost: without an answer it is sent again after this long.
const AGAIN: Duration = Duration::from_millis(600);
/// So often.
const TIMES: u8 = 2;

/// Tokio, but for UDP sockets: each is connected to the upstream that it asks. The kernel chooses its port, out of those that are
/// nobody's to listen on (`net.ipv4.ip_local_port_range`); it takes packets of the upstream alone; and it is no listener, which
/// would hold a published port of that number ([`crate::dataplane::Listener`]).
#[derive(Clone, Default)]
pub(super) struct Connecting(TokioRuntimeProvider);

impl RuntimeProvider for Connecting {
    type Handle = <TokioRuntimeProvider as RuntimeProvider>::Handle;
    type Timer = <TokioRuntimeProvider as RuntimeProvider>::Timer;
    type Udp = Connected;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.0.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        from: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        self.0.connect_tcp(server, from, timeout)
    }

    fn bind_udp(
        &self,
        from: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Connected>>>> {
        Box::pin(async move {
            let socket = UdpSocket::bind(from).await?;
            socket.connect(server).await?;
            Ok(Connected { socket, asked: Mutex::default(), again: Mutex::default() })
        })
    }
}

/// A socket that has one peer. What is sent again is sent by the same one, which an answer to the first sending comes to as well: a
/// socket for each sending would be as many ports, of which a node has no more than for its own connections.
pub(super) struct Connected {
    socket: UdpSocket,
    /// What was sent last.
    asked: Mutex<Vec<u8>>,
    again: Mutex<Option<Again>>,
}

/// When what has been sent and not been answered is sent again.
struct Again {
    /// How often it may yet be sent.
    left: u8,
    next: Pin<Box<Sleep>>,
}

impl Connected {
    /// Sends it again where it is time, and sees to it that it is called when it will be.
    fn poll_again(&self, cx: &mut Context<'_>) {
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(sent) = &mut *again {
            if sent.next.as_mut().poll(cx).is_pending() {
                return;
            }
            // What can't be sent is lost, as anything may be.
            let _ = self.socket.try_send(&self.asked.lock().unwrap_or_else(PoisonError::into_inner));
            match sent.left.checked_sub(1).filter(|left| *left > 0) {
                Some(left) => (sent.left, sent.next) = (left, Box::pin(sleep(AGAIN))),
                None => *again = None,
            }
        }
    }
}

impl DnsUdpSocket for Connected {
    type Time = TokioTime;

    /// That nobody listens there now is no answer: an upstream that is being started anew is asked again in a moment.
    fn poll_recv_from(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<(usize, SocketAddr)>> {
        self.poll_again(cx);
        loop {
            let mut read = ReadBuf::new(&mut *buffer);
            match ready!(self.socket.poll_recv_from(cx, &mut read)) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(e) => return Poll::Ready(Err(e)),
                Ok(from) => {
                    let n = read.filled().len();
                    let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
                    return Poll::Ready(Ok((with_question(buffer, n, &asked).unwrap_or(n), from)));
                }
            }
        }
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, bytes: &[u8], _: SocketAddr) -> Poll<io::Result<usize>> {
        let sent = ready!(self.socket.poll_send(cx, bytes));
        if sent.is_ok() {
            bytes.clone_into(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner));
            let again = Again { left: TIMES, next: Box::pin(sleep(AGAIN)) };
            *self.again.lock().unwrap_or_else(PoisonError::into_inner) = Some(again);
        }
        Poll::Ready(sent)
    }
}

/// A server that does not understand a question need not say which one it was: its answer is a header. The library takes one
/// without the question for forged, so that is put in, and this is its length then. `None` for any other answer.
fn with_question(answer: &mut [u8], length: usize, asked: &[u8]) -> Option<usize> {
    let (header, question) = (answer.get(..HEADER.min(length))?, asked.get(HEADER..)?);
    let is_of_asked = header.get(..2)? == asked.get(..2)? && header.get(2)? & 0x80 != 0;
    // FORMERR and NOTIMP.
    let is_foreign = matches!(header.get(3)? & 0x0f, 1 | 4);
    if !is_of_asked || !is_foreign || header.get(4..6)? != [0, 0] {
        return None;
    }
    // A name without compression, type and class.
    let mut end = 0;
    while let label @ 1.. = usize::from(*question.get(end)?) {
        end += 1 + label;
    }
    let question = question.get(..end + 5)?;
    answer.get_mut(HEADER..HEADER + question.len())?.copy_from_slice(question);
    answer.get_mut(4..HEADER)?.copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    Some(HEADER + question.len())
}
