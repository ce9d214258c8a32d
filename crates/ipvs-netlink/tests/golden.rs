//! Bytes of a real kernel: parsed they are the expected values, emitted they are the same bytes again.

#![cfg(target_endian = "little")]
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;

use ipvs_netlink::wire::{IpvsAttribute, IpvsCommand, IpvsMessage};
use ipvs_netlink::{
    AddressFamily, Command, Daemon, DaemonState, Destination, DestinationConfig, DestinationId, Forwarding,
    Info, Netmask, Protocol, Service, ServiceConfig, ServiceFlags, ServiceId, Stats, Timeouts, Tunnel,
    TunnelKind, Version,
};
use netlink_packet_core::{NLA_F_NESTED, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;

const TABLE: &str = include_str!("golden/table.txt");
const TRAFFIC: &str = include_str!("golden/traffic.txt");

/// What was sent (`>`) or received (`<`) while a command ran.
fn messages(capture: &str, command: &str, direction: &str) -> Vec<Vec<u8>> {
    let section = capture
        .split("\n$ ")
        .find(|section| section.lines().next() == Some(command))
        .unwrap_or_else(|| panic!("no {command} in the capture"));
    section.lines().filter_map(|line| line.strip_prefix(direction)).map(|hex| unhex(hex.trim())).collect()
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn ipvs(bytes: &[u8]) -> Option<IpvsMessage> {
    match NetlinkMessage::<GenlMessage<IpvsMessage>>::deserialize(bytes).unwrap().payload {
        NetlinkPayload::InnerMessage(message) => Some(message.payload),
        _ => None,
    }
}

fn sent(capture: &str, command: &str) -> Vec<IpvsMessage> {
    messages(capture, command, "> ").iter().filter_map(|bytes| ipvs(bytes)).collect()
}

fn received(capture: &str, command: &str) -> Vec<IpvsMessage> {
    messages(capture, command, "< ").iter().filter_map(|bytes| ipvs(bytes)).collect()
}

fn services(capture: &str, command: &str) -> Vec<Service> {
    received(capture, command)
        .iter()
        .flat_map(|message| &message.attributes)
        .filter_map(|attribute| match attribute {
            IpvsAttribute::Service(list) => Some(Service::from_attributes(list).unwrap()),
            _ => None,
        })
        .collect()
}

fn destinations(capture: &str, command: &str) -> Vec<Destination> {
    received(capture, command)
        .iter()
        .flat_map(|message| &message.attributes)
        .filter_map(|attribute| match attribute {
            // The family that is passed is wrong for half of them: the kernel's own word counts.
            IpvsAttribute::Destination(list) => {
                Some(Destination::from_attributes(list, AddressFamily::Inet).unwrap())
            }
            _ => None,
        })
        .collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn tcp(addr: &str) -> ServiceId {
    ServiceId::Address { protocol: Protocol::Tcp, addr: addr.parse().unwrap() }
}

fn udp(addr: &str) -> ServiceId {
    ServiceId::Address { protocol: Protocol::Udp, addr: addr.parse().unwrap() }
}

fn to(addr: &str, port: u16) -> DestinationId {
    DestinationId::new(ip(addr), port)
}

const FWM256: ServiceId = ServiceId::fwmark(AddressFamily::Inet, 256);
const FWM256_6: ServiceId = ServiceId::fwmark(AddressFamily::Inet6, 256);

/// Sets `NLA_F_NESTED` on the outermost attribute and on the statistics inside, which the kernel leaves out.
fn with_nested_flags(bytes: &[u8]) -> Vec<u8> {
    fn mark(out: &mut [u8], start: usize, end: usize, nested: &dyn Fn(u16) -> bool, deeper: bool) {
        let mut at = start;
        while at + 4 <= end {
            let length = usize::from(u16::from_le_bytes([out[at], out[at + 1]]));
            let kind = u16::from_le_bytes([out[at + 2], out[at + 3]]);
            if nested(kind) {
                out[at + 2..at + 4].copy_from_slice(&(kind | NLA_F_NESTED).to_le_bytes());
                if deeper {
                    mark(out, at + 4, at + length, &|kind| kind == 10 || kind == 12, false);
                }
            }
            at += length.next_multiple_of(4);
        }
    }
    let mut out = bytes.to_vec();
    let end = out.len();
    // Daemons (attribute 3) have a plain attribute 10 nowhere, so one rule does for all.
    mark(&mut out, 20, end, &|kind| (1..=3).contains(&kind), true);
    out
}

#[test]
fn every_captured_message_is_emitted_as_it_was() {
    let mut seen = 0;
    for line in TABLE.lines().chain(TRAFFIC.lines()) {
        let Some(bytes) = line.strip_prefix("> ").or(line.strip_prefix("< ")).map(unhex) else { continue };
        let message = NetlinkMessage::<GenlMessage<IpvsMessage>>::deserialize(&bytes).unwrap();
        let mut emitted = vec![0; message.buffer_len()];
        message.serialize(&mut emitted);
        let from_kernel = line.starts_with('<');
        let expected = match &message.payload {
            NetlinkPayload::InnerMessage(inner)
                if from_kernel
                    && !matches!(inner.payload.command, IpvsCommand::SetInfo | IpvsCommand::SetConfig) =>
            {
                with_nested_flags(&bytes)
            }
            _ => bytes,
        };
        assert_eq!(emitted, expected, "{line}");
        if let NetlinkPayload::InnerMessage(inner) = &message.payload {
            assert!(!inner.payload.attributes.iter().any(|a| matches!(a, IpvsAttribute::Other(_))), "{line}");
        }
        seen += 1;
    }
    assert!(seen > 70, "{seen}");
}

#[test]
fn services_are_added_as_ipvsadm_adds_them() {
    let mut ops_sip = ServiceConfig::new("rr").persistent(60);
    ops_sip.flags |= ServiceFlags::ONE_PACKET;
    ops_sip.pe_name = Some("sip".into());
    let mut mh = ServiceConfig::new("mh").persistent(300);
    mh.flags |= ServiceFlags::MH_FALLBACK | ServiceFlags::MH_PORT;
    mh.netmask = Netmask::Prefix(24);
    let mut wrr = ServiceConfig::new("wrr").persistent(600);
    wrr.netmask = Netmask::Prefix(64);
    let mut sh = ServiceConfig::new("sh");
    sh.flags = ServiceFlags::ONE_PACKET;
    let sctp = ServiceId::address(Protocol::Sctp, ip("10.0.0.2"), 99);
    let cases = [
        ("ipvsadm -A -f 256 -s rr", FWM256, ServiceConfig::new("rr")),
        ("ipvsadm -A -f 256 -6 -s wrr -p 600 -M 64", FWM256_6, wrr),
        (
            "ipvsadm -A -t 10.0.0.1:80 -s mh -b mh-port,mh-fallback -p 300 -M 255.255.255.0",
            tcp("10.0.0.1:80"),
            mh,
        ),
        ("ipvsadm -A -u [fd00::1]:53 -s sh -o", udp("[fd00::1]:53"), sh),
        ("ipvsadm -A --sctp-service 10.0.0.2:99 -s lc", sctp, ServiceConfig::new("lc")),
        ("ipvsadm -A -u 10.0.0.3:5060 -s rr -p 60 --pe sip -o", udp("10.0.0.3:5060"), ops_sip),
        (
            "ipvsadm -A -f 300 -s nosuch",
            ServiceId::fwmark(AddressFamily::Inet, 300),
            ServiceConfig::new("nosuch"),
        ),
    ];
    let dump = services(TABLE, "ipvsadm -Ln");
    for (command, id, config) in cases {
        let ours = Command::AddService(id, config.clone()).to_message();
        assert_eq!(sent(TABLE, command).last(), Some(&ours), "{command}");
        if let Some(service) = dump.iter().find(|service| service.id == id) {
            // What comes back is what was asked for.
            assert_eq!(service.config, config, "{command}");
            assert_eq!(service.flags, config.flags | ServiceFlags::HASHED);
            assert_eq!(service.stats, Stats::default());
            assert_eq!(service.other, []);
        } else {
            assert_eq!(command, "ipvsadm -A -f 300 -s nosuch");
        }
    }
    assert_eq!(dump.len(), 6);
    let edit = Command::SetService(tcp("10.9.9.9:80"), ServiceConfig::new("wrr")).to_message();
    assert_eq!(sent(TRAFFIC, "ipvsadm -E -t 10.9.9.9:80 -s wrr"), [edit]);
}

#[test]
fn destinations_come_back_as_they_were_asked_for() {
    let gue = Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 };
    let gre = Tunnel { kind: TunnelKind::Gre, port: 0, flags: 0 };
    let mut thresholds = DestinationConfig::masquerade(3);
    thresholds.upper_threshold = 100;
    thresholds.lower_threshold = 50;
    let expected = [
        (to("10.244.1.12", 80), DestinationConfig::new(Forwarding::Tunnel(gue), 2)),
        (to("fd00:244:1::12", 53), DestinationConfig::new(Forwarding::DirectRoute, 1)),
        (to("10.244.1.11", 8080), DestinationConfig::masquerade(0)),
        (to("fd00:244:1::11", 8080), thresholds),
    ];
    let got: Vec<_> = destinations(TABLE, "ipvsadm -Ln").into_iter().map(|d| (d.id, d.config)).collect();
    assert_eq!(got, expected);

    let expected = [
        (to("10.9.9.10", 8080), DestinationConfig::masquerade(1)),
        (to("10.9.9.10", 1), DestinationConfig::new(Forwarding::DirectRoute, 1)),
        (to("127.0.0.1", 0), DestinationConfig::masquerade(1)),
        (to("10.9.9.10", 8), DestinationConfig::new(Forwarding::Tunnel(Tunnel::IPIP), 1)),
        (to("fd00:9::9", 8), DestinationConfig::new(Forwarding::Tunnel(gre), 1)),
    ];
    let got: Vec<_> = destinations(TRAFFIC, "ipvsadm -Ln").into_iter().map(|d| (d.id, d.config)).collect();
    assert_eq!(got, expected);
}

/// `ipvsadm` spells out more than it has to; what it says of the destination is what we say.
#[test]
fn destinations_are_added_as_ipvsadm_adds_them() {
    let gue = Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 };
    let command = Command::AddDestination(
        tcp("10.0.0.1:80"),
        to("10.244.1.12", 80),
        DestinationConfig::new(Forwarding::Tunnel(gue), 2),
    );
    let line =
        "ipvsadm -a -t 10.0.0.1:80 -r 10.244.1.12:80 -i -w 2 --tun-type gue --tun-port 6080 --tun-csum";
    let theirs = sent(TABLE, line).pop().unwrap();
    let ours = command.to_message();
    assert_eq!(ours.command, theirs.command);
    assert_eq!(ours.attributes[1], theirs.attributes[1]);

    let line = "ipvsadm -e -f 256 -r 10.244.1.11:8080 -m -w 0";
    let theirs = sent(TABLE, line).pop().unwrap();
    let ours = Command::SetDestination(FWM256, to("10.244.1.11", 8080), DestinationConfig::masquerade(0))
        .to_message();
    assert_eq!(ours.command, theirs.command);
    let (IpvsAttribute::Destination(ours), IpvsAttribute::Destination(theirs)) =
        (&ours.attributes[1], &theirs.attributes[1])
    else {
        panic!("no destination");
    };
    let of = |list| Destination::from_attributes(list, AddressFamily::Inet).unwrap();
    assert_eq!(of(ours), of(theirs));
}

#[test]
fn counters_and_rates_are_those_that_ipvsadm_prints() {
    let stats = Stats {
        connections: 3,
        in_packets: 19,
        out_packets: 18,
        in_bytes: 1228,
        out_bytes: 3789,
        cps: 0,
        inpps: 1,
        outpps: 1,
        inbps: 88,
        outbps: 274,
    };
    assert_eq!(services(TRAFFIC, "ipvsadm -Ln --rate")[0].stats, stats);
    let destination = &destinations(TRAFFIC, "ipvsadm -Ln --stats --exact")[0];
    assert_eq!(destination.stats, stats);
    assert_eq!((destination.active, destination.inactive, destination.persistent), (0, 3, 0));

    // The same from the 32-bit attribute, as a kernel before 4.1 would have sent it.
    let mut message = received(TRAFFIC, "ipvsadm -Ln --rate").remove(0);
    let IpvsAttribute::Service(list) = &mut message.attributes[0] else { panic!("no service") };
    let before = list.len();
    list.retain(|attribute| !matches!(attribute, ipvs_netlink::wire::ServiceAttribute::Stats64(_)));
    assert_eq!(list.len(), before - 1);
    assert_eq!(Service::from_attributes(list).unwrap().stats, stats);
}

#[test]
fn settings_are_read_and_set() {
    let info = received(TABLE, "ipvsadm -A -f 256 -s rr").remove(0);
    let info = Info::from_attributes(&info.attributes).unwrap();
    assert_eq!(info, Info { version: Version { major: 1, minor: 2, patch: 1 }, connection_table_size: 4096 });

    let got = received(TABLE, "ipvsadm -L --timeout").remove(0);
    let timeouts = Timeouts { tcp: 900, tcp_fin: 120, udp: 300 };
    assert_eq!(Timeouts::from_attributes(&got.attributes), timeouts);
    let set = Command::SetTimeouts(Timeouts { tcp: 901, tcp_fin: 121, udp: 301 }).to_message();
    assert_eq!(sent(TABLE, "ipvsadm --set 901 121 301"), [set]);

    let daemon = received(TABLE, "ipvsadm -L --daemon").remove(0);
    let IpvsAttribute::Daemon(list) = &daemon.attributes[0] else { panic!("no daemon") };
    let expected = Daemon {
        state: DaemonState::Master,
        interface: "lo".into(),
        sync_id: 7,
        max_length: 1472,
        group: Some(ip("224.0.0.81")),
        port: 8848,
        ttl: 1,
        other: vec![],
    };
    assert_eq!(Daemon::from_attributes(list).unwrap(), expected);

    let line = "ipvsadm --start-daemon backup --mcast-interface lo --syncid 8 --mcast-group ff02::51 \
                --mcast-port 9000 --mcast-ttl 3 --sync-maxlen 1400";
    let request = sent(TRAFFIC, line).remove(0);
    let IpvsAttribute::Daemon(list) = &request.attributes[0] else { panic!("no daemon") };
    let expected = Daemon {
        state: DaemonState::Backup,
        sync_id: 8,
        max_length: 1400,
        group: Some(ip("ff02::51")),
        port: 9000,
        ttl: 3,
        ..expected
    };
    assert_eq!(Daemon::from_attributes(list).unwrap(), expected);
}

#[test]
fn the_rest_of_the_commands_are_as_ipvsadm_sends_them() {
    assert_eq!(sent(TABLE, "ipvsadm -C"), [Command::Flush.to_message()]);
    assert_eq!(sent(TRAFFIC, "ipvsadm -Z"), [Command::Zero(None).to_message()]);
    for (line, command) in [
        ("ipvsadm -Z -f 256", Command::Zero(Some(FWM256))),
        ("ipvsadm -D -f 256", Command::DelService(FWM256)),
        ("ipvsadm -d -f 256 -r 10.244.1.11:8080", Command::DelDestination(FWM256, to("10.244.1.11", 8080))),
    ] {
        let theirs = sent(TABLE, line).remove(0);
        let ours = command.to_message();
        assert_eq!(ours.command, theirs.command, "{line}");
        // We send the id alone; ipvsadm sends it first.
        for (ours, theirs) in ours.attributes.iter().zip(&theirs.attributes) {
            match (ours, theirs) {
                (IpvsAttribute::Service(ours), IpvsAttribute::Service(theirs)) => {
                    assert!(theirs.starts_with(ours), "{line}");
                }
                (IpvsAttribute::Destination(ours), IpvsAttribute::Destination(theirs)) => {
                    assert!(theirs.starts_with(ours), "{line}");
                }
                other => panic!("{line}: {other:?}"),
            }
        }
    }
}
