//! One request and its answers: reading, dumping, looking up the family.

use std::io;

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NlasIterator,
    ParseableParametrized, parse_u16,
};
use netlink_packet_generic::constants::{CTRL_ATTR_FAMILY_ID, GENL_HDRLEN, GENL_ID_CTRL};
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use nix::libc::ENOENT;

use super::Client;
use super::frame::{Body, Frames, Outcome};
use super::link::Received;
use crate::command::Object;
use crate::constants::IPVS_GENL_NAME;
use crate::error::Error;
use crate::wire::IpvsMessage;

/// Why a request did not come to its end.
#[derive(Debug)]
pub(super) enum Failure {
    /// Part of the answer was dropped.
    Lost,
    /// Nothing came in time.
    TimedOut,
    /// A system call failed.
    Io(io::Error),
    /// What came is not netlink.
    Malformed(DecodeError),
}

impl Client {
    pub(super) fn failed(&self, object: Object, failure: Failure) -> Error {
        match failure {
            Failure::Lost => Error::AnswerLost { object },
            Failure::TimedOut => Error::TimedOut { object, after: self.link.timeout() },
            Failure::Io(source) => Error::Io { object, source },
            Failure::Malformed(error) => Error::Malformed { object, reason: error.to_string() },
        }
    }

    /// Asks one thing and reads the one message that answers it.
    pub(super) fn get<T>(
        &mut self,
        object: Object,
        message: &IpvsMessage,
        parse: impl Fn(&IpvsMessage) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let mut answer = None;
        self.read(object, message, NLM_F_ACK, |message| {
            answer = Some(parse(&message)?);
            Ok(())
        })?;
        answer.ok_or(Error::Malformed { object, reason: "an acknowledgement without an answer".into() })
    }

    /// Asks for all there is and hands over each.
    pub(super) fn dump(
        &mut self,
        object: Object,
        message: &IpvsMessage,
        each: impl FnMut(IpvsMessage) -> Result<(), DecodeError>,
    ) -> Result<(), Error> {
        self.read(object, message, NLM_F_DUMP, each)
    }

    /// A request that changes nothing. It is repeated once if the family's number has changed.
    fn read(
        &mut self,
        object: Object,
        message: &IpvsMessage,
        flags: u16,
        mut each: impl FnMut(IpvsMessage) -> Result<(), DecodeError>,
    ) -> Result<(), Error> {
        let mut again = true;
        loop {
            let family = self.family;
            let mut unreadable = None;
            let mut parse = |payload: &[u8]| {
                let parsed = GenlHeader::parse(payload).and_then(|header| {
                    IpvsMessage::parse_with_param(payload.get(GENL_HDRLEN..).unwrap_or_default(), header)
                });
                if let Err(error) = parsed.and_then(&mut each) {
                    // Read to the end all the same: what is left over would be in the way of the next request.
                    unreadable.get_or_insert(error);
                }
            };
            let (outcome, interrupted) = self
                .roundtrip(message.clone(), family, flags, |kind, payload| {
                    if kind == family {
                        parse(payload);
                    }
                })
                .map_err(|failure| self.failed(object, failure))?;
            if outcome.errno == ENOENT && again && self.refresh_family()? {
                again = false;
                continue;
            }
            if outcome.errno != 0 {
                return Err(Error::of_kernel("read", object, outcome.errno, outcome.message));
            }
            if let Some(error) = unreadable {
                return Err(Error::Malformed { object, reason: error.to_string() });
            }
            return if interrupted { Err(Error::DumpInterrupted { object }) } else { Ok(()) };
        }
    }

    /// Looks up the family's number; true if it is another than before. Where the module is not loaded, the
    /// kernel tries to load it before it answers.
    pub(super) fn refresh_family(&mut self) -> Result<bool, Error> {
        let object = Object::Family;
        let request = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(IPVS_GENL_NAME.to_owned())],
        };
        let mut found = None;
        let (outcome, _) = self
            .roundtrip(request, GENL_ID_CTRL, NLM_F_ACK, |kind, payload| {
                if kind == GENL_ID_CTRL {
                    found = found.or(family_id(payload.get(GENL_HDRLEN..).unwrap_or_default()));
                }
            })
            .map_err(|failure| self.failed(object, failure))?;
        match (outcome.errno, found) {
            (0, Some(id)) => {
                let changed = id != self.family;
                self.family = id;
                Ok(changed)
            }
            (0, None) => Err(Error::Malformed { object, reason: "no CTRL_ATTR_FAMILY_ID".into() }),
            (ENOENT, _) => Err(Error::NoIpvs),
            (errno, _) => Err(Error::of_kernel("look up", object, errno, outcome.message)),
        }
    }

    /// Sends one request and reads until its end. Gives the end, and whether the dump was interrupted.
    fn roundtrip<F>(
        &mut self,
        payload: F,
        family: u16,
        flags: u16,
        mut on_data: impl FnMut(u16, &[u8]),
    ) -> Result<(Outcome, bool), Failure>
    where
        F: GenlFamily + Emitable + std::fmt::Debug,
    {
        let sequence = self.link.next_sequence();
        let mut bytes = Vec::new();
        encode(&mut bytes, payload, family, NLM_F_REQUEST | flags, sequence);
        self.link.send(&bytes).map_err(Failure::Io)?;
        let result = self.read_answers(sequence, &mut on_data);
        if result.is_err() {
            self.link.set_dirty();
        }
        result
    }

    fn read_answers(
        &mut self,
        sequence: u32,
        on_data: &mut impl FnMut(u16, &[u8]),
    ) -> Result<(Outcome, bool), Failure> {
        let mut interrupted = false;
        loop {
            match self.link.receive(true).map_err(Failure::Io)? {
                Received::Datagram => {}
                Received::Lost => return Err(Failure::Lost),
                Received::Nothing => return Err(Failure::TimedOut),
            }
            for frame in Frames(self.link.datagram()) {
                let frame = frame.map_err(Failure::Malformed)?;
                if frame.sequence != sequence {
                    continue;
                }
                interrupted |= frame.interrupted;
                match frame.body {
                    Body::End(outcome) => return Ok((outcome, interrupted)),
                    Body::Overrun => return Err(Failure::Lost),
                    Body::Nothing => {}
                    Body::Data { kind, payload } => on_data(kind, payload),
                }
            }
        }
    }
}

/// Appends a message to a datagram.
pub(super) fn encode<F>(out: &mut Vec<u8>, payload: F, family: u16, flags: u16, sequence: u32)
where
    F: GenlFamily + Emitable + std::fmt::Debug,
{
    let mut payload = GenlMessage::from_payload(payload);
    payload.set_resolved_family_id(family);
    let mut message = NetlinkMessage::from(payload);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let start = out.len();
    out.resize(start + message.buffer_len(), 0);
    message.serialize(&mut out[start..]);
}

/// `CTRL_ATTR_FAMILY_ID` out of the answer to `CTRL_CMD_GETFAMILY`. The other attributes do not matter, and a
/// later kernel may have more of them.
fn family_id(attributes: &[u8]) -> Option<u16> {
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|nla| nla.kind() == CTRL_ATTR_FAMILY_ID)
        .and_then(|nla| parse_u16(nla.value()).ok())
}
