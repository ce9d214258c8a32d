//! The socket: sending, receiving, waiting no longer than asked, and losing track of nothing.

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::libc::{ENOBUFS, MSG_DONTWAIT, MSG_TRUNC};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// The kernel builds dumps of up to 32 KiB when the reader offers as much.
const DATAGRAM: usize = 64 * 1024;

/// Longest wait that can be asked for; keeps the arithmetic on deadlines in range.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What a datagram socket does for us; tests put a scripted kernel in its place.
pub(super) trait Transport: Send {
    /// Sends one datagram.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Receives one datagram into `buffer`, and says how long it was: more than what `buffer` got if it did
    /// not fit. `WouldBlock` after the timeout, or at once where `wait` is false.
    fn receive(&mut self, buffer: &mut Vec<u8>, wait: bool) -> io::Result<usize>;
    /// How long [`receive`](Transport::receive) waits.
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()>;
}

/// The kernel's socket.
pub(super) struct KernelSocket(Socket);

impl KernelSocket {
    /// In the network namespace of the calling thread. `receive_buffer` is in bytes; the kernel doubles it,
    /// and caps it at `net.core.rmem_max` for those without `CAP_NET_ADMIN`.
    pub fn open(receive_buffer: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        // Words with errors, and no copy of our requests in the answers: so answers are small.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        if setsockopt(&socket, sockopt::RcvBufForce, &receive_buffer).is_err() {
            socket.set_rx_buf_sz(i32::try_from(receive_buffer).unwrap_or(i32::MAX))?;
        }
        Ok(Self(socket))
    }

    /// Size of the receive buffer as the kernel counts it, in bytes.
    pub fn receive_buffer(&self) -> io::Result<usize> {
        self.0.get_rx_buf_sz()
    }
}

impl Transport for KernelSocket {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.0.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self, buffer: &mut Vec<u8>, wait: bool) -> io::Result<usize> {
        let flags = if wait { MSG_TRUNC } else { MSG_TRUNC | MSG_DONTWAIT };
        loop {
            buffer.clear();
            let (length, sender) = self.0.recv_from(buffer, flags)?;
            // Port 0 is the kernel; other processes could write to us as well.
            if sender.port_number() == 0 {
                return Ok(length);
            }
        }
    }

    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        // A timeout of 0 would mean none.
        let timeout = timeout.max(Duration::from_millis(1));
        let seconds = timeout.as_secs().try_into().unwrap_or(i32::MAX.into());
        let value = TimeVal::new(seconds, timeout.subsec_micros().into());
        setsockopt(&self.0, sockopt::ReceiveTimeout, &value)?;
        setsockopt(&self.0, sockopt::SendTimeout, &value)?;
        Ok(())
    }
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// A datagram: see [`Link::datagram`].
    Datagram,
    /// Something was dropped: our buffer was full, or a datagram did not fit.
    Lost,
    /// Nothing, for as long as was to be waited.
    Nothing,
}

/// A transport with a buffer and sequence numbers.
pub(super) struct Link {
    transport: Box<dyn Transport>,
    buffer: Vec<u8>,
    sequence: u32,
    timeout: Duration,
    /// Answers to an earlier request may still come.
    dirty: bool,
}

impl Link {
    pub fn new(mut transport: Box<dyn Transport>, timeout: Duration) -> io::Result<Self> {
        let timeout = timeout.min(LONGEST);
        transport.set_timeout(timeout)?;
        Ok(Self { transport, buffer: Vec::with_capacity(DATAGRAM), sequence: 0, timeout, dirty: false })
    }

    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    pub fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.min(LONGEST);
        self.transport.set_timeout(timeout)?;
        self.timeout = timeout;
        Ok(())
    }

    /// The next number for a request; 0 is what the kernel uses for messages of its own.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    /// Notes that answers may be left over, so that the next request takes them off first.
    pub fn set_dirty(&mut self) {
        self.dirty = true;
    }

    /// The datagram received last.
    pub fn datagram(&self) -> &[u8] {
        &self.buffer
    }

    /// Sends, after throwing away what earlier requests left behind.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.dirty {
            self.drain()?;
            self.dirty = false;
        }
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.transport.send(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted && Instant::now() < deadline => {}
                other => return other,
            }
        }
    }

    /// Receives one datagram, waiting no longer than the timeout, signals or not.
    pub fn receive(&mut self, wait: bool) -> io::Result<Received> {
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.transport.receive(&mut self.buffer, wait) {
                Ok(length) if length > self.buffer.len() => {
                    self.buffer.reserve(length);
                    return Ok(Received::Lost);
                }
                Ok(_) => return Ok(Received::Datagram),
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => return Ok(Received::Lost),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    if Instant::now() >= deadline {
                        return Ok(Received::Nothing);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads until nothing is left. A dump goes on while it is read, so this ends one that was given up.
    fn drain(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + self.timeout;
        while self.receive(false)? != Received::Nothing {
            if Instant::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }
}
