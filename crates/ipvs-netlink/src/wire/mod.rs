//! The messages as they stand on the wire: one enum per attribute list, in the manner of the rust-netlink
//! packet crates. Nothing is interpreted and nothing is lost here; the types at the root of the crate
//! ([`Service`](crate::Service), [`Command`](crate::Command), …) are made from these.
//!
//! Integers are native-endian, ports big-endian. The kernel leaves `NLA_F_NESTED` out of what it sends
//! (`nla_nest_start_noflag`) and accepts it in what it gets: parsing takes both, emitting sets it.

mod daemon;
mod destination;
mod message;
mod service;
mod stats;

pub use daemon::DaemonAttribute;
pub use destination::DestinationAttribute;
pub use message::{IpvsAttribute, IpvsCommand, IpvsMessage};
use netlink_packet_core::{DecodeError, NlaBuffer, NlasIterator, Parseable};
pub use service::ServiceAttribute;
pub use stats::{Counter, StatsAttribute};

/// Longest nested attribute that is parsed, in bytes.
///
/// A service of Linux 6.1 takes about 350. What was parsed must be emittable: lengths on the wire have 16 bits,
/// and emitting may add up to four bytes to each attribute (a missing NUL, padding), never more than double.
const MAX_NESTED: usize = 16 * 1024;

/// Parses every attribute of a nested list.
fn parse_nested<T>(value: &[u8], what: &'static str) -> Result<Vec<T>, DecodeError>
where
    T: for<'a> Parseable<NlaBuffer<&'a [u8]>>,
{
    if value.len() > MAX_NESTED {
        return Err(format!("{what}: {} bytes are more than {MAX_NESTED}", value.len()).into());
    }
    parse_list(value)
}

/// Parses every attribute of a list.
fn parse_list<T>(bytes: &[u8]) -> Result<Vec<T>, DecodeError>
where
    T: for<'a> Parseable<NlaBuffer<&'a [u8]>>,
{
    NlasIterator::new(bytes).map(|nla| nla.and_then(|nla| T::parse(&nla))).collect()
}

/// A fixed number of bytes, or an error that gives both numbers.
fn parse_bytes<const N: usize>(value: &[u8]) -> Result<[u8; N], DecodeError> {
    value.try_into().map_err(|_| DecodeError::invalid_number(N, value.len()))
}

/// Bytes that a string takes on the wire, its NUL included.
fn string_len(text: &str) -> usize {
    text.len() + 1
}

/// Writes a string and its NUL; `buffer` has [`string_len`] bytes.
fn emit_string(buffer: &mut [u8], text: &str) {
    let (bytes, nul) = buffer.split_at_mut(text.len());
    bytes.copy_from_slice(text.as_bytes());
    nul.fill(0);
}
