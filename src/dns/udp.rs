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
            Ok(Connected { socket, again: Mutex::default() })
        })
    }
}

/// A socket that has one peer. What is sent again is sent by the same one, which an answer to the first sending comes to as well: a
/// socket for each sending would be as many ports, of which a node has no more than for its own connections.
pub(super) struct Connected {
    socket: UdpSocket,
    again: Mutex<Option<Again>>,
}

/// What has been sent and not been answered.
struct Again {
    bytes: Vec<u8>,
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
            let _ = self.socket.try_send(&sent.bytes);
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
        let mut buffer = ReadBuf::new(buffer);
        loop {
            match ready!(self.socket.poll_recv_from(cx, &mut buffer)) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                read => return Poll::Ready(read.map(|from| (buffer.filled().len(), from))),
            }
        }
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, bytes: &[u8], _: SocketAddr) -> Poll<io::Result<usize>> {
        let sent = ready!(self.socket.poll_send(cx, bytes));
        if sent.is_ok() {
            let again = Again { bytes: bytes.to_vec(), left: TIMES, next: Box::pin(sleep(AGAIN)) };
            *self.again.lock().unwrap_or_else(PoisonError::into_inner) = Some(again);
        }
        Poll::Ready(sent)
    }
}
