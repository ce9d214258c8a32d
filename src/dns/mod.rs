//! The mesh's own DNS: names of services, answered from the same desired state that the kernel is programmed from.
//!
//! ```text
//! Snapshot, VIPs ─► records (one service) ─► names (who holds which) ─► Table, swapped whole
//!                                                                         │
//! packet ─► handler ─► ours?  answer ─────────────────────────────────────┘
//!              └─────► else   forward (a cache, then upstreams by hickory's resolver)
//! ```

pub mod answer;
pub mod ask;
mod cache;
pub mod choice;
mod counted;
pub mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handler;
pub mod limit;
pub mod message;
pub mod names;
mod places;
mod pool;
pub mod ports;
mod quick;
pub mod records;
mod running;
pub mod server;
mod special;
pub mod table;
mod tcp;
mod udp;
pub mod unknown;
pub mod upstream;
mod waiting;
pub mod zone;

#[cfg(test)]
mod forward_tests;
#[cfg(test)]
mod handler_tests;
#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod tests;
