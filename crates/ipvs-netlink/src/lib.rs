//! IPVS over generic netlink.
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
pub use service::{Netmask, Service, ServiceConfig, ServiceId};
pub use settings::{Daemon, DaemonState, Info, Timeouts, Version};
pub use stats::Stats;
