#![forbid(unsafe_code)]
//! meshlb: one object declares a service, every node serves it from the kernel.
//!
//! ```text
//! source ─► Snapshot ─► compile ─► Desired ─► plan ─► ops ─► dataplane ─► kernel
//! (kube | files)          pure       state      pure     ▲      traits      IPVS, netfilter,
//!                                     ▲      Observed ───┘                  routes, sysctls
//!                                     │ health, allocations
//! ```

pub mod admin;
pub mod dataplane;
pub mod metrics;
pub mod model;
