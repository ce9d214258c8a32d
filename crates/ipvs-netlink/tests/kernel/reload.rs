//! The module goes and comes back.

use std::time::Duration;

use ipvs_netlink::{Client, Command, DestinationConfig, Error, ServiceConfig};

use super::*;

/// Unloads IPVS, waiting for namespaces of earlier tests to be taken down.
fn unload() {
    for _ in 0..100 {
        output(
            "for m in $(lsmod | awk '/^ip_vs_/{print $1}'); do rmmod $m 2>/dev/null; done; rmmod xt_ipvs ip_vs 2>/dev/null",
        );
        if !output("grep -q '^ip_vs ' /proc/modules").0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("ip_vs cannot be unloaded: {}", output("lsmod | grep ip_vs").1);
}

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn a_reload_of_the_module_is_survived() {
    let _guard = namespace();
    let mut client = Client::open().unwrap();
    let before = client.family_id();
    client.execute(&Command::AddService(mark(1), ServiceConfig::new("rr"))).unwrap();
    client.execute(&Command::Flush).unwrap();

    // Loaded anew by hand: the number is another.
    unload();
    run("modprobe ip_vs");
    client.execute(&Command::AddService(mark(2), ServiceConfig::new("rr"))).unwrap();
    assert_ne!(client.family_id(), before);
    assert_eq!(client.services().unwrap().len(), 1);

    // Unloaded: the look-up makes the kernel load it. A read notices as well as a write; a batch is done whole.
    client.execute(&Command::Flush).unwrap();
    unload();
    let second = client.family_id();
    assert_eq!(client.services().unwrap(), []);
    assert_ne!(client.family_id(), second);
    unload();
    let results = client.batch(&[
        Command::AddService(mark(3), ServiceConfig::new("rr")),
        Command::AddDestination(mark(3), to("10.0.0.1", 80), DestinationConfig::masquerade(1)),
        Command::AddService(mark(4), ServiceConfig::new("nosuch")),
    ]);
    assert!(results[0].is_ok() && results[1].is_ok(), "{results:?}");
    assert!(matches!(results[2], Err(Error::UnknownScheduler { .. })), "{results:?}");
    assert_eq!(rules(), ["-A -f 3 -s rr", "-a -f 3 -r 10.0.0.1:80 -m -w 1"]);
    client.execute(&Command::Flush).unwrap();

    // Where it cannot be loaded there is no IPVS, and it is back when the module is.
    let modprobe = run("cat /proc/sys/kernel/modprobe");
    unload();
    run("echo /bin/false > /proc/sys/kernel/modprobe");
    let open = Client::open().map(|_| ());
    let write = client.execute(&Command::AddService(mark(5), ServiceConfig::new("rr")));
    let read = client.services();
    run(&format!("echo {} > /proc/sys/kernel/modprobe", modprobe.trim()));
    assert!(matches!(open, Err(Error::NoIpvs)), "{open:?}");
    assert!(matches!(write, Err(Error::NoIpvs)), "{write:?}");
    assert!(matches!(read, Err(Error::NoIpvs)), "{read:?}");
    client.execute(&Command::AddService(mark(5), ServiceConfig::new("rr"))).unwrap();
    assert_eq!(rules(), ["-A -f 5 -s rr"]);
}
