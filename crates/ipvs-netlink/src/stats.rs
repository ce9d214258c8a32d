//! Counters and rates of services and destinations.

use crate::wire::{Counter, StatsAttribute};

/// What the kernel counted for a service or a destination, and the rates it estimates.
///
/// Counters run from the creation of the object or its last [`Zero`](crate::Command::Zero). The kernel brings
/// them, and the rates, up to date every two seconds: what happened just now is not in them yet. Read from the 64-bit attributes where the kernel sends
/// them (Linux 4.1 and later), else from the 32-bit ones, whose counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stats {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub in_packets: u64,
    /// Packets to clients; IPVS sees them only where it masquerades.
    pub out_packets: u64,
    /// Bytes from clients.
    pub in_bytes: u64,
    /// Bytes to clients; IPVS sees them only where it masquerades.
    pub out_bytes: u64,
    /// Connections a second.
    pub cps: u64,
    /// Packets a second from clients.
    pub inpps: u64,
    /// Packets a second to clients.
    pub outpps: u64,
    /// Bytes a second from clients.
    pub inbps: u64,
    /// Bytes a second to clients.
    pub outbps: u64,
}

impl Stats {
    /// Prefers the 64-bit attributes.
    pub(crate) fn from_attributes(
        stats: Option<&[StatsAttribute]>,
        stats64: Option<&[StatsAttribute]>,
    ) -> Self {
        let mut out = Self::default();
        for attribute in stats64.or(stats).unwrap_or_default() {
            match attribute {
                StatsAttribute::Connections(n) => out.connections = n.value(),
                StatsAttribute::InPackets(n) => out.in_packets = n.value(),
                StatsAttribute::OutPackets(n) => out.out_packets = n.value(),
                StatsAttribute::InBytes(n) => out.in_bytes = n.value(),
                StatsAttribute::OutBytes(n) => out.out_bytes = n.value(),
                StatsAttribute::ConnectionRate(n) => out.cps = n.value(),
                StatsAttribute::InPacketRate(n) => out.inpps = n.value(),
                StatsAttribute::OutPacketRate(n) => out.outpps = n.value(),
                StatsAttribute::InByteRate(n) => out.inbps = n.value(),
                StatsAttribute::OutByteRate(n) => out.outbps = n.value(),
                StatsAttribute::Other(_) => {}
            }
        }
        out
    }

    /// The content of a `…_STATS64` attribute, in the kernel's order.
    pub fn to_attributes(&self) -> Vec<StatsAttribute> {
        vec![
            StatsAttribute::Connections(Counter::U64(self.connections)),
            StatsAttribute::InPackets(Counter::U64(self.in_packets)),
            StatsAttribute::OutPackets(Counter::U64(self.out_packets)),
            StatsAttribute::InBytes(Counter::U64(self.in_bytes)),
            StatsAttribute::OutBytes(Counter::U64(self.out_bytes)),
            StatsAttribute::ConnectionRate(Counter::U64(self.cps)),
            StatsAttribute::InPacketRate(Counter::U64(self.inpps)),
            StatsAttribute::OutPacketRate(Counter::U64(self.outpps)),
            StatsAttribute::InByteRate(Counter::U64(self.inbps)),
            StatsAttribute::OutByteRate(Counter::U64(self.outbps)),
        ]
    }
}
