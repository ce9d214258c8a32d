//! meshlb: one object declares a service, every node serves it from the kernel.
//!
//! ```text
//! source ─► Snapshot ─► compile ─► Desired ─► plan ─► ops ─► dataplane ─► kernel
//! (kube | files)          pure       state      pure     ▲      traits      IPVS, netfilter,
//!                                     ▲      Observed ───┘                  routes, sysctls
//!                                     │ health, allocations
//! ```

#![forbid(unsafe_code)]

pub mod admin;
pub mod allocate;
pub mod api;
pub mod cli;
pub mod compile;
pub mod controller;
pub mod dataplane;
pub mod dns;
pub mod instance;
pub mod meshnode;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod reconcile;
pub mod source;
pub mod state;
pub mod whole_file;
