//! The cases. Each file registers its own.

mod basics;
mod guard;
mod harness;
mod healing;
mod neighbours;
mod underlays;

use crate::runner::Suite;

/// Registers them all. Cases with the same topology stand together.
pub fn register(suite: &mut Suite) {
    harness::register(suite);
    basics::register(suite);
    guard::register(suite);
    healing::register(suite);
    neighbours::register(suite);
    underlays::register(suite);
}
