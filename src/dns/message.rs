//! Messages on the wire: what is read before anything else, and how an answer is cut to what the client takes.

use hickory_proto::{
    ProtoError,
    op::{Edns, EmitAndCount, Header, HeaderCounts, Message, MessageType, Metadata, Query, ResponseCode},
    rr::{Record, RecordType, rdata::OPT},
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder},
};

use super::answer::Answer;

/// The largest UDP answer: what passes every path unfragmented (DNS Flag Day 2020).
pub const LARGEST_UDP: u16 = 1232;
/// Without EDNS (RFC 1035, 4.2.1).
pub const PLAIN_UDP: u16 = 512;
/// Bytes of a header (RFC 1035, 4.1.1).
pub(super) const HEADER: usize = 12;
/// Length of an OPT record without options (RFC 6891, 6.1.2).
pub(super) const OPT_LEN: u16 = 11;
/// The shortest record: root name, type, class, TTL, length (RFC 1035, 4.1.3).
const SHORTEST_RECORD: usize = 11;

/// What a packet is.
#[derive(Debug)]
pub enum Packet {
    /// Not to be answered: too short for a header, or an answer itself (two servers would talk for ever).
    Noise,
    /// A header with something else behind it than what it says.
    Malformed(Metadata),
    /// A message that had one question, without what else it said: it may be kept for seconds.
    Question(Box<Message>, Query),
}

/// Reads a packet.
pub fn read(bytes: &[u8]) -> Packet {
    let Ok(Header { metadata, counts, .. }) = Header::read(&mut BinDecoder::new(bytes)) else {
        return Packet::Noise;
    };
    if metadata.message_type != MessageType::Query {
        return Packet::Noise;
    }
    // Before memory is taken for what the counts promise.
    let records = [counts.answers, counts.authorities, counts.additionals].map(usize::from);
    let fits = records.iter().sum::<usize>() * SHORTEST_RECORD <= bytes.len();
    // RFC 9619: a query has one question.
    if counts.queries != 1 || !fits {
        return Packet::Malformed(metadata);
    }
    match Message::from_vec(bytes) {
        Ok(mut message) => match message.queries.pop() {
            Some(query) => {
                (message.answers, message.authorities) = (Vec::new(), Vec::new());
                (message.additionals, message.signature) = (Vec::new(), None);
                if let Some(edns) = &mut message.edns {
                    *edns.options_mut() = OPT::default();
                }
                Packet::Question(Box::new(message), query)
            }
            None => Packet::Malformed(metadata),
        },
        Err(_) => Packet::Malformed(metadata),
    }
}

/// An answer to a packet that has no question that could be repeated.
pub fn bare(request: &Metadata, code: ResponseCode) -> Vec<u8> {
    let mut metadata = Metadata::response_from_request(request);
    metadata.response_code = code;
    let mut out = Vec::with_capacity(HEADER);
    let header = Header { metadata, counts: HeaderCounts::default() };
    match header.emit(&mut BinEncoder::new(&mut out)) {
        Ok(()) => out,
        Err(_) => Vec::new(),
    }
}

/// What an answer says besides its records.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Largest length, in bytes.
    pub limit: u16,
    /// Whether it comes from who the zone belongs to.
    pub authoritative: bool,
    /// Whether names of others are looked up too.
    pub recursive: bool,
    /// Nothing is answered but that it has to be asked again by TCP.
    pub empty: bool,
}

/// Writes an answer.
///
/// # Errors
/// It can't be written: a name too long, say.
pub fn write(request: &Message, query: &Query, answer: &Answer, shape: Shape) -> Result<Vec<u8>, ProtoError> {
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.authoritative = shape.authoritative;
    metadata.recursion_available = shape.recursive;
    metadata.response_code = answer.code;
    metadata.truncation = shape.empty;
    let edns = request.edns.as_ref().map(|asked| {
        let mut edns = Edns::new();
        edns.set_max_payload(LARGEST_UDP).set_rcode_high(answer.code.high());
        // RFC 3225, 3: copied.
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        edns
    });
    let mut out = Vec::with_capacity(usize::from(PLAIN_UDP));
    let mut encoder = BinEncoder::new(&mut out);
    encoder.set_max_size(shape.limit - if edns.is_some() { OPT_LEN } else { 0 });
    let place = encoder.place::<Header>()?;
    let mut counts = HeaderCounts { queries: 1, ..HeaderCounts::default() };
    encoder.emit_all(std::iter::once(query))?;
    if !shape.empty {
        let (n, all) = emit(&mut encoder, &answer.answers)?;
        counts.answers = n;
        // Without all answers nothing else matters: the client has to ask again.
        metadata.truncation = !all;
        if all {
            let before = encoder.offset();
            let (n, all) = emit(&mut encoder, &answer.authorities)?;
            // Where there is an answer, who else could have given it is of no matter (RFC 2181, 9). Where there is none, this says for
            // how long.
            let kind = query.query_type();
            let needed = !answer.answers.iter().any(|r| r.record_type() == kind || kind == RecordType::ANY);
            if all || needed {
                counts.authorities = n;
                metadata.truncation = !all;
            } else {
                encoder.set_offset(before);
                encoder.trim();
            }
            if all {
                // These only save questions (RFC 2181, 9).
                counts.additionals = emit(&mut encoder, &answer.additionals)?.0;
            }
        }
    }
    if let Some(edns) = edns {
        encoder.set_max_size(shape.limit);
        encoder.emit_all(std::iter::once(&Record::from(&edns)))?;
        counts.additionals += 1;
    }
    place.replace(&mut encoder, Header { metadata, counts })?;
    // What did not fit may stand behind the end.
    encoder.trim();
    Ok(out)
}

/// How many fit, and whether these are all.
fn emit(encoder: &mut BinEncoder<'_>, records: &[Record]) -> Result<(u16, bool), ProtoError> {
    match records.iter().emit(encoder) {
        Ok(n) => Ok((u16::try_from(n).unwrap_or(u16::MAX), true)),
        Err(ProtoError::NotAllRecordsWritten { count, .. }) => {
            Ok((u16::try_from(count).unwrap_or(u16::MAX), false))
        }
        Err(e) => Err(e),
    }
}
