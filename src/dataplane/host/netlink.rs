//! Blocking netlink requests: one socket, one request at a time.
//!
//! Messages are handed out as raw bytes. A node's tables hold things that we know nothing about, and
//! one route with a new attribute must not make all others unreadable; so callers decode message by
//! message and skip what they can't read.

use std::{io, os::fd::AsFd, time::Duration};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
};
use netlink_sys::Socket;
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::{TimeVal, TimeValLike},
    },
};

use crate::dataplane::Error;

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Message types below `NLMSG_MIN_TYPE` (linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_MIN_TYPE: u16 = 16;
/// `NLMSGERR_ATTR_MSG`: the kernel's own words.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// The kernel makes dump datagrams of at most 32 KiB; single answers are smaller.
const RECEIVE_LEN: usize = 64 * 1024;
/// An answer that takes longer than this isn't coming. Netlink answers while it handles the request,
/// so this is only about not hanging for ever.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Dumps that changed while they were read are read again at most so often.
const DUMP_TRIES: usize = 8;

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The kernel refused, with its explanation where it gives one.
    Kernel(Errno, Option<String>),
    /// The socket failed.
    Io(io::Error),
    /// The table changed while it was dumped.
    Interrupted,
    /// An answer that makes no sense.
    Garbled(&'static str),
}

impl Failure {
    /// The kernel's error number.
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Kernel(errno, _) => Some(*errno),
            Self::Io(e) => e.raw_os_error().map(Errno::from_raw),
            Self::Interrupted | Self::Garbled(_) => None,
        }
    }

    /// The one line for people: `object` is what we tried to do.
    pub(crate) fn about(self, object: impl Into<String>) -> Error {
        let object = object.into();
        let reason = match &self {
            Self::Kernel(errno, Some(words)) => format!("{} ({words})", errno.desc()),
            Self::Kernel(errno, None) => errno.desc().to_owned(),
            Self::Io(e) => e.to_string(),
            Self::Interrupted => "the table kept changing while it was read".to_owned(),
            Self::Garbled(what) => format!("unexpected answer from the kernel: {what}"),
        };
        match self.errno() {
            Some(Errno::EPERM | Errno::EACCES) => Error::Permission { object },
            Some(Errno::ENOBUFS | Errno::EBUSY | Errno::EAGAIN | Errno::ENOMEM | Errno::EINTR) => {
                Error::Transient { object, reason }
            }
            _ if matches!(self, Self::Interrupted) => Error::Transient { object, reason },
            _ => Error::Failed { object, reason },
        }
    }
}

/// A netlink connection of one protocol. It reopens itself after a socket error.
pub(crate) struct Conn {
    protocol: isize,
    socket: Option<Socket>,
    seq: u32,
    buf: Vec<u8>,
}

impl Conn {
    /// Nothing is opened before the first request, so that a missing subsystem fails where it is used.
    pub(crate) fn new(protocol: isize) -> Self {
        Self { protocol, socket: None, seq: 0, buf: vec![0; RECEIVE_LEN] }
    }

    /// Sends one request and hands every answer to `each` as (message type, bytes after the header).
    /// Returns once the kernel has acknowledged it or the dump has ended.
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<(), Failure> {
        let result = self.exchange(kind, flags, body, each);
        if matches!(result, Err(Failure::Io(_) | Failure::Garbled(_))) {
            // Half an answer may be left in it; and a dump that goes on makes the next one EBUSY.
            self.socket = None;
        }
        result
    }

