//! The cases. Each file registers its own.

mod basics;
mod harness;
mod lifecycle;

use crate::runner::Suite;

/// Registers them all. Cases with the same topology stand together.
pub fn register(suite: &mut Suite) {
    harness::register(suite);
    basics::register(suite);
    lifecycle::register(suite);
}
