//! Tests against this machine's kernel: each in a network namespace of its own.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread in a fresh network namespace with `lo` up. Without the right to make one
/// (not root) it says so and does nothing.
pub(crate) fn in_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
            // CI must not pass by leaving this out.
            assert!(std::env::var_os("MESHLB_NO_SKIP").is_none(), "no network namespace: {e}");
            eprintln!("skipped: can't make a network namespace: {e}");
            return;
        }
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `ip ARGS` in the calling thread's namespace.
pub(crate) fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_ascii_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `ip ARGS` prints.
pub(crate) fn ip_says(args: &str) -> String {
    let output = Command::new("ip").args(args.split_ascii_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A link `eth0` with these addresses, its peer `peer0` up in the same namespace.
pub(crate) fn eth0(addresses: &[&str]) {
    ip("link add eth0 type veth peer name peer0");
    for address in addresses {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        ip(&format!("addr add {address} dev eth0{nodad}"));
    }
    ip("link set eth0 up");
    ip("link set peer0 up");
}
