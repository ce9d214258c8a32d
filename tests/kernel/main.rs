//! The kernel tests: nodes, pods and an outside client as network namespaces of one kernel, real packets.
//!
//! Run them with `tests/kernel/run.sh [FILTER…]`: directly where the kernel has IPVS and you are root, else in a VM.
//! Plain `cargo test` only says why it does nothing.
//!
//! A case is a function in [`cases`] that is given a [`runner::Cx`]: it asks that for a [`topology::Topology`] (shared with
//! the case before it when both want the same one), describes services in [`manifests::Manifests`], has them programmed on
//! the nodes, sends packets ([`client`]) and checks what came of them ([`check`]). When it returns, the runner has the
//! program clean up every node it touched and demands that nothing of it is left.

#![forbid(unsafe_code)]
#![allow(
    dead_code,
    reason = "the harness is a library for the cases; not every one of its parts has a user at all times"
)]

mod cases;
mod check;
mod client;
mod demo;
mod kube;
mod machine;
mod manifests;
mod matrix;
mod ns;
mod program;
mod reference;
mod runner;
mod server;
mod snapshot;
mod topology;

fn main() -> std::process::ExitCode {
    if std::env::args().nth(1).is_some_and(|a| a == "--demo") {
        return demo::main();
    }
    let mut suite = runner::Suite::default();
    cases::register(&mut suite);
    runner::main(suite)
}
