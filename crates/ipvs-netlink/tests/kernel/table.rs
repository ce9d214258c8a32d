//! Services and destinations: set, read back, shown by `ipvsadm`, refused.

use ipvs_netlink::{
    AddressFamily, Client, Command, DestinationConfig, Error, Forwarding, Netmask, Object, Protocol,
    ServiceConfig, ServiceFlags, Tunnel, TunnelKind,
};

use super::*;

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn what_is_set_is_what_is_read_and_what_ipvsadm_shows() {
    let _guard = namespace();
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
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn what_ipvsadm_sets_is_read() {
    let _guard = namespace();
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
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn refusals_name_their_object() {
    let _guard = namespace();
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
