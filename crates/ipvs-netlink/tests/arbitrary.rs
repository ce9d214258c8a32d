//! No bytes make the codec panic, and what it emits it reads back.

#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipvs_netlink::wire::{DestinationAttribute, IpvsAttribute, IpvsMessage, ServiceAttribute};
use ipvs_netlink::{
    AddressFamily, Command, Daemon, Destination, DestinationConfig, DestinationId, Forwarding, Info, Netmask,
    Protocol, Service, ServiceConfig, ServiceFlags, ServiceId, Stats, Timeouts, Tunnel,
};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload, ParseableParametrized};
use netlink_packet_generic::{GenlHeader, GenlMessage};
use proptest::collection::vec;
use proptest::prelude::*;

type Message = NetlinkMessage<GenlMessage<IpvsMessage>>;

fn emit(payload: IpvsMessage) -> Vec<u8> {
    let mut message = Message::from(GenlMessage::from_payload(payload));
    // A family's number; below 16 are netlink's own.
    if let NetlinkPayload::InnerMessage(inner) = &mut message.payload {
        inner.set_resolved_family_id(33);
    }
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn parse(bytes: &[u8]) -> IpvsMessage {
    match Message::deserialize(bytes).unwrap().payload {
        NetlinkPayload::InnerMessage(message) => message.payload,
        other => panic!("{other:?}"),
    }
}

/// Everything that can be made of a message.
fn interpret(message: &IpvsMessage) {
    let _ = Info::from_attributes(&message.attributes);
    let _ = Timeouts::from_attributes(&message.attributes);
    for attribute in &message.attributes {
        match attribute {
            IpvsAttribute::Service(list) => {
                if let Ok(service) = Service::from_attributes(list) {
                    let _ = (service.id.to_string(), format!("{service:?}"));
                    emit(Command::SetService(service.id, service.config).to_message());
                }
            }
            IpvsAttribute::Destination(list) => {
                for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                    if let Ok(destination) = Destination::from_attributes(list, family) {
                        let _ = destination.id.to_string();
                    }
                }
            }
            IpvsAttribute::Daemon(list) => {
                let _ = Daemon::from_attributes(list);
            }
            _ => {}
        }
    }
}

/// Attributes that are well framed, so that their content is looked at.
fn framed(depth: u32) -> BoxedStrategy<Vec<u8>> {
    let leaf = vec(any::<u8>(), 0..20).boxed();
    let value = if depth == 0 { leaf } else { prop_oneof![2 => leaf, 3 => framed(depth - 1)].boxed() };
    vec((0u16..18, prop_oneof![Just(0u16), Just(0x8000), Just(0x4000)], value), 0..6)
        .prop_map(|attributes| {
            let mut out = Vec::new();
            for (kind, flags, value) in attributes {
                let length = u16::try_from(value.len() + 4).unwrap();
                out.extend(length.to_ne_bytes());
                out.extend((kind | flags).to_ne_bytes());
                out.extend(&value);
                out.resize(out.len().next_multiple_of(4), 0);
            }
            out
        })
        .boxed()
}

fn family() -> impl Strategy<Value = AddressFamily> {
    prop_oneof![Just(AddressFamily::Inet), Just(AddressFamily::Inet6)]
}

fn addr() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|n| IpAddr::from(Ipv4Addr::from(n))),
        any::<u128>().prop_map(|n| IpAddr::from(Ipv6Addr::from(n))),
    ]
}

fn service_id() -> impl Strategy<Value = ServiceId> {
    prop_oneof![
        (family(), 1u32..).prop_map(|(family, mark)| ServiceId::fwmark(family, mark)),
        (any::<u8>(), addr(), any::<u16>()).prop_map(|(protocol, addr, port)| ServiceId::address(
            Protocol::from(protocol),
            addr,
            port
        )),
    ]
}

fn service_config(family: AddressFamily) -> impl Strategy<Value = ServiceConfig> {
    let full = if family == AddressFamily::Inet { 32u8 } else { 128 };
    let netmask = prop_oneof![Just(Netmask::Full), (0..full).prop_map(Netmask::Prefix)];
    ("[a-z]{1,15}", any::<u32>(), any::<u32>(), netmask, proptest::option::of("[a-z]{1,15}")).prop_map(
        |(scheduler, flags, timeout, netmask, pe_name)| ServiceConfig {
            scheduler,
            flags: ServiceFlags::from_bits(flags).without(ServiceFlags::HASHED),
            timeout,
            netmask,
            pe_name,
        },
    )
}

fn forwarding() -> impl Strategy<Value = Forwarding> {
    prop_oneof![
        Just(Forwarding::Masquerade),
        Just(Forwarding::Local),
        Just(Forwarding::DirectRoute),
        Just(Forwarding::Bypass),
        (5u32..8).prop_map(Forwarding::Other),
        (any::<u8>(), any::<u16>(), any::<u16>())
            .prop_map(|(kind, port, flags)| Forwarding::Tunnel(Tunnel { kind: kind.into(), port, flags })),
    ]
}

