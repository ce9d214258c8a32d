//! IPVS (`ip_vs`, the kernel's transport-layer load balancer) over generic netlink: a codec for the whole family
//! and a blocking client.
//!
//! ```text
//!            Command ──────► Client ◄────── Service, Destination, Stats, Timeouts, …
//!               │          batch │ dump            ▲
//!               ▼                ▼                 │
//!  wire::IpvsMessage ─► GenlMessage ─► NetlinkMessage ─► datagram ─► kernel: one table
//!  [Service: [Family, Fwmark, …]]      (rust-netlink)               for each network namespace
//! ```
//!
//! A *service* is what clients connect to, found by firewall mark or by address ([`ServiceId`]); it has
//! *destinations* ([`DestinationId`]) and a scheduler that chooses among them for each new connection.
//!
//! ```no_run
//! use ipvs_netlink::{
//!     AddressFamily, Client, Command, DestinationConfig, DestinationId, ServiceConfig, ServiceId,
//! };
//!
//! # fn main() -> Result<(), ipvs_netlink::Error> {
//! // IPv4 packets with mark 256 go to two pods; the second takes no new connections.
//! let service = ServiceId::fwmark(AddressFamily::Inet, 256);
//! let first = DestinationId::new([10, 244, 1, 11].into(), 8080);
//! let second = DestinationId::new([10, 244, 2, 11].into(), 8080);
//!
//! let mut client = Client::open()?;
//! let results = client.batch(&[
//!     Command::AddService(service, ServiceConfig::new("rr")),
//!     Command::AddDestination(service, first, DestinationConfig::masquerade(1)),
//!     Command::AddDestination(service, second, DestinationConfig::masquerade(0)),
//! ]);
//! for result in results {
//!     result?; // "destination 10.244.1.11:8080 of IPVS service FWM 256 already exists"
//! }
//! for destination in client.destinations(&service)? {
//!     println!("{}: {} connections", destination.id, destination.active);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Levels
//!
//! [`Client`] runs [`Command`]s and reads [`Service`]s and [`Destination`]s. [`wire`] holds the messages
//! attribute by attribute on rust-netlink's traits ([`IpvsMessage`](wire::IpvsMessage) is a
//! [`GenlFamily`](netlink_packet_generic::GenlFamily)), for use with another socket, such as an asynchronous one.
//! [`constants`] has the numbers of `include/uapi/linux/ip_vs.h`.
//!
//! # What the kernel does
//!
//! All of it was seen on Linux 6.1 and is what the tests check.
//!
//! - A missing service is `ESRCH`, a missing destination `ENOENT`, an unknown scheduler `ENOENT` too, and so is
//!   a family number that is not valid any more: [`Error`] tells them apart by the command.
//! - The destinations of a missing service are an empty list, not an error.
//! - [`ServiceFlags::HASHED`] comes back with every service. [`ServiceConfig::flags`] is without it.
//! - A persistence netmask is a mask for IPv4 and a prefix length for IPv6: [`Netmask`] is for both.
//! - Counters and rates are brought up to date every two seconds.
//! - Dumps are not atomic, and do not say when the table changed underneath: see [`Client::services`]. With
//!   another process adding and deleting 100 services without pause, a dump of 3,000 that nobody touched lacked
//!   300 of them, and had 300 twice, on the average of ten.
//! - Adding 10,000 destinations took two to seven times as long in a namespace where as many had been deleted
//!   in the minutes before as in a fresh one. To change an object, set it; do not delete and add it.
//! - In a network namespace whose loopback link was never up, every IPv4 destination is refused with `EINVAL`,
//!   because there is no routing table to find it in.
//! - A reload of the module gives the family another number. The client looks it up again, which also makes the
//!   kernel load the module where it can. The table is empty then.
//!
//! # Bytes that are not what they should be
//!
//! Nothing that is received makes this crate panic. Attributes that it does not know are kept (`other`,
//! `Other`). Numbers it does not know have a variant of their own. What cannot be read is
//! [`Error::Malformed`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod client;
mod command;
pub mod constants;
mod destination;
mod error;
mod flags;
mod service;
mod settings;
mod stats;
pub mod wire;

pub use address::{AddressFamily, Protocol};
pub use client::{Client, Options};
pub use command::{Command, Object};
pub use destination::{Destination, DestinationConfig, DestinationId, Forwarding, Tunnel, TunnelKind};
pub use error::Error;
pub use flags::ServiceFlags;
/// An attribute that this crate does not know, as it was received.
pub use netlink_packet_core::DefaultNla;
pub use service::{Netmask, Service, ServiceConfig, ServiceId};
pub use settings::{Daemon, DaemonState, Info, Timeouts, Version};
pub use stats::Stats;

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
