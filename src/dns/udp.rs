//! Sockets by which upstreams are asked.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hickory_net::runtime::{DnsUdpSocket, RuntimeProvider, TokioRuntimeProvider, TokioTime};
use tokio::{io::ReadBuf, net::UdpSocket};

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
            Ok(Connected(socket))
        })
    }
}

/// A socket that has one peer.
pub(super) struct Connected(UdpSocket);

impl DnsUdpSocket for Connected {
    type Time = TokioTime;

    /// That nobody listens there now is no answer: an upstream that is being started anew is asked again in a moment.
    fn poll_recv_from(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut buffer = ReadBuf::new(buffer);
        loop {
            match ready!(self.0.poll_recv_from(cx, &mut buffer)) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                read => return Poll::Ready(read.map(|from| (buffer.filled().len(), from))),
            }
        }
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, bytes: &[u8], _: SocketAddr) -> Poll<io::Result<usize>> {
        self.0.poll_send(cx, bytes)
    }
}
