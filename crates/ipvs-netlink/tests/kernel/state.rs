//! What is not the table: counters, timeouts, daemons, namespaces, permission.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Command as Process;
use std::time::Duration;

use ipvs_netlink::{
    Client, Command, DaemonState, DestinationConfig, Error, Object, Protocol, ServiceConfig, Timeouts,
};

use super::*;

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn traffic_is_counted_and_zeroed() {
    let _guard = namespace();
    let mut client = Client::open().unwrap();
    run("ip addr add 10.9.9.9/32 dev lo && ip addr add 10.9.9.10/32 dev lo");
    let id = service(Protocol::Tcp, "10.9.9.9:80");
    let listener = TcpListener::bind("10.9.9.10:8080").unwrap();
    client.execute(&Command::AddService(id, ServiceConfig::new("rr"))).unwrap();
    client
        .execute(&Command::AddDestination(id, to("10.9.9.10", 8080), DestinationConfig::masquerade(1)))
        .unwrap();
    let mut connections = Vec::new();
    for _ in 0..3 {
        let mut stream =
            TcpStream::connect_timeout(&"10.9.9.9:80".parse().unwrap(), Duration::from_secs(5)).unwrap();
        stream.write_all(&[0; 1000]).unwrap();
        connections.push((stream, listener.accept().unwrap()));
    }
    // The kernel's estimator adds up the counters and the rates every two seconds.
    std::thread::sleep(Duration::from_millis(4500));
    let destination = client.destinations(&id).unwrap().remove(0);
    let stats = client.service(&id).unwrap().unwrap().stats;
    eprintln!("{stats:?}\n{destination:?}\n{}", run("ipvsadm -Ln --stats --exact"));
    assert_eq!((destination.active, stats.connections), (3, 3));
    assert_eq!(destination.stats, stats);
    assert!(
        stats.in_bytes > 3000 && stats.in_packets >= 9 && stats.out_packets >= 6 && stats.out_bytes > 300
    );
    assert!(stats.inbps > 0);
    client.execute(&Command::Zero(Some(id))).unwrap();
    assert_eq!(client.service(&id).unwrap().unwrap().stats.connections, 0);
    assert_eq!(client.destinations(&id).unwrap()[0].stats.connections, 0);
    client.execute(&Command::Zero(None)).unwrap();
    // And a mark of all bits, which ipvsadm prints as -1.
    client.execute(&Command::AddService(mark(u32::MAX), ServiceConfig::new("rr"))).unwrap();
    assert!(client.service(&mark(u32::MAX)).unwrap().is_some());
}

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn info_timeouts_and_daemons() {
    let _guard = namespace();
    let mut client = Client::open().unwrap();
    let info = client.info().unwrap();
    let head = run("ipvsadm -Ln | head -1");
    assert_eq!(
        head.trim(),
        format!("IP Virtual Server version {} (size={})", info.version, info.connection_table_size)
    );

    let before = client.timeouts().unwrap();
    assert_eq!(before, Timeouts { tcp: 900, tcp_fin: 120, udp: 300 });
    client.execute(&Command::SetTimeouts(Timeouts { tcp: 1000, tcp_fin: 0, udp: 301 })).unwrap();
    assert_eq!(client.timeouts().unwrap(), Timeouts { tcp: 1000, tcp_fin: 120, udp: 301 });
    assert_eq!(run("ipvsadm -L --timeout").trim(), "Timeout (tcp tcpfin udp): 1000 120 301");

    assert_eq!(client.daemons().unwrap(), []);
    run("ipvsadm --start-daemon master --mcast-interface lo --syncid 7");
    run(
        "ipvsadm --start-daemon backup --mcast-interface lo --syncid 8 --mcast-group ff02::51 --mcast-port 9000",
    );
    let daemons = client.daemons().unwrap();
    eprintln!("{daemons:?}");
    assert_eq!(daemons.len(), 2);
    let master = daemons.iter().find(|daemon| daemon.state == DaemonState::Master).unwrap();
    assert_eq!((master.interface.as_str(), master.sync_id, master.port), ("lo", 7, 8848));
    assert_eq!(master.group, Some(ip("224.0.0.81")));
    let backup = daemons.iter().find(|daemon| daemon.state == DaemonState::Backup).unwrap();
    assert_eq!((backup.sync_id, backup.port, backup.group), (8, 9000, Some(ip("ff02::51"))));
    assert_eq!(backup.other, []);
    run("ipvsadm --stop-daemon master && ipvsadm --stop-daemon backup");
    assert_eq!(client.daemons().unwrap(), []);
}

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn a_client_stays_in_its_namespace() {
    let _guard = namespace();
    let mut first = Client::open().unwrap();
    first.execute(&Command::AddService(mark(1), ServiceConfig::new("rr"))).unwrap();
    new_namespace();
    let mut second = Client::open().unwrap();
    assert_eq!(second.services().unwrap(), []);
    second.execute(&Command::AddService(mark(2), ServiceConfig::new("rr"))).unwrap();
    assert_eq!(rules(), ["-A -f 2 -s rr"]);
    assert_eq!(first.services().unwrap()[0].id, mark(1));
}

/// Runs in a process of its own without `CAP_NET_ADMIN`: see below.
#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn helper_without_capability() {
    if std::env::var_os("MESHLB_KERNEL_TESTS_HELPER").is_none() {
        return;
    }
    let mut client = Client::open().unwrap();
    let read = client.services().unwrap_err();
    assert!(matches!(read, Error::PermissionDenied { object: Object::Services }), "{read}");
    let write = client.execute(&Command::AddService(mark(1), ServiceConfig::new("rr"))).unwrap_err();
    assert!(
        matches!(write, Error::PermissionDenied { object } if object == Object::Service(mark(1))),
        "{write}"
    );
    eprintln!("helper: {write}");
}

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn without_the_capability_permission_is_denied() {
    let _guard = namespace();
    let test = std::env::current_exe().unwrap();
    let out = Process::new("setpriv")
        .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
        .arg(test)
        .args(["--exact", "state::helper_without_capability", "--ignored", "--nocapture"])
        .env("MESHLB_KERNEL_TESTS_HELPER", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && text.contains("helper: no permission"), "{out:?}");
}
