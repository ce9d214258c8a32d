//! The commonest question, for the addresses of a service by its own name, from bytes to bytes: no message is built and nothing
//! is copied but what is sent. What is answered is what [`super::handler`] answers to the same packet (but that more addresses may
//! fit, since each takes no more than it has to); whatever is out of the ordinary in a question is left to that.

use std::net::IpAddr;

use super::{
    message::{HEADER, LARGEST_UDP, OPT_LEN, PLAIN_UDP},
    records::ServiceNames,
    table::Table,
};
use crate::model::ids::Family;

/// Type and class of a question.
const FIXED: usize = 4;
/// Of an answer's record before its address: a pointer to the question's name (RFC 1035, 4.1.4), type, class, TTL and length.
const RECORD: usize = 12;
/// A label (RFC 1035, 2.3.4).
const LONGEST_LABEL: usize = 63;
/// A name as it is sent.
const LONGEST_NAME: usize = 255;
const IN: [u8; 2] = [0, 1];

/// One question for addresses, of a name of two labels and more, without anything unusual in it.
#[derive(Debug)]
pub(super) struct Question<'a> {
    header: &'a [u8; HEADER],
    /// As it came: name, type and class.
    question: &'a [u8],
    /// The first two labels, and the rest of the name with its lengths.
    labels: [&'a [u8]; 2],
    rest: &'a [u8],
    family: Family,
    edns: Option<Edns>,
}

#[derive(Clone, Copy, Debug)]
struct Edns {
    payload: u16,
    dnssec_ok: bool,
}

impl<'a> Question<'a> {
    /// `None` where a packet is anything else.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let (header, body) = bytes.split_first_chunk::<HEADER>()?;
        let [_, _, flags, _, counts @ ..] = header;
        // A query of the usual operation, with one question, and an additional record at most.
        let has_edns = match counts {
            [0, 1, 0, 0, 0, 0, 0, more @ (0 | 1)] if flags & 0xf8 == 0 => *more == 1,
            _ => return None,
        };
        let (first, after) = label(body)?;
        let (second, rest) = label(after)?;
        let mut left = rest;
        while let Some((_, after)) = label(left) {
            left = after;
        }
        // The root's label.
        let [0, fixed @ ..] = left else { return None };
        let (fixed, additional) = fixed.split_first_chunk::<FIXED>()?;
        let family = match fixed {
            [0, 1, 0, 1] => Family::V4,
            [0, 28, 0, 1] => Family::V6,
            _ => return None,
        };
        let question = body.get(..body.len() - additional.len())?;
        if question.len() - FIXED > LONGEST_NAME {
            return None;
        }
        let rest = rest.get(..rest.len() - additional.len() - FIXED)?;
        let edns = match (has_edns, additional) {
            (false, []) => None,
            // Root, OPT, payload, no extended code, version 0, flags, no options.
            (true, [0, 0, 41, high, low, 0, 0, flags, _, 0, 0]) => {
                Some(Edns { payload: u16::from_be_bytes([*high, *low]), dnssec_ok: flags & 0x80 != 0 })
            }
            _ => return None,
        };
        Some(Self { header, question, labels: [first, second], rest, family, edns })
    }

    /// What of a service is asked for, where there is one of that name in the zone, and everything is known.
    pub(super) fn service<'t>(&self, table: &'t Table) -> Option<&'t ServiceNames> {
        if !table.is_synced() || !self.rest.eq_ignore_ascii_case(table.zone().wire()) {
            return None;
        }
        let [name, namespace] = self.labels;
        let mut key = [0; 2 * LONGEST_LABEL + 1];
        let length = name.len() + 1 + namespace.len();
        let (before, after) = key.split_at_mut_checked(name.len())?;
        before.copy_from_slice(name);
        *after.first_mut()? = b'.';
        after.get_mut(1..=namespace.len())?.copy_from_slice(namespace);
        let key = key.get_mut(..length)?;
        key.make_ascii_lowercase();
        table.service(key)
    }

    /// Of which addresses.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// The longest datagram that the client says it takes.
    pub(super) fn payload(&self) -> u16 {
        self.edns.map_or(PLAIN_UDP, |edns| edns.payload)
    }

    /// How long it would be, in times of the question.
    pub(super) fn times(&self, addresses: usize, limit: u16) -> usize {
        let (count, _) = self.fitting(addresses, limit);
        // A question is an answer with nothing in it, as far as its length goes.
        self.length(count) / self.length(0)
    }

    /// The answer with these addresses, of its family, in no more than so many bytes. `recursive` as in
    /// [`super::message::Shape`].
    pub(super) fn answer(&self, addresses: &[IpAddr], ttl: u32, limit: u16, recursive: bool) -> Vec<u8> {
        let (count, all) = self.fitting(addresses.len(), limit);
        self.write(addresses.get(..count).unwrap_or_default(), ttl, !all, recursive)
    }

    /// That it has to be asked again by TCP.
    pub(super) fn truncated(&self, recursive: bool) -> Vec<u8> {
        self.write(&[], 0, true, recursive)
    }

    fn write(&self, addresses: &[IpAddr], ttl: u32, truncated: bool, recursive: bool) -> Vec<u8> {
        let [id_high, id_low, flags, more, ..] = *self.header;
        let mut out = Vec::with_capacity(self.length(addresses.len()));
        out.extend([id_high, id_low]);
        // A response, authoritative, maybe truncated; recursion desired as in the question.
        out.push(0x84 | u8::from(truncated) << 1 | flags & 1);
        // Recursion available; checking disabled as in the question.
        out.push(u8::from(recursive) << 7 | more & 0x10);
        // As many as fit into a message are no more than that holds.
        let count = u16::try_from(addresses.len()).unwrap_or(u16::MAX);
        out.extend([0, 1]);
        out.extend(count.to_be_bytes());
        out.extend([0, 0, 0, u8::from(self.edns.is_some())]);
        out.extend(self.question);
        for address in addresses {
            out.extend([0xc0, HEADER as u8, 0]);
            let ip: (u8, &[u8]) = match address {
                IpAddr::V4(ip) => (1, &ip.octets()),
                IpAddr::V6(ip) => (28, &ip.octets()),
            };
            out.push(ip.0);
            out.extend(IN);
            out.extend(ttl.to_be_bytes());
            out.extend([0, ip.1.len() as u8]);
            out.extend(ip.1);
        }
        if let Some(edns) = self.edns {
            let [high, low] = LARGEST_UDP.to_be_bytes();
            out.extend([0, 0, 41, high, low, 0, 0, u8::from(edns.dnssec_ok) << 7, 0, 0, 0]);
        }
        out
    }

    fn length(&self, count: usize) -> usize {
        let opt = if self.edns.is_some() { usize::from(OPT_LEN) } else { 0 };
        HEADER + self.question.len() + count * self.record() + opt
    }

    fn record(&self) -> usize {
        RECORD + if self.family == Family::V4 { 4 } else { 16 }
    }

    /// How many of so many addresses fit, and whether these are all.
    fn fitting(&self, addresses: usize, limit: u16) -> (usize, bool) {
        let room = usize::from(limit).saturating_sub(self.length(0));
        let count = (room / self.record()).min(addresses);
        (count, count == addresses)
    }
}

/// The first label of a name, without its length, and what follows; `None` at the root, at a pointer, and at the end.
fn label(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = name.split_first()?;
    let length = usize::from(*length);
    if length == 0 || length > LONGEST_LABEL { None } else { rest.split_at_checked(length) }
}
