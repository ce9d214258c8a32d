//! The cases. Each file registers its own.

mod basics;
mod errors;
mod firewalld;
mod guard;
mod harness;
mod healing;
mod host_network;
mod idle;
mod lifecycle;
mod many;
mod neighbours;
mod reload;
mod renderer;
mod restart;
mod scrape;
mod step;
mod support;
mod underlays;

use crate::runner::Suite;

/// Whether to run cases too that have not passed yet: new ones that nobody has seen run, and open bugs. They are no
/// part of `make test` until they have: `MESHLB_KERNEL_UNPROVEN=1 tests/kernel/run.sh healing::`.
fn unproven() -> bool {
    std::env::var_os("MESHLB_KERNEL_UNPROVEN").is_some_and(|v| v == "1")
}

/// Registers them all. Cases with the same topology stand together.
pub fn register(suite: &mut Suite) {
    harness::register(suite);
    // One of these takes the module ip_vs out, which needs a kernel where nothing uses it.
    errors::register(suite);
    if unproven() {
        idle::begin(suite);
    }
    basics::register(suite);
    guard::register(suite);
    neighbours::register(suite);
    renderer::register(suite);
    restart::register(suite);
    scrape::register(suite);
    healing::register(suite);
    lifecycle::register(suite);
    underlays::register(suite);
    host_network::register(suite);
    many::register(suite);
    reload::register(suite);
    step::register(suite);
    if unproven() {
        firewalld::register(suite);
        idle::end(suite);
    }
}
