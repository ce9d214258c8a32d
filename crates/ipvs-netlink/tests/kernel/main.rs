//! The client against the kernel this runs on: `MESHLB_KERNEL_TESTS=1 cargo test -- --ignored`. Needs root, the
//! module `ip_vs`, `ipvsadm`, `ip`, `modprobe` and `setpriv`.
//!
//! Each test works in a network namespace of its own; the one that reloads the module wants the machine for
//! itself (a virtual one: `vng --run`).

#![allow(clippy::unwrap_used)]

mod load;
mod reload;
mod state;
mod table;

use std::net::IpAddr;
use std::process::{Command as Process, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipvs_netlink::{AddressFamily, DestinationId, Protocol, ServiceId};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A namespace for this thread. Who did not ask for it gets no kernel touched.
fn namespace() -> MutexGuard<'static, ()> {
    assert_eq!(std::env::var("MESHLB_KERNEL_TESTS").as_deref(), Ok("1"), "set MESHLB_KERNEL_TESTS=1");
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    new_namespace();
    guard
}

fn new_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    run("ip link set lo up");
}

fn output(command: &str) -> (bool, String) {
    let out = Process::new("sh").args(["-c", command]).stderr(Stdio::inherit()).output().unwrap();
    (out.status.success(), String::from_utf8(out.stdout).unwrap())
}

fn run(command: &str) -> String {
    let (ok, text) = output(command);
    assert!(ok, "{command}: {text}");
    text
}

/// What `ipvsadm` would need to make what is there, in a fixed order.
fn rules() -> Vec<String> {
    let mut lines: Vec<String> = run("ipvsadm -Sn").lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service(protocol: Protocol, addr: &str) -> ServiceId {
    ServiceId::Address { protocol, addr: addr.parse().unwrap() }
}

fn to(addr: &str, port: u16) -> DestinationId {
    DestinationId::new(ip(addr), port)
}

fn mark(mark: u32) -> ServiceId {
    ServiceId::fwmark(AddressFamily::Inet, mark)
}

fn mark6(mark: u32) -> ServiceId {
    ServiceId::fwmark(AddressFamily::Inet6, mark)
}
