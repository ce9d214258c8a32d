//! The mesh's own DNS: names of services, answered from the same desired state that the kernel is programmed from.
//!
//! ```text
//! Snapshot, VIPs ─► records (one service) ─► names (who holds which) ─► Table, swapped whole
//!                                                                         │
//! packet ─► handler ─► ours?  answer ─────────────────────────────────────┘
//!              └─────► else   forward (hickory's resolver, its cache)
//! ```

pub mod answer;
pub mod ask;
pub mod choice;
mod counted;
pub mod forward;
pub mod handler;
pub mod limit;
pub mod message;
pub mod names;
mod places;
pub mod records;
pub mod server;
pub mod table;
mod tcp;
pub mod upstream;
pub mod zone;

#[cfg(test)]
mod handler_tests;
#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod tests;
