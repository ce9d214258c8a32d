//! The loop that keeps the kernel as desired: [`engine`] makes one turn, [`agent`] decides when.

pub mod agent;
#[cfg(test)]
mod agent_tests;
#[cfg(test)]
mod apart_tests;
#[cfg(test)]
mod connections_tests;
pub mod engine;
#[cfg(test)]
mod left_alone_tests;
pub mod listeners;
#[cfg(test)]
mod look_tests;
pub mod rotation;
mod steady;
#[cfg(test)]
pub(crate) mod tests;

pub use engine::{Drift, Engine, Settings, Turn};
