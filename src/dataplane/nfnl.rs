//! nfnetlink: the part that ipset and nf_tables share. Requests in batches, dumps, attributes.
//!
//! Blocking, with a time limit; nothing in here panics on what the kernel sends.

use std::{io, time::Duration};

use netlink_packet_core::{
    NLA_F_NESTED, NLA_F_NET_BYTEORDER, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};

/// `NFPROTO_INET`: nf_tables' family of both.
pub(crate) const NFPROTO_INET: u8 = 1;
/// `NFPROTO_IPV4`.
pub(crate) const NFPROTO_IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
pub(crate) const NFPROTO_IPV6: u8 = 10;

const NLMSG_HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// The kernel fills dump datagrams up to 32 KiB; an ipset error repeats our whole request.
const RECEIVE_BUFFER: usize = 256 * 1024;
/// A datagram must fit into the socket's send buffer (212,992 bytes unless told otherwise).
const MAX_DATAGRAM: usize = 96 * 1024;
/// Each request is answered; this many answers fit into the receive buffer at once.
const MAX_REQUESTS: usize = 64;
/// A batch of set elements is answered within milliseconds; a kernel under memory pressure may take longer.
const TIME_LIMIT: i64 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `_END`, around the requests of a transaction.
const BATCH_BEGIN: u8 = 16;
const BATCH_END: u8 = 17;
/// A dump during which others write is started again this often.
const DUMP_ATTEMPTS: u32 = 8;

/// What went wrong between us and the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NlError {
    /// The kernel answered with this error number (ipset's own numbers start at 4096).
    Kernel(i32),
    /// The answer is not what the protocol says.
    Malformed,
}

impl NlError {
    fn io(error: &io::Error) -> Self {
        error.raw_os_error().map_or(Self::Malformed, Self::Kernel)
    }
}

/// One request: subsystem, command, family and attributes.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `NFNL_SUBSYS_*`.
    pub subsystem: u8,
    /// Command of the subsystem.
    pub command: u8,
    /// Flags besides `REQUEST` and `ACK`.
    pub flags: u16,
    /// `NFPROTO_*`.
    pub family: u8,
    /// Encoded attributes.
    pub attributes: Vec<u8>,
}

impl Request {
    /// The bytes on the wire.
    pub(crate) fn encode(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = NLMSG_HEADER + NFGENMSG + self.attributes.len();
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        out.extend_from_slice(&((u16::from(self.subsystem) << 8) | u16::from(self.command)).to_ne_bytes());
        out.extend_from_slice(&(self.flags | flags | NLM_F_REQUEST).to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&0u32.to_ne_bytes());
        // struct nfgenmsg: family, version, resource id
        out.extend_from_slice(&[self.family, 0, 0, 0]);
        out.extend_from_slice(&self.attributes);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }
}

/// The kernel's answer to one [`Request`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    /// 0, or a positive error number.
    pub error: i32,
    /// Attributes of the object that was asked for; with an error, what the kernel repeats of the request.
    pub payload: Vec<u8>,
}

