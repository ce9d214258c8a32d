//! From a service, its slices and its allocation to the kernel state that serves it. Pure: the same
//! inputs give the same result on any machine.
//!
//! [`service`] compiles one service; [`base`] the part that does not depend on services;
//! [`merge`] keeps the sum of all of them, and says what changed when one is replaced.

pub mod base;
pub mod endpoints;
pub mod merge;
pub mod service;
#[cfg(test)]
mod tests;

pub use base::Base;
pub use merge::Merged;
pub use service::{Assigned, CompiledPort, CompiledService, Inputs, RealInfo, RealState, compile_service};
