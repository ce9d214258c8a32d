//! Where services and endpoints come from.

pub mod document;
pub mod files;
pub mod judge;
pub mod kube;
pub mod object;
mod origin;
pub mod problem;
pub mod store;
pub mod watch;

use std::{collections::BTreeMap, time::Instant};

pub use files::{Loaded, load};
pub use origin::Origin;
pub use problem::Problem;
pub use watch::watch;

use crate::{
    allocate::Lock,
    model::{ids::ServiceKey, node::NodeSays, refusal::Refusal, snapshot::Event},
};

/// What a source tells its reader.
#[derive(Debug)]
pub enum SourceMessage {
    /// Changes, in order, and when the first of them was seen.
    Events(Vec<Event>, Instant),
    /// The first complete read is over: what has not been mentioned does not exist.
    Synced,
    /// What `meshlb.lock` says now, when that is something else than before.
    Lock(Lock),
    /// What the source knows of this node.
    Node(NodeSays),
    /// Services that the controller accepts and this node does not, and why; replaces the list before.
    Refused(BTreeMap<ServiceKey, Refusal>),
    /// All that is wrong now; replaces the list before.
    Problems(Vec<Problem>),
}
