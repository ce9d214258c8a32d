//! The domain: services, endpoints, the node, and the state a kernel should have.
//!
//! Nothing in here knows Kubernetes types or netlink. Sources produce [`snapshot::Snapshot`]s of
//! [`service::Service`] and [`endpoints::Slice`]; `compile` turns them into [`kernel`] state.

pub mod endpoints;
#[cfg(test)]
pub mod fixtures;
pub mod ids;
pub mod kernel;
pub mod node;
pub mod refusal;
pub mod service;
pub mod small;
pub mod snapshot;
pub mod unread;