    /// Like [`Conn::ask`] for a request without answers.
    pub(crate) fn tell(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Failure> {
        self.ask(kind, flags, body, &mut |_, _| {})
    }

    /// Dumps, decodes each message with `decode` (`None` skips it), and repeats while the table changed
    /// underneath. A family that this kernel doesn't have is empty.
    pub(crate) fn dump<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Failure> {
        let mut found = Vec::new();
        for _ in 0..DUMP_TRIES {
            found.clear();
            match self.ask(kind, NLM_F_DUMP, body, &mut |k, b| found.extend(decode(k, b))) {
                Ok(()) => return Ok(found),
                Err(Failure::Interrupted) => {}
                Err(f) if f.errno() == Some(Errno::ENOBUFS) => {}
                Err(f) if matches!(f.errno(), Some(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT)) => {
                    return Ok(Vec::new());
                }
                Err(f) => return Err(f),
            }
        }
        Err(Failure::Interrupted)
    }

    fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<(), Failure> {
        // The same bits as `NLM_F_REPLACE | NLM_F_EXCL`, which together make no sense in a write.
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP;
        self.seq = self.seq.wrapping_add(1).max(1);
        let seq = self.seq;
        let ack = if dump { 0 } else { NLM_F_ACK };
        let request = message(kind, flags | NLM_F_REQUEST | ack, seq, body);
        let socket = match &mut self.socket {
            Some(socket) => socket,
            empty => empty.insert(open(self.protocol).map_err(Failure::Io)?),
        };
        socket.send(&request, 0).map_err(Failure::Io)?;
        let mut interrupted = false;
        loop {
            let len = receive(socket, &mut self.buf).map_err(Failure::Io)?;
            if len > self.buf.len() {
                return Err(Failure::Garbled("a datagram longer than 64 KiB"));
            }
            for answer in Messages::new(&self.buf[..len]) {
                let answer = answer?;
                if answer.seq != seq {
                    continue;
                }
                interrupted |= answer.flags & NLM_F_DUMP_INTR != 0;
                match answer.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        verdict(&answer)?;
                        return if interrupted { Err(Failure::Interrupted) } else { Ok(()) };
                    }
                    k if k < NLMSG_MIN_TYPE => {}
                    k => each(k, answer.body),
                }
            }
        }
    }
}

fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    // Conveniences of newer kernels; everything works without them.
    let _ = socket.set_ext_ack(true);
    let _ = socket.set_cap_ack(true);
    if protocol == netlink_sys::protocols::NETLINK_ROUTE {
        // Lets the kernel filter route dumps by table (Linux 4.20).
        let _ = socket.set_netlink_get_strict_chk(true);
    }
    set_receive_timeout(&socket, ANSWER_WITHIN)?;
    Ok(socket)
}

/// Makes `recv` return `EAGAIN` after this time.
pub(crate) fn set_receive_timeout(socket: &impl AsFd, after: Duration) -> io::Result<()> {
    let millis = i64::try_from(after.as_millis()).unwrap_or(i64::MAX);
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(millis)).map_err(io::Error::from)
}

/// Reads one datagram; the returned length may exceed the buffer (then it was cut).
pub(crate) fn receive(socket: &Socket, buf: &mut [u8]) -> io::Result<usize> {
    let flags = nix::sys::socket::MsgFlags::MSG_TRUNC.bits();
    loop {
        match socket.recv(&mut &mut buf[..], flags) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn message(kind: u16, flags: u16, seq: u32, body: &[u8]) -> Vec<u8> {
    let len = HEADER_LEN + body.len();
    let mut out = Vec::with_capacity(len);
    // Requests of ours are some hundred bytes long.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    out.extend_from_slice(body);
    out
}

/// One message of a datagram.
pub(crate) struct Message<'a> {
    /// `nlmsg_type`.
    pub(crate) kind: u16,
    flags: u16,
    seq: u32,
    /// What follows the netlink header.
    pub(crate) body: &'a [u8],
}

/// The messages of a datagram.
pub(crate) struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    /// Splits a datagram.
    pub(crate) fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let len = u32_at(self.0, 0).map_or(0, |l| l as usize);
        if len < HEADER_LEN || len > self.0.len() {
            self.0 = &[];
            return Some(Err(Failure::Garbled("a message of an impossible length")));
        }
        let (this, _) = self.0.split_at(len);
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: u16_at(this, 4).unwrap_or_default(),
            flags: u16_at(this, 6).unwrap_or_default(),
            seq: u32_at(this, 8).unwrap_or_default(),
            body: &this[HEADER_LEN..],
        }))
    }
}