/// A netlink message as it lies in a datagram.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// The messages of a datagram, as far as they are whole.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let body = datagram.get(NLMSG_HEADER..length)?;
        let message = Message {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            body,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// A socket to the kernel's netfilter subsystems, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Nfnl {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Nfnl {
    /// Opens the socket.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(TIME_LIMIT, 0))?;
        // Best effort: the ack then leaves out our request, and the buffer holds more answers.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_rx_buf_sz(1024 * 1024_i32);
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn receive(&mut self) -> Result<(), NlError> {
        self.buffer.clear();
        loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(NlError::io(&e)),
            }
        }
    }

    /// Sends the requests, several in a datagram, and returns the answer to each, in order.
    pub(crate) fn transact(&mut self, requests: &[Request]) -> Result<Vec<Reply>, NlError> {
        let mut replies = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let first = self.sequence.wrapping_add(1);
            let mut datagram = Vec::new();
            let mut count = 0;
            for request in rest.iter().take(MAX_REQUESTS) {
                if count > 0 && datagram.len() + request.attributes.len() > MAX_DATAGRAM {
                    break;
                }
                let sequence = self.next_sequence();
                datagram.extend(request.encode(NLM_F_ACK, sequence));
                count += 1;
            }
            self.socket.send(&datagram, 0).map_err(|e| NlError::io(&e))?;
            replies.extend(self.collect(first, count)?);
            rest = &rest[count..];
        }
        Ok(replies)
    }

    fn collect(&mut self, first: u32, count: usize) -> Result<Vec<Reply>, NlError> {
        let mut replies = vec![Reply::default(); count];
        let mut open = count;
        while open > 0 {
            self.receive()?;
            for message in messages(&self.buffer) {
                let index = message.sequence.wrapping_sub(first) as usize;
                // Late answers to a request that ran into its time limit.
                let Some(reply) = replies.get_mut(index) else { continue };
                if message.kind == NLMSG_ERROR {
                    let code = u32_at(message.body, 0).ok_or(NlError::Malformed)?.cast_signed();
                    reply.error = code.saturating_neg();
                    if code != 0 {
                        let echoed = 4 + NLMSG_HEADER + NFGENMSG;
                        reply.payload = message.body.get(echoed..).unwrap_or_default().to_vec();
                    }
                    open -= 1;
                } else {
                    reply.payload = message.body.get(NFGENMSG..).unwrap_or_default().to_vec();
                }
            }
        }
        Ok(replies)
    }

    /// One request, its answer's payload or its error.
    pub(crate) fn get(&mut self, request: &Request) -> Result<Vec<u8>, NlError> {
        let reply = self.transact(std::slice::from_ref(request))?.pop().ok_or(NlError::Malformed)?;
        if reply.error == 0 { Ok(reply.payload) } else { Err(NlError::Kernel(reply.error)) }
    }

    /// Sends the requests as one transaction of a subsystem: either all of them are done, or none is. There must be few enough
    /// for one datagram.
    pub(crate) fn batch(&mut self, subsystem: u8, requests: &[Request]) -> Result<(), NlError> {
        let edge = |command, sequence| {
            let edge = Request { subsystem: 0, command, flags: 0, family: 0, attributes: Vec::new() };
            let mut bytes = edge.encode(0, sequence);
            // nfgenmsg's resource id: which subsystem it is for.
            bytes.truncate(NLMSG_HEADER + 2);
            bytes.extend(u16::from(subsystem).to_be_bytes());
            bytes
        };
        let begin = self.next_sequence();
        let mut datagram = edge(BATCH_BEGIN, begin);
        for request in requests {
            let sequence = self.next_sequence();
            datagram.extend(request.encode(NLM_F_ACK, sequence));
        }
        let end = self.next_sequence();
        datagram.extend(edge(BATCH_END, end));
        self.socket.send(&datagram, 0).map_err(|e| NlError::io(&e))?;
        let mut open = requests.len();
        while open > 0 {
            self.receive()?;
            for message in messages(&self.buffer) {
                let ours = message.sequence.wrapping_sub(begin) < end.wrapping_sub(begin);
                if message.kind != NLMSG_ERROR || !ours {
                    continue;
                }
                // What is refused as a whole is answered by an error for the beginning.
                match u32_at(message.body, 0).ok_or(NlError::Malformed)?.cast_signed() {
                    0 => open = open.saturating_sub(1),
                    code => return Err(NlError::Kernel(code.saturating_neg())),
                }
            }
        }
        Ok(())
    }

    /// All messages of a dump; begun again when somebody wrote in between.
    pub(crate) fn dump(&mut self, request: &Request) -> Result<Vec<Vec<u8>>, NlError> {
        let mut last = NlError::Kernel(Errno::EINTR as i32);
        for attempt in 0..DUMP_ATTEMPTS {
            match self.dump_once(request) {
                Err(e @ NlError::Kernel(errno))
                    if [Errno::EINTR, Errno::EBUSY, Errno::EAGAIN].iter().any(|x| *x as i32 == errno) =>
                {
                    last = e;
                    std::thread::sleep(Duration::from_millis(u64::from(attempt) * 5));
                }
                other => return other,
            }
        }
        Err(last)
    }

    fn dump_once(&mut self, request: &Request) -> Result<Vec<Vec<u8>>, NlError> {
        let sequence = self.next_sequence();
        self.socket.send(&request.encode(NLM_F_DUMP, sequence), 0).map_err(|e| NlError::io(&e))?;
        let mut out = Vec::new();
        let mut interrupted = false;
        loop {
            self.receive()?;
            for message in messages(&self.buffer) {
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_DONE if interrupted => return Err(NlError::Kernel(Errno::EINTR as i32)),
                    NLMSG_DONE => {
                        // An error at the end of a dump comes in its DONE message.
                        return match u32_at(message.body, 0).map(u32::cast_signed) {
                            Some(code) if code < 0 => Err(NlError::Kernel(code.saturating_neg())),
                            _ => Ok(out),
                        };
                    }
                    NLMSG_ERROR => {
                        let code = u32_at(message.body, 0).ok_or(NlError::Malformed)?.cast_signed();
                        return match code {
                            0 => Ok(out),
                            code => Err(NlError::Kernel(code.saturating_neg())),
                        };
                    }
                    _ => out.push(message.body.get(NFGENMSG..).unwrap_or_default().to_vec()),
                }
            }
        }
    }
}

/// Builds attributes.
#[derive(Clone, Default, Debug)]
pub(crate) struct Attributes(pub Vec<u8>);

impl Attributes {
    /// An attribute with this value.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// A text with its final NUL.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes);
    }

    /// A value in network byte order, and flagged so, which ipset insists on.
    pub(crate) fn big_endian(&mut self, kind: u16, value: &[u8]) {
        self.put(kind | NLA_F_NET_BYTEORDER, value);
    }

    /// Nested attributes.
    pub(crate) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        let mut nested = Self::default();
        inner(&mut nested);
        self.put(kind | NLA_F_NESTED, &nested.0);
    }
}

/// The attributes in these bytes, as far as they are whole: (kind, value).
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).filter_map(|nla| {
        let (kind, length) = (nla.kind() & NLA_TYPE_MASK, usize::from(nla.length()));
        Some((kind, nla.into_inner().get(4..length)?))
    })
}

/// The first attribute of this kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

/// A text up to its NUL.
pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

/// A big-endian number.
pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    value.get(..4)?.try_into().ok().map(u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for message in messages(&bytes) {
                for (_, value) in attributes(message.body) {
                    let _ = attributes(value).count();
                }
            }
            attributes(&bytes).for_each(|(_, value)| drop(text(value)));
        }
    }

    #[test]
    fn nested_attributes_come_back() {
        let mut a = Attributes::default();
        a.text(2, "meshlb");
        a.nest(7, |a| a.big_endian(4, &80u16.to_be_bytes()));
        let all: Vec<_> = attributes(&a.0).collect();
        assert_eq!(all[0], (2, b"meshlb\0".as_slice()));
        assert_eq!(attribute(all[1].1, 4), Some([0, 80].as_slice()));
    }
}
