//! Connections of the admin server: so many at once; the oldest makes room for a new one.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// So many are open at once: kubelet, a Prometheus or two, and people. A client that keeps one open between two requests has to
/// make another one where more come.
pub(super) const MOST: usize = 64;

/// How long nothing is accepted after it failed: there are no files, mostly.
const PAUSE: Duration = Duration::from_millis(200);

/// A listener whose oldest connection is closed where there are too many.
pub(super) struct Connections {
    listener: TcpListener,
    /// A handle of each one that may be open, oldest first: it is closed when its handle is dropped.
    open: VecDeque<oneshot::Sender<()>>,
}

impl Connections {
    /// # Errors
    /// The runtime does not take the listener.
    pub(super) fn of(listener: std::net::TcpListener) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::from_std(listener)?, open: VecDeque::new() })
    }

    /// Drops the handle of the oldest one where there are more than so many.
    fn make_room(&mut self, most: usize) {
        self.open.retain(|handle| !handle.is_closed());
        if self.open.len() > most {
            self.open.pop_front();
        }
    }
}

impl Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    let (handle, closed) = oneshot::channel();
                    self.open.push_back(handle);
                    self.make_room(MOST);
                    return (Connection { stream, closed: Some(closed) }, from);
                }
                // That client has gone again.
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
                Err(e) => {
                    tracing::debug!("the admin server can't accept a connection: {e}");
                    self.make_room(0);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when its handle is dropped.
pub(super) struct Connection {
    stream: TcpStream,
    /// `None` once it has.
    closed: Option<oneshot::Receiver<()>>,
}

impl Connection {
    fn stream(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        if let Some(closed) = &mut self.closed
            && Pin::new(closed).poll(cx).is_ready()
        {
            self.closed = None;
        }
        match self.closed {
            Some(_) => Ok(Pin::new(&mut self.get_mut().stream)),
            None => Err(ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream(cx)?.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