/// The result in an `NLMSG_ERROR` or `NLMSG_DONE`.
fn verdict(answer: &Message<'_>) -> Result<(), Failure> {
    let code = match u32_at(answer.body, 0) {
        Some(code) => code.cast_signed(),
        None if answer.kind == NLMSG_DONE => 0,
        None => return Err(Failure::Garbled("an error without a code")),
    };
    if code == 0 || (answer.kind == NLMSG_DONE && code > 0) {
        return Ok(());
    }
    let words = (answer.flags & NLM_F_ACK_TLVS != 0).then(|| {
        // An error repeats the request: its header alone when capped, else all of it.
        let request = match answer.kind {
            NLMSG_ERROR if answer.flags & NLM_F_CAPPED == 0 => {
                u32_at(answer.body, 4).map_or(0, |l| (l as usize).next_multiple_of(4))
            }
            NLMSG_ERROR => HEADER_LEN,
            _ => 0,
        };
        let tlvs = answer.body.get(4 + request..).unwrap_or_default();
        attrs(tlvs).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, text)| text_of(text))
    });
    Err(Failure::Kernel(Errno::from_raw(code.wrapping_neg()), words.flatten()))
}

/// The attributes in a buffer: (type without flag bits, value). Stops at anything malformed.
pub(crate) fn attrs(buf: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = buf;
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & netlink_packet_core::NLA_TYPE_MASK;
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Appends an attribute.
pub(crate) fn put_attr(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A message body as bytes.
pub(crate) fn bytes_of(body: &impl Emitable) -> Vec<u8> {
    let mut out = vec![0; body.buffer_len()];
    body.emit(&mut out);
    out
}

/// A C string.
pub(crate) fn text_of(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

/// A native 16-bit number.
pub(crate) fn u16_at(buf: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*buf.get(at..)?.first_chunk()?))
}

/// A native 32-bit number.
pub(crate) fn u32_at(buf: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*buf.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(bytes: &[u8]) -> Vec<Result<(u16, Vec<u8>), Failure>> {
        Messages::new(bytes).map(|m| m.map(|m| (m.kind, m.body.to_vec()))).collect()
    }

    #[test]
    fn datagrams_are_split_and_bad_lengths_end_them() {
        let mut datagram = message(24, 0, 1, &[1, 2, 3]);
        datagram.push(0); // padding
        datagram.extend(message(25, 0, 1, &[]));
        let got = answers(&datagram);
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].as_ref().unwrap(), &(24, vec![1, 2, 3]));
        for cut in [1, 15, 18] {
            assert!(answers(&datagram[..cut]).last().unwrap().is_err(), "{cut}");
        }
    }

    #[test]
    fn the_kernels_words_are_found_in_capped_and_whole_errors() {
        let mut tlvs = Vec::new();
        put_attr(&mut tlvs, NLMSGERR_ATTR_MSG, b"Nexthop device is not up\0");
        let request = message(24, 0, 7, &[9; 12]);
        for (capped, copy) in [(NLM_F_CAPPED, &request[..HEADER_LEN]), (0, &request[..])] {
            let mut body = (-100i32).to_ne_bytes().to_vec();
            body.extend_from_slice(copy);
            body.extend_from_slice(&tlvs);
            let answer = Message { kind: NLMSG_ERROR, flags: NLM_F_ACK_TLVS | capped, seq: 7, body: &body };
            let failure = verdict(&answer).unwrap_err();
            assert_eq!(failure.errno(), Some(Errno::ENETDOWN));
            assert_eq!(
                failure.about("add route X").to_string(),
                "add route X: Network is down (Nexthop device is not up)"
            );
        }
    }

    #[test]
    fn permission_and_busy_are_told_apart() {
        let of = |errno| Failure::Kernel(errno, None).about("do it");
        assert_eq!(of(Errno::EPERM), Error::Permission { object: "do it".into() });
        assert!(matches!(of(Errno::EBUSY), Error::Transient { .. }));
        assert!(matches!(of(Errno::EINVAL), Error::Failed { .. }));
        assert!(matches!(Failure::Interrupted.about("x"), Error::Transient { .. }));
    }

    #[test]
    fn attributes_survive_a_round_trip_and_any_rubbish_ends() {
        let mut buf = Vec::new();
        put_attr(&mut buf, 1 | netlink_packet_core::NLA_F_NESTED, &[1]);
        put_attr(&mut buf, 2, &[1, 2, 3, 4]);
        assert_eq!(attrs(&buf).collect::<Vec<_>>(), [(1, &[1u8][..]), (2, &[1, 2, 3, 4][..])]);
        assert_eq!(attrs(&[0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(attrs(&[200, 0, 1, 0, 5]).count(), 0);
    }
}