fn destination_config() -> impl Strategy<Value = DestinationConfig> {
    (any::<i32>(), forwarding(), any::<u32>(), any::<u32>()).prop_map(
        |(weight, forwarding, upper_threshold, lower_threshold)| DestinationConfig {
            weight,
            forwarding,
            upper_threshold,
            lower_threshold,
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_panic(command in any::<u8>(), bytes in vec(any::<u8>(), 0..400)) {
        let _ = Message::deserialize(&bytes);
        if let Ok(message) = IpvsMessage::parse_with_param(&bytes, GenlHeader { cmd: command, version: 1 }) {
            interpret(&message);
            emit(message);
        }
    }

    #[test]
    fn no_framed_bytes_panic(command in 0u8..20, bytes in framed(2)) {
        if let Ok(message) = IpvsMessage::parse_with_param(&bytes, GenlHeader { cmd: command, version: 1 }) {
            interpret(&message);
            prop_assert_eq!(&parse(&emit(message.clone())), &message);
        }
    }

    #[test]
    fn services_come_back(
        (id, config) in service_id().prop_flat_map(|id| (Just(id), service_config(id.family()))),
    ) {
        let message = parse(&emit(Command::AddService(id, config.clone()).to_message()));
        let IpvsAttribute::Service(list) = &message.attributes[0] else { panic!("no service") };
        let service = Service::from_attributes(list).unwrap();
        prop_assert_eq!(service.id, id);
        prop_assert_eq!(service.config, config);
        prop_assert!(service.other.is_empty());
    }

    #[test]
    fn destinations_come_back(
        service in service_id(), addr in addr(), port in any::<u16>(), config in destination_config(),
    ) {
        let id = DestinationId::new(addr, port);
        let message = parse(&emit(Command::SetDestination(service, id, config).to_message()));
        let IpvsAttribute::Destination(list) = &message.attributes[1] else { panic!("no destination") };
        let destination = Destination::from_attributes(list, service.family()).unwrap();
        prop_assert_eq!((destination.id, destination.config), (id, config));
    }

    #[test]
    fn counters_come_back(counters in proptest::array::uniform10(any::<u64>())) {
        let [connections, in_packets, out_packets, in_bytes, out_bytes, cps, inpps, outpps, inbps, outbps] =
            counters;
        let stats = Stats {
            connections, in_packets, out_packets, in_bytes, out_bytes, cps, inpps, outpps, inbps, outbps,
        };
        let mut list = ServiceId::fwmark(AddressFamily::Inet, 1).to_attributes();
        list.push(ServiceAttribute::Stats64(stats.to_attributes()));
        prop_assert_eq!(Service::from_attributes(&list).unwrap().stats, stats);
        let mut list = DestinationId::new(Ipv4Addr::LOCALHOST.into(), 1).to_attributes();
        list.push(DestinationAttribute::Stats64(stats.to_attributes()));
        prop_assert_eq!(Destination::from_attributes(&list, AddressFamily::Inet).unwrap().stats, stats);
    }

    #[test]
    fn timeouts_come_back(tcp in any::<u32>(), tcp_fin in any::<u32>(), udp in any::<u32>()) {
        let timeouts = Timeouts { tcp, tcp_fin, udp };
        let message = parse(&emit(Command::SetTimeouts(timeouts).to_message()));
        prop_assert_eq!(Timeouts::from_attributes(&message.attributes), timeouts);
    }

    /// Any mask that the kernel may hold is read and written back the same.
    #[test]
    fn ipv4_masks_come_back(mask in any::<u32>()) {
        let mut list = ServiceId::fwmark(AddressFamily::Inet, 1).to_attributes();
        list.push(ServiceAttribute::Netmask(mask.to_be_bytes()));
        let service = Service::from_attributes(&list).unwrap();
        let back = service.config.to_attributes(AddressFamily::Inet);
        prop_assert!(back.contains(&ServiceAttribute::Netmask(mask.to_be_bytes())));
    }
}

/// The largest list that is read can be written: lengths have 16 bits, and writing may add to each attribute.
#[test]
fn the_largest_nested_list_is_emitted() {
    // Daemons' interface names without content, not even a NUL.
    let mut inner = Vec::new();
    while inner.len() < 16 * 1024 {
        inner.extend([4, 0, 2, 0]);
    }
    let header = GenlHeader { cmd: 9, version: 1 };
    let wrap = |inner: &[u8]| {
        let mut bytes = u16::try_from(inner.len() + 4).unwrap().to_ne_bytes().to_vec();
        bytes.extend(3u16.to_ne_bytes());
        bytes.extend(inner);
        bytes
    };
    if cfg!(target_endian = "little") {
        let message = IpvsMessage::parse_with_param(&wrap(&inner)[..], header).unwrap();
        // Each name gained its NUL.
        assert_eq!(emit(message).len(), 24 + 32 * 1024);
        inner.extend([4, 0, 2, 0]);
        assert!(IpvsMessage::parse_with_param(&wrap(&inner)[..], header).is_err());
    }
}

#[test]
fn unknown_attributes_are_kept() {
    let list = [8u16.to_ne_bytes(), 99u16.to_ne_bytes(), [1, 2], [3, 4]].concat();
    let id = ServiceId::fwmark(AddressFamily::Inet, 7);
    let mut message = Command::DelService(id).to_message();
    // An attribute inside the service and one beside it that no kernel knows today.
    let header = GenlHeader { cmd: 3, version: 1 };
    let unknown = IpvsMessage::parse_with_param(&list[..], header).unwrap().attributes.remove(0);
    let IpvsAttribute::Other(nla) = unknown.clone() else { panic!("{unknown:?}") };
    if let IpvsAttribute::Service(service) = &mut message.attributes[0] {
        service.push(ServiceAttribute::Other(nla.clone()));
    }
    message.attributes.push(unknown);
    let back = parse(&emit(message.clone()));
    assert_eq!(back, message);
    let IpvsAttribute::Service(service) = &back.attributes[0] else { panic!("no service") };
    assert_eq!(Service::from_attributes(service).unwrap().other, [nla]);
}
