//! Taking a datagram apart: netlink framing, acknowledgements, extended acknowledgements.

use netlink_packet_core::{
    DecodeError, DoneBuffer, ErrorBuffer, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NetlinkBuffer, NlasIterator, parse_string, parse_u32,
};

/// `NLMSGERR_ATTR_MSG` of `include/uapi/linux/netlink.h`: the kernel's words.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// `struct nlmsghdr` of the request, repeated after the error number.
const HEADER_LEN: usize = 16;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// 0, or the error number, positive.
    pub errno: i32,
    /// The kernel's words.
    pub message: Option<String>,
}

/// One netlink message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub sequence: u32,
    /// `NLM_F_DUMP_INTR`: the table changed under the dump.
    pub interrupted: bool,
    pub body: Body<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// `NLMSG_ERROR` or `NLMSG_DONE`: nothing follows for this sequence number.
    End(Outcome),
    /// `NLMSG_OVERRUN`: data was lost.
    Overrun,
    /// `NLMSG_NOOP`.
    Nothing,
    /// A message of a family.
    Data { kind: u16, payload: &'a [u8] },
}

/// The messages of a datagram; ends at the first that cannot be read.
pub(super) struct Frames<'a>(pub &'a [u8]);

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let buffer = match NetlinkBuffer::new_checked(bytes) {
            Ok(buffer) => buffer,
            Err(error) => return Some(Err(error)),
        };
        let length = usize::try_from(buffer.length()).unwrap_or(usize::MAX);
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(frame(&buffer, bytes.get(HEADER_LEN..length).unwrap_or_default()))
    }
}

fn frame<'a>(buffer: &NetlinkBuffer<&'a [u8]>, payload: &'a [u8]) -> Result<Frame<'a>, DecodeError> {
    let flags = buffer.flags();
    let body = match buffer.message_type() {
        NLMSG_ERROR => Body::End(error(payload, flags)?),
        NLMSG_DONE => Body::End(done(payload, flags)?),
        NLMSG_OVERRUN => Body::Overrun,
        NLMSG_NOOP => Body::Nothing,
        kind => Body::Data { kind, payload },
    };
    Ok(Frame { sequence: buffer.sequence_number(), interrupted: flags & NLM_F_DUMP_INTR != 0, body })
}

/// `struct nlmsgerr`: the error number, the request's header, the request unless capped, attributes if flagged.
fn error(payload: &[u8], flags: u16) -> Result<Outcome, DecodeError> {
    let buffer = ErrorBuffer::new_checked(payload)?;
    let errno = buffer.code().map_or(0, |code| positive(code.get()));
    let request = buffer.payload();
    let skip = if flags & NLM_F_CAPPED != 0 {
        HEADER_LEN
    } else {
        let length = request.get(..4).and_then(|bytes| parse_u32(bytes).ok()).unwrap_or(0);
        usize::try_from(length).unwrap_or(usize::MAX).max(HEADER_LEN)
    };
    let skip = skip.checked_next_multiple_of(4).unwrap_or(usize::MAX);
    let attributes = request.get(skip..).unwrap_or_default();
    Ok(Outcome { errno, message: message(attributes, flags) })
}

/// The end of a dump: an error number, attributes if flagged. Old kernels send nothing at all.
fn done(payload: &[u8], flags: u16) -> Result<Outcome, DecodeError> {
    if payload.is_empty() {
        return Ok(Outcome { errno: 0, message: None });
    }
    let buffer = DoneBuffer::new_checked(payload)?;
    Ok(Outcome { errno: positive(buffer.code()), message: message(buffer.extended_ack(), flags) })
}

/// The kernel sends error numbers negative.
fn positive(code: i32) -> i32 {
    i32::try_from(code.unsigned_abs()).unwrap_or(i32::MAX)
}

/// The text is a help, never a reason to fail.
fn message(attributes: &[u8], flags: u16) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let nla =
        NlasIterator::new(attributes).map_while(Result::ok).find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    parse_string(nla.value()).ok().filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn message_of(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(16 + payload.len()).unwrap().to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn an_extended_acknowledgement_gives_the_kernels_words() {
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(message_of(33, 5, 7, &[]));
        payload.extend([8, 0, 1, 0, b'b', b'a', b'd', 0]);
        let capped = message_of(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, 7, &payload);
        let outcome = Outcome { errno: 22, message: Some("bad".into()) };
        let frames: Vec<_> = Frames(&capped).map(Result::unwrap).collect();
        assert_eq!(frames, [Frame { sequence: 7, interrupted: false, body: Body::End(outcome.clone()) }]);

        // Not capped: the whole request stands between.
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(message_of(33, 5, 7, &[1, 2, 3, 4, 5]));
        payload.extend([0, 0, 0]);
        payload.extend([8, 0, 1, 0, b'b', b'a', b'd', 0]);
        let whole = message_of(NLMSG_ERROR, NLM_F_ACK_TLVS, 7, &payload);
        assert_eq!(Frames(&whole).next().unwrap().unwrap().body, Body::End(outcome));
    }

    #[test]
    fn a_datagram_holds_many_messages_and_ends_at_a_broken_one() {
        let mut bytes = message_of(33, 0x10, 1, &[1, 2, 3, 4]);
        bytes.extend(message_of(NLMSG_DONE, 0, 1, &[]));
        bytes.extend([1, 2, 3]);
        let frames: Vec<_> = Frames(&bytes).collect();
        assert_eq!(frames.len(), 3);
        let first = frames[0].as_ref().unwrap();
        assert!(first.interrupted);
        assert_eq!(first.body, Body::Data { kind: 33, payload: &[1, 2, 3, 4] });
        assert_eq!(frames[1].as_ref().unwrap().body, Body::End(Outcome { errno: 0, message: None }));
        assert!(frames[2].is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Frames(&bytes).count() <= bytes.len());
        }

        #[test]
        fn no_framed_bytes_panic(
            kind in 0u16..6, flags in any::<u16>(), payload in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let bytes = message_of(kind, flags, 1, &payload);
            prop_assert!(Frames(&bytes).count() >= 1);
        }
    }
}
