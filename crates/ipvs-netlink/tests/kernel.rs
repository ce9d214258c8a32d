//! The client against the kernel this runs on. Does nothing unless `MESHLB_KERNEL_TESTS=1`; needs root, the
//! module `ip_vs`, `ipvsadm`, `ip`, `modprobe` and `setpriv`.
//!
//! Each test works in a network namespace of its own; the one that reloads the module wants the machine for
//! itself (a virtual one: `vng --run`).

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::{Command as Process, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipvs_netlink::{
    AddressFamily, Client, Command, DaemonState, DestinationConfig, DestinationId, Error, Forwarding,
    Netmask, Object, Options, Protocol, ServiceConfig, ServiceFlags, ServiceId, Timeouts, Tunnel, TunnelKind,
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A namespace for this thread; nothing where no kernel is to be touched.
fn namespace() -> Option<MutexGuard<'static, ()>> {
    if std::env::var("MESHLB_KERNEL_TESTS").as_deref() != Ok("1") {
        eprintln!("skipped: MESHLB_KERNEL_TESTS is not 1");
        return None;
    }
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    new_namespace();
    Some(guard)
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

#[test]
fn what_is_set_is_what_is_read_and_what_ipvsadm_shows() {
    let Some(_guard) = namespace() else { return };
    let mut client = Client::open().unwrap();

    let rr = ServiceConfig::new("rr");
    let mut mh = ServiceConfig::new("mh").persistent(300);
    mh.flags |= ServiceFlags::MH_FALLBACK | ServiceFlags::MH_PORT;
    mh.netmask = Netmask::Prefix(24);
    let mut wrr6 = ServiceConfig::new("wrr").persistent(600);
    wrr6.netmask = Netmask::Prefix(64);
    let mut ops = ServiceConfig::new("sh");
    ops.flags = ServiceFlags::ONE_PACKET;
    let mut sip = ServiceConfig::new("rr").persistent(60);
    sip.flags |= ServiceFlags::ONE_PACKET;
    sip.pe_name = Some("sip".into());
    let services = [
        (mark(256), rr.clone()),
        (mark6(256), wrr6),
        // ipvsadm prints a mark as a signed number, so not u32::MAX here.
        (mark(0x7fff_ffff), ServiceConfig::new("none")),
        (service(Protocol::Tcp, "10.0.0.1:80"), mh),
        (service(Protocol::Udp, "[fd00::1]:53"), ops),
        (service(Protocol::Sctp, "10.0.0.2:99"), ServiceConfig::new("lc")),
        (service(Protocol::Udp, "10.0.0.3:5060"), sip),
    ];

    let mut limited = DestinationConfig::masquerade(3);
    limited.upper_threshold = 100;
    limited.lower_threshold = 50;
    let gue = Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 };
    let gre = Tunnel { kind: TunnelKind::Gre, port: 0, flags: 1 };
    let destinations = [
        (mark(256), to("10.244.1.11", 8080), DestinationConfig::masquerade(1)),
        (mark(256), to("127.0.0.1", 0), DestinationConfig::masquerade(0)),
        (mark6(256), to("fd00:244:1::11", 8080), limited),
        (services[3].0, to("10.244.1.12", 80), DestinationConfig::new(Forwarding::Tunnel(gue), 2)),
        (services[3].0, to("10.244.1.13", 80), DestinationConfig::new(Forwarding::Tunnel(gre), 65535)),
        // Tunnels may cross families.
        (
            services[3].0,
            to("fd00:244:1::12", 80),
            DestinationConfig::new(Forwarding::Tunnel(Tunnel::IPIP), 1),
        ),
        (services[4].0, to("fd00:244:1::12", 53), DestinationConfig::new(Forwarding::DirectRoute, 1)),
        (services[5].0, to("10.244.1.14", 99), DestinationConfig::new(Forwarding::Local, 1)),
        (services[6].0, to("10.244.1.15", 5060), DestinationConfig::new(Forwarding::Bypass, 1)),
    ];

    let commands: Vec<Command> = services
        .iter()
        .map(|(id, config)| Command::AddService(*id, config.clone()))
        .chain(
            destinations.iter().map(|(service, id, config)| Command::AddDestination(*service, *id, *config)),
        )
        .collect();
    for (command, result) in commands.iter().zip(client.batch(&commands)) {
        assert!(result.is_ok(), "{command:?}: {result:?}");
    }
    assert_eq!(client.writes(), commands.len() as u64);

    let shown = run("ipvsadm -Ln");
    eprintln!("{shown}");
    let mut dump = client.services().unwrap();
    assert_eq!(dump.len(), services.len());
    for (id, config) in &services {
        let at = dump.iter().position(|service| service.id == *id).unwrap();
        let one = dump.swap_remove(at);
        assert_eq!(one.config, *config, "{id}");
        assert_eq!(one.flags, config.flags | ServiceFlags::HASHED);
        assert_eq!(one.other, [], "{id}");
        assert_eq!(client.service(id).unwrap(), Some(one));
        assert!(shown.lines().any(|line| squeeze(line).starts_with(&id.to_string())), "{id} in {shown}");

        let mut expected: Vec<_> =
            destinations.iter().filter(|(of, ..)| of == id).map(|(_, id, config)| (*id, *config)).collect();
        expected.sort_by_key(|(id, _)| *id);
        let got = client.destinations(id).unwrap();
        assert!(got.iter().all(|d| d.other.is_empty() && d.active == 0 && d.persistent == 0));
        let mut got: Vec<_> = got.into_iter().map(|d| (d.id, d.config)).collect();
        got.sort_by_key(|(id, _)| *id);
        assert_eq!(got, expected, "{id}");
        assert!(expected.iter().all(|(id, _)| shown.contains(&format!("-> {id} "))), "{shown}");
    }

    // A change takes back everything that is not asked for any more.
    for (id, _) in &services {
        client.execute(&Command::SetService(*id, rr.clone())).unwrap();
        assert_eq!(client.service(id).unwrap().unwrap().config, rr, "{id}");
    }
    for (service, id, _) in &destinations {
        if service.family() == AddressFamily::of(id.addr) {
            let config = DestinationConfig::masquerade(0);
            client.execute(&Command::SetDestination(*service, *id, config)).unwrap();
            let all = client.destinations(service).unwrap();
            assert_eq!(all.iter().find(|d| d.id == *id).unwrap().config, config, "{service} {id}");
        }
    }

    for (service, id, _) in &destinations {
        client.execute(&Command::DelDestination(*service, *id)).unwrap();
    }
    client.execute(&Command::DelService(services[0].0)).unwrap();
    assert_eq!(rules().len(), services.len() - 1);
    client.execute(&Command::Flush).unwrap();
    assert_eq!(rules(), Vec::<String>::new());
    assert_eq!(client.services().unwrap(), []);
}

/// As `ipvsadm` aligns its columns.
fn squeeze(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn what_ipvsadm_sets_is_read() {
    let Some(_guard) = namespace() else { return };
    let mut client = Client::open().unwrap();
    run("ipvsadm -A -f 100 -s rr && ipvsadm -a -f 100 -r 10.0.0.1:8080 -m -w 7");
    run("ipvsadm -A -t 10.1.0.1:443 -s wlc -p 60 -M 255.0.255.0");
    assert_eq!(
        client.service(&service(Protocol::Tcp, "10.1.0.1:443")).unwrap().unwrap().config.netmask,
        Netmask::Ipv4([255, 0, 255, 0].into()),
    );
    let destinations = client.destinations(&mark(100)).unwrap();
    assert_eq!(destinations.len(), 1);
    assert_eq!(destinations[0].id, to("10.0.0.1", 8080));
    assert_eq!(destinations[0].config, DestinationConfig::masquerade(7));
}

#[test]
fn refusals_name_their_object() {
    let Some(_guard) = namespace() else { return };
    let mut client = Client::open().unwrap();
    let rr = ServiceConfig::new("rr");
    let masquerade = DestinationConfig::masquerade(1);
    let there = to("10.0.0.1", 80);
    client.execute(&Command::AddService(mark(1), rr.clone())).unwrap();
    client.execute(&Command::AddDestination(mark(1), there, masquerade)).unwrap();

    let missing = Object::Service(mark(2));
    let absent = to("10.0.0.2", 80);
    let results = client.batch(&[
        Command::AddService(mark(1), rr.clone()),
        Command::AddDestination(mark(1), there, masquerade),
        Command::SetService(mark(2), rr.clone()),
        Command::DelService(mark(2)),
        Command::Zero(Some(mark(2))),
        Command::AddDestination(mark(2), there, masquerade),
        Command::DelDestination(mark(2), there),
        Command::SetDestination(mark(1), absent, masquerade),
        Command::DelDestination(mark(1), absent),
        Command::AddService(mark(3), ServiceConfig::new("nosuch")),
        Command::SetService(mark(1), ServiceConfig::new("nosuch")),
        Command::AddDestination(mark(1), to("fd00::1", 80), masquerade),
        Command::AddDestination(mark(1), absent, DestinationConfig::masquerade(-1)),
        Command::AddDestination(mark(1), to("224.0.0.1", 80), masquerade),
        Command::AddService(mark(0), rr.clone()),
        Command::AddService(mark(4), ServiceConfig::new("a-name-of-16-byt")),
        // And the last of them is done.
        Command::AddService(mark(5), rr),
    ]);
    for result in &results {
        eprintln!("{}", result.as_ref().map_or_else(ToString::to_string, |()| "done".into()));
    }
    let errors: Vec<&Error> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(errors.len(), 16);
    assert!(matches!(errors[0], Error::AlreadyExists { object } if *object == Object::Service(mark(1))));
    assert!(
        matches!(errors[1], Error::AlreadyExists { object } if *object == Object::Destination(mark(1), there))
    );
    for error in &errors[2..7] {
        assert!(matches!(error, Error::NotFound { object } if *object == missing), "{error}");
    }
    for error in &errors[7..9] {
        let object = Object::Destination(mark(1), absent);
        assert!(matches!(error, Error::NotFound { object: o } if *o == object), "{error}");
    }
    for (error, id) in errors[9..11].iter().zip([mark(3), mark(1)]) {
        assert!(
            matches!(error, Error::UnknownScheduler { service, scheduler, .. }
                if *service == id && scheduler == "nosuch"),
            "{error}"
        );
    }
    assert!(matches!(errors[11], Error::FamilyMismatch { .. }), "{}", errors[11]);
    assert!(matches!(errors[12], Error::Kernel { errno: 34, .. }), "{}", errors[12]);
    assert!(matches!(errors[13], Error::Kernel { errno: 22, .. }), "{}", errors[13]);
    assert!(matches!(errors[14], Error::Invalid { .. }), "{}", errors[14]);
    assert!(matches!(errors[15], Error::Invalid { .. }), "{}", errors[15]);
    assert!(results[16].is_ok());

    assert_eq!(client.service(&mark(2)).unwrap(), None);
    assert_eq!(client.destinations(&mark(2)).unwrap(), []);
    // Nothing was half done.
    assert_eq!(rules(), ["-A -f 1 -s rr", "-A -f 5 -s rr", "-a -f 1 -r 10.0.0.1:80 -m -w 1"]);
}

#[test]
fn large_batches_and_dumps_are_whole() {
    let Some(_guard) = namespace() else { return };
    // The smallest buffer makes for single commands, the usual one for batches of 128.
    for (receive_buffer, count) in [(1 << 20, 5_000), (16 << 10, 1_000), (0, 200)] {
        let mut client = Client::open_with(Options { receive_buffer, ..Options::default() }).unwrap();
        let services: Vec<ServiceId> =
            (1..=count).map(|i| if i % 2 == 0 { mark(i) } else { mark6(i) }).collect();
        let commands: Vec<Command> =
            services.iter().map(|id| Command::AddService(*id, ServiceConfig::new("rr"))).collect();
        let start = Instant::now();
        let results = client.batch(&commands);
        eprintln!("{count} services with buffer {receive_buffer}: {:?}", start.elapsed());
        assert_eq!(results.len(), commands.len());
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(client.writes(), u64::from(count));

        // Every third is there twice, every fourth is not to be found.
        let mixed: Vec<Command> = services
            .iter()
            .enumerate()
            .map(|(i, id)| match i % 4 {
                0 => Command::AddService(*id, ServiceConfig::new("rr")),
                1 => Command::DelDestination(*id, to("10.0.0.1", 1)),
                2 if id.family() == AddressFamily::Inet => {
                    Command::AddDestination(*id, to("10.0.0.1", 1), DestinationConfig::masquerade(1))
                }
                _ => Command::AddDestination(*id, to("fd00::1", 1), DestinationConfig::masquerade(1)),
            })
            .collect();
        for (i, (command, result)) in mixed.iter().zip(client.batch(&mixed)).enumerate() {
            let object = command.object();
            match (command, result) {
                (Command::AddService(..), Err(Error::AlreadyExists { object: o })) => assert_eq!(o, object),
                (Command::DelDestination(..), Err(Error::NotFound { object: o })) => assert_eq!(o, object),
                (Command::AddDestination(service, id, _), result) => {
                    let fits = service.family() == AddressFamily::of(id.addr);
                    match result {
                        Ok(()) if fits => {}
                        Err(Error::FamilyMismatch { service: s, .. }) if !fits => assert_eq!(s, *service),
                        other => panic!("{i}: {other:?}"),
                    }
                }
                other => panic!("{i}: {other:?}"),
            }
        }

        let start = Instant::now();
        let mut dump: Vec<ServiceId> =
            client.services().unwrap().into_iter().map(|service| service.id).collect();
        eprintln!("dump of {count}: {:?}", start.elapsed());
        let mut expected = services.clone();
        dump.sort();
        expected.sort();
        assert_eq!(dump, expected);
        assert_eq!(run("ipvsadm -Ln | grep -c ^FWM").trim(), count.to_string());
        let mut seen = 0;
        client.for_each_service(|_| seen += 1).unwrap();
        assert_eq!(seen, count);
        client.execute(&Command::Flush).unwrap();
    }
}

#[test]
fn many_destinations_of_one_service_are_read() {
    let Some(_guard) = namespace() else { return };
    let mut client = Client::open().unwrap();
    client.execute(&Command::AddService(mark6(9), ServiceConfig::new("wrr"))).unwrap();
    let commands: Vec<Command> = (1..=3000u16)
        .map(|i| Command::AddDestination(mark6(9), to("fd00::1", i), DestinationConfig::masquerade(i.into())))
        .collect();
    assert!(client.batch(&commands).iter().all(Result::is_ok));
    let mut ports: Vec<u16> = client
        .destinations(&mark6(9))
        .unwrap()
        .into_iter()
        .inspect(|d| assert_eq!(d.config.weight, i32::from(d.id.port)))
        .map(|d| d.id.port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, (1..=3000).collect::<Vec<u16>>());
}

#[test]
fn traffic_is_counted_and_zeroed() {
    let Some(_guard) = namespace() else { return };
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
fn info_timeouts_and_daemons() {
    let Some(_guard) = namespace() else { return };
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
fn a_client_stays_in_its_namespace() {
    let Some(_guard) = namespace() else { return };
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
fn without_the_capability_permission_is_denied() {
    let Some(_guard) = namespace() else { return };
    let test = std::env::current_exe().unwrap();
    let out = Process::new("setpriv")
        .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
        .arg(test)
        .args(["--exact", "helper_without_capability", "--nocapture"])
        .env("MESHLB_KERNEL_TESTS_HELPER", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && text.contains("helper: no permission"), "{out:?}");
}

/// Unloads IPVS, waiting for namespaces of earlier tests to be taken down.
fn unload() {
    for _ in 0..100 {
        output(
            "for m in $(lsmod | awk '/^ip_vs_/{print $1}'); do rmmod $m 2>/dev/null; done; rmmod ip_vs 2>/dev/null",
        );
        if !output("grep -q '^ip_vs ' /proc/modules").0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("ip_vs cannot be unloaded: {}", output("lsmod | grep ip_vs").1);
}

#[test]
fn a_reload_of_the_module_is_survived() {
    let Some(_guard) = namespace() else { return };
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
