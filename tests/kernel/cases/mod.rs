//! The cases. Each file registers its own.

mod apart;
mod basics;
mod cni;
mod dns;
mod errors;
mod facts;
mod firewalld;
mod guard;
mod harness;
mod healing;
mod host_network;
mod idle;
mod kube;
mod kube_bench;
mod kube_proxy;
mod lifecycle;
mod lookups;
mod many;
mod neighbours;
mod ownership;
mod planned;
mod reload;
mod renderer;
mod restart;
mod scrape;
mod source_ports;
mod step;
mod support;
mod telling;
mod underlays;

use crate::runner::Suite;

/// Registers them all. Cases with the same topology stand together.
pub fn register(suite: &mut Suite) {
    harness::register(suite);
    // One of these takes the module ip_vs out, which needs a kernel where nothing uses it.
    errors::register(suite);
    idle::begin(suite);
    // Those that take long come before the many that don't, so that machines which share them end together.
    firewalld::register(suite);
    step::register(suite);
    apart::register(suite);
    basics::register(suite);
    source_ports::register(suite);
    guard::register(suite);
    neighbours::register(suite);
    ownership::register(suite);
    renderer::register(suite);
    restart::register(suite);
    telling::register(suite);
    planned::register(suite);
    dns::register(suite);
    lookups::register(suite);
    facts::register(suite);
    scrape::register(suite);
    healing::register(suite);
    lifecycle::register(suite);
    underlays::register(suite);
    host_network::register(suite);
    cni::register(suite);
    many::register(suite);
    reload::register(suite);
    kube::register(suite);
    kube_proxy::register(suite);
    kube_bench::register(suite);
    idle::end(suite);
}
