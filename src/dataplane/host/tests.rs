//! The host side against a real kernel, in fresh network namespaces.

use std::net::IpAddr;

use super::{
    testing::{eth0, in_netns, ip, ip_says},
    *,
};
use crate::model::{
    ids::Protocol,
    kernel::{RealServerKey, UdpFlows},
};

fn net(s: &str) -> IpNet {
    s.parse().unwrap()
}

fn addr(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn ranges() -> PerFamily<IpNet> {
    PerFamily { v4: Some(net("10.200.0.0/16")), v6: Some(net("fd00:200::/112")) }
}

fn vip(range: &str, source: &str) -> VipRoute {
    VipRoute { range: net(range), source: addr(source) }
}

#[test]
fn vip_routes_come_change_and_go() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "192.168.50.2/24", "fd00:50::1/64", "fd00:50::2/64"]);
        let mut host = LinuxHost::default();
        assert_eq!(host.vip_routes(&ranges()), Ok(PerFamily::default()));
        for (range, source, other) in [
            ("10.200.0.0/16", "192.168.50.1", "192.168.50.2"),
            ("fd00:200::/112", "fd00:50::1", "fd00:50::2"),
        ] {
            let family = Family::of(&net(range).addr());
            let route = vip(range, source);
            let before = host.writes();
            host.put_vip_route(&route).unwrap();
            host.put_vip_route(&route).unwrap();
            assert_eq!(host.writes(), before + 1, "the second was there already");
            assert_eq!(host.vip_routes(&ranges()).unwrap().get(family), Some(&route));
            let six = if family == Family::V6 { "-6 " } else { "" };
            let shown = ip_says(&format!("{six}route show table local {range}"));
            assert!(shown.contains(&format!("local {range} dev lo proto 177")), "{shown}");
            assert!(shown.contains(&format!("src {source}")), "{shown}");
            assert!(family == Family::V6 || shown.contains("scope host"), "{shown}");

            host.put_vip_route(&vip(range, other)).unwrap();
            assert_eq!(host.vip_routes(&ranges()).unwrap().get(family), Some(&vip(range, other)));
            assert_eq!(ip_says(&format!("{six}route show table local {range}")).lines().count(), 1);
            assert_eq!(host.overlaps(&net(range)), Ok(vec![]));

            host.del_vip_route(family, &net(range)).unwrap();
            host.del_vip_route(family, &net(range)).unwrap();
            assert_eq!(host.writes(), before + 3);
            assert_eq!(host.vip_routes(&ranges()).unwrap().get(family), None);
        }
    });
}

/// What becomes of the route when its source leaves the node depends on the kernel: 6.1 keeps it as it
/// is, 6.18 takes the source out of IPv6 routes. With a new source it must be whole again, whatever it was.
#[test]
fn the_route_outlives_its_source_address() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "192.168.50.2/24", "fd00:50::1/64", "fd00:50::2/64"]);
        let mut host = LinuxHost::default();
        for (range, net, old, new) in [
            ("10.200.0.0/16", "192.168.50.2/24", "192.168.50.2", "192.168.50.1"),
            ("fd00:200::/112", "fd00:50::2/64", "fd00:50::2", "fd00:50::1"),
        ] {
            let family = Family::of(&addr(old));
            host.put_vip_route(&vip(range, old)).unwrap();
            ip(&format!("addr del {net} dev eth0"));
            println!("without {old}: {:?}", host.vip_routes(&ranges()).unwrap().get(family));
            host.put_vip_route(&vip(range, new)).unwrap();
            assert_eq!(host.vip_routes(&ranges()).unwrap().get(family), Some(&vip(range, new)));
            let six = if family == Family::V6 { "-6 " } else { "" };
            assert_eq!(ip_says(&format!("{six}route show table local {range}")).lines().count(), 1);
        }
        // A source that is no address of the node.
        let error = host.put_vip_route(&vip("10.200.0.0/16", "192.168.50.2")).unwrap_err().to_string();
        assert!(error.contains("is 192.168.50.2 an address of this node?"), "{error}");
        let off = std::process::Command::new("sh")
            .args(["-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"])
            .status();
        assert!(off.is_ok_and(|status| status.success()));
        host.del_vip_route(Family::V6, &net("fd00:200::/112")).unwrap();
        let error = host.put_vip_route(&vip("fd00:200::/112", "fd00:50::1")).unwrap_err().to_string();
        assert!(error.contains("IPv6 is switched off here"), "{error}");
    });
}

#[test]
fn addresses_on_dummies_are_not_the_nodes() {
    in_netns(|| {
        let made =
            std::process::Command::new("ip").args(["link", "add", "nodelocaldns", "type", "dummy"]).output();
        if !made.is_ok_and(|o| o.status.success()) {
            eprintln!("skipped: this kernel has no dummy links");
            return;
        }
        eth0(&["192.168.50.1/24"]);
        ip("addr add 10.96.0.10/32 dev nodelocaldns");
        let mut rules = AddressRules { ranges: ranges(), ..AddressRules::default() };
        let published = |rules: &AddressRules| LinuxHost::default().facts(rules).unwrap().published_addresses;
        assert_eq!(published(&rules), [addr("192.168.50.1")].into());
        rules.publish_addresses = vec![net("10.96.0.0/16")];
        assert_eq!(published(&rules), [addr("10.96.0.10")].into());
    });
}

#[test]
fn a_foreign_route_in_our_place_is_left_alone() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "fd00:50::1/64"]);
        let mut host = LinuxHost::default();
        for (range, source, six) in
            [("10.200.0.0/16", "192.168.50.1", ""), ("fd00:200::/112", "fd00:50::1", "-6 ")]
        {
            ip(&format!("{six}route add local {range} dev lo table local proto 99"));
            let error = host.put_vip_route(&vip(range, source)).unwrap_err().to_string();
            assert!(error.contains("proto 99"), "{error}");
            host.del_vip_route(Family::of(&net(range).addr()), &net(range)).unwrap();
            assert_eq!(host.vip_routes(&ranges()), Ok(PerFamily::default()));
            assert_eq!(
                host.overlaps(&net(range)).unwrap(),
                [format!("route local {range} dev lo table local")]
            );
        }
        assert_eq!(host.writes(), 0);
    });
}

#[test]
fn overlaps_name_addresses_and_routes() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "fd00:50::1/64"]);
        ip("addr add 10.200.3.4/24 dev peer0");
        ip("route add 10.200.7.0/24 via 192.168.50.9 dev eth0");
        ip("route add 10.200.8.0/24 via 192.168.50.9 dev eth0 table 77");
        ip("route add unreachable 10.200.9.0/24");
        ip("route add 10.0.0.0/8 via 192.168.50.9");
        ip("route add default via 192.168.50.9");
        ip("route add 10.201.0.0/16 via 192.168.50.9");
        ip("-6 route add fd00:200::/120 via fd00:50::9");
        let mut host = LinuxHost::default();
        let mut lines = host.overlaps(&net("10.200.0.0/16")).unwrap();
        lines.sort();
        assert_eq!(
            lines,
            [
                "address 10.200.3.4/24 on peer0",
                "route 10.0.0.0/8 via 192.168.50.9 dev eth0 table main",
                "route 10.200.7.0/24 via 192.168.50.9 dev eth0 table main",
                "route 10.200.8.0/24 via 192.168.50.9 dev eth0 table 77",
                "route unreachable 10.200.9.0/24 table main",
            ]
        );
        assert_eq!(
            host.overlaps(&net("fd00:200::/112")).unwrap(),
            ["route fd00:200::/120 via fd00:50::9 dev eth0 table main"]
        );
    });
}

#[test]
fn facts_follow_the_default_route() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "192.168.50.2/24", "fd00:50::1/64"]);
        ip("addr add 172.16.0.1/24 dev peer0");
        ip("route add default via 192.168.50.9 src 192.168.50.2");
        ip("-6 route add default via fd00:50::9");
        let mut host = LinuxHost::default();
        let mut rules = AddressRules { ranges: ranges(), ..AddressRules::default() };
        let facts = host.facts(&rules).unwrap();
        assert_eq!(facts.primary.v4, Some(addr("192.168.50.2")));
        assert_eq!(facts.primary.v6, Some(addr("fd00:50::1")));
        let published: Vec<_> = facts.published_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(published, ["172.16.0.1", "192.168.50.1", "192.168.50.2", "fd00:50::1"]);
        assert!(facts.all_addresses.contains(&addr("127.0.0.1")));
        assert!(facts.all_addresses.contains(&addr("::1")));

        rules.node_ips.v4 = Some(addr("203.0.113.7"));
        assert_eq!(host.facts(&rules).unwrap().primary.v4, Some(addr("203.0.113.7")));
        assert!(host.strangers.contains(&addr("203.0.113.7")));
        // Our own route is in the range and changes nothing.
        host.put_vip_route(&vip("10.200.0.0/16", "192.168.50.1")).unwrap();
        assert_eq!(host.facts(&rules).unwrap().published_addresses, facts.published_addresses);
    });
}

#[test]
fn bridges_are_found_by_address_and_by_route() {
    in_netns(|| {
        for bridge in ["cni0", "br1"] {
            ip(&format!("link add {bridge} type bridge"));
            ip(&format!("link set {bridge} up"));
        }
        eth0(&["10.244.9.1/24"]);
        ip("addr add 10.244.1.1/24 dev cni0");
        ip("addr add fd00:244:1::1/64 dev cni0 nodad");
        ip("route add 10.244.3.0/24 dev br1");
        let mut host = LinuxHost::default();
        let mut of = |list: &[&str]| {
            let found = host.bridges_of(&list.iter().map(|s| addr(s)).collect()).unwrap();
            found.iter().map(|b| format!("{} {}", b.bridge, b.subnet)).collect::<Vec<_>>()
        };
        assert_eq!(
            of(&["10.244.1.7", "10.244.1.8", "fd00:244:1::7"]),
            ["cni0 10.244.1.0/24", "cni0 fd00:244:1::/64"]
        );
        assert_eq!(of(&["10.244.3.7"]), ["br1 10.244.3.0/24"]);
        assert_eq!(of(&["10.244.9.7", "10.0.0.1"]), Vec::<String>::new());
    });
}

#[test]
fn listeners_are_seen_with_their_families() {
    in_netns(|| {
        eth0(&["192.168.50.1/24", "fd00:50::1/64"]);
        let _tcp = std::net::TcpListener::bind("192.168.50.1:8080").unwrap();
        let dual = std::net::TcpListener::bind("[::]:8081").unwrap();
        let _client = std::net::TcpStream::connect("127.0.0.1:8081").unwrap();
        let _udp = std::net::UdpSocket::bind("0.0.0.0:5353").unwrap();
        let connected = std::net::UdpSocket::bind("192.168.50.1:5354").unwrap();
        connected.connect("192.168.50.9:53").unwrap();
        let only6 = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet6,
            nix::sys::socket::SockType::Datagram,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        nix::sys::socket::setsockopt(&only6, nix::sys::socket::sockopt::Ipv6V6Only, &true).unwrap();
        let any: nix::sys::socket::SockaddrIn6 =
            "[::]:5355".parse::<std::net::SocketAddrV6>().unwrap().into();
        nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&only6), &any).unwrap();

        let found = LinuxHost::default().listeners().unwrap();
        let texts: Vec<_> = found.iter().map(|l| format!("{} {} {}", l.protocol, l.addr, l.port)).collect();
        assert_eq!(
            texts,
            ["TCP 0.0.0.0 8081", "TCP 192.168.50.1 8080", "TCP :: 8081", "UDP 0.0.0.0 5353", "UDP :: 5355",]
        );
        assert!(found.iter().any(|l| l.takes(addr("192.168.50.1"), Protocol::Tcp, 8081)));
        drop(dual);
    });
}

#[test]
fn settings_are_those_of_the_threads_namespace() {
    in_netns(|| {
        let mut host = LinuxHost::default();
        let path = "net/ipv4/conf/all/arp_ignore";
        host.set_sysctl(path, "1").unwrap();
        host.set_sysctl(path, "1").unwrap();
        assert_eq!(host.sysctl(path), Ok(Some("1".into())));
        assert_eq!(host.writes(), 1);
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            assert_eq!(LinuxHost::default().sysctl(path), Ok(Some("0".into())));
        })
        .join()
        .unwrap();
    });
}

#[test]
fn forwarding_is_not_set_where_it_would_lose_the_default_route() {
    in_netns(|| {
        eth0(&["fd00:50::1/64"]);
        ip("-6 route add default via fd00:50::9 dev eth0 proto ra");
        let mut host = LinuxHost::default();
        assert_eq!(host.ra_dependent_links(), Ok(vec!["eth0".to_owned()]));
        let error = host.set_sysctl("net/ipv6/conf/all/forwarding", "1").unwrap_err().to_string();
        assert!(error.contains("net.ipv6.conf.eth0.accept_ra=2"), "{error}");
        host.set_sysctl("net/ipv6/conf/eth0/accept_ra", "2").unwrap();
        host.set_sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
        assert_eq!(host.ra_dependent_links(), Ok(vec![]));
    });
}

/// Adds conntrack entries and counts those that are left.
struct Conntrack(Conn);

impl Conntrack {
    const NEW: u16 = 0x100;
    const GET: u16 = 0x101;

    fn add(&mut self, client: &str, to: &str, real: &str) {
        let [client, to, real] = [client, to, real].map(|s| s.parse().unwrap());
        let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_EXCL;
        self.0.tell(Self::NEW, flags, &conntrack::udp_entry(client, to, real)).unwrap();
    }

    fn count(&mut self) -> usize {
        let mut count = 0;
        for family in [2, 10] {
            let entries = self.0.dump(Self::GET, &[family, 0, 0, 0], |_, _| Some(())).unwrap();
            count += entries.len();
        }
        count
    }
}

/// Flows to a server by some addresses.
fn flows(list: &[(&str, &[&str])]) -> UdpFlows {
    let at = |text: &str| text.parse::<std::net::SocketAddr>().unwrap();
    let real = |text: &str| RealServerKey { addr: at(text).ip(), port: at(text).port() };
    let by = |list: &[&str]| list.iter().map(|text| (at(text).ip(), at(text).port())).collect();
    list.iter().map(|(server, to)| (real(server), by(to))).collect()
}

#[test]
fn udp_flows_to_a_server_that_is_gone_are_forgotten() {
    in_netns(|| {
        let mut table = Conntrack(Conn::new(NETLINK_NETFILTER));
        for port in 40000..40100 {
            table.add(&format!("10.244.1.11:{port}"), "10.200.0.5:53", "10.244.2.12:5353");
            table.add(&format!("10.244.1.11:{port}"), "10.200.0.6:53", "10.244.2.13:5353");
        }
        table.add("10.244.1.11:40000", "10.200.0.7:53", "10.244.2.12:5354");
        table.add("[fd00:244:1::b]:40000", "[fd00:200::5]:53", "[fd00:244:2::c]:5353");
        let tcp = "-I -p tcp -s 10.0.0.1 -d 10.0.0.2 --sport 1 --dport 2 --state ESTABLISHED -t 600";
        let made = std::process::Command::new("conntrack").args(tcp.split(' ')).output();
        if made.is_ok_and(|o| o.status.success()) {
            assert_eq!(table.count(), 203);
            let udp = conntrack::dump_request(Family::V4, true);
            let seen = table.0.dump(Conntrack::GET, &udp, |_, _| Some(())).unwrap().len();
            println!("{seen} of 202 IPv4 entries came through the kernel's filter");
            let _ = std::process::Command::new("conntrack").args(["-D", "-p", "tcp"]).output();
        }
        assert_eq!(table.count(), 202);
        let mut host = LinuxHost::default();
        // Another program's address for the same server.
        table.add("10.244.1.11:41000", "10.96.0.10:53", "10.244.2.12:5353");
        let to_first = flows(&[("10.244.2.12:5353", &["10.200.0.5:53", "192.168.50.1:30053"])]);
        assert_eq!(host.forget_udp(&to_first), Ok(100));
        assert_eq!(host.forget_udp(&to_first), Ok(0));
        assert_eq!(table.count(), 103);
        let rest =
            flows(&[("10.244.2.12:0", &["10.200.0.7:53"]), ("[fd00:244:2::c]:5353", &["[fd00:200::5]:53"])]);
        assert_eq!(host.forget_udp(&rest), Ok(2));
        assert_eq!(table.count(), 101);
        assert_eq!(host.forget_udp(&UdpFlows::new()), Ok(0));
        assert_eq!(host.writes(), 102);
    });
}

#[test]
fn connections_by_a_published_port_are_found_and_cut() {
    in_netns(|| {
        let add = |dst: &str, dport: u16, sport: u16, real: &str, state: &str| {
            let command = format!(
                "-I -p tcp -s 192.168.50.100 -d {dst} --sport {sport} --dport {dport} --reply-src {real} --reply-dst \
                 192.168.50.100 --reply-port-src 8080 --reply-port-dst {sport} --state {state} -t 600 -u SEEN_REPLY"
            );
            let out =
                std::process::Command::new("conntrack").args(command.split_whitespace()).output().unwrap();
            assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        };
        let to = [("192.168.50.1".parse().unwrap(), 30080), ("127.0.0.1".parse().unwrap(), 30080)];
        let flows = |addr: &str, port| PublishedFlows {
            protocol: Protocol::Tcp,
            real: RealServerKey { addr: addr.parse().unwrap(), port },
            to: to.into_iter().collect(),
        };
        let mut host = LinuxHost::default();
        let has_flows = |host: &mut LinuxHost, flows: &PublishedFlows| {
            let all = vec![flows.clone(); 20];
            let one = host.open_flows(&all[..1]).map(|open| open == [true]);
            // Of many the table is read once: the same comes of it.
            assert_eq!(host.open_flows(&all).map(|open| open == [true; 20]), one);
            one
        };
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 8080)), Ok(false));
        add("192.168.50.1", 30080, 40000, "10.244.2.12", "TIME_WAIT");
        // By another port, and another service's.
        add("192.168.50.1", 30081, 40001, "10.244.2.12", "ESTABLISHED");
        add("192.168.50.1", 30080, 40002, "10.244.2.13", "ESTABLISHED");
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 8080)), Ok(false));
        add("192.168.50.1", 30080, 40003, "10.244.2.12", "ESTABLISHED");
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 8080)), Ok(true));
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 8081)), Ok(false));
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 0)), Ok(true));
        assert_eq!(host.cut_flows(&[flows("10.244.2.12", 8080)]), Ok(2));
        assert_eq!(has_flows(&mut host, &flows("10.244.2.12", 8080)), Ok(false));
        assert_eq!(has_flows(&mut host, &flows("10.244.2.13", 8080)), Ok(true));
        assert_eq!(host.writes(), 2);
    });
}

/// `cargo test --release -- --ignored --nocapture many_udp`
#[test]
#[ignore = "takes a while; prints times"]
fn many_udp_flows_are_no_trouble() {
    in_netns(|| {
        let mut table = Conntrack(Conn::new(NETLINK_NETFILTER));
        for n in 0..120_000u32 {
            let client = format!("10.{}.{}.11:{}", n >> 16, (n >> 8) & 255, 40000 + (n & 255));
            let real = if n % 1000 == 0 { "10.244.2.12:5353" } else { "10.244.2.13:5353" };
            table.add(&client, "10.200.0.5:53", real);
        }
        let start = std::time::Instant::now();
        let to = flows(&[("10.244.2.12:5353", &["10.200.0.5:53"])]);
        let count = LinuxHost::default().forget_udp(&to).unwrap();
        println!("{count} of 120000 entries deleted in {:?}", start.elapsed());
        assert_eq!(count, 120);
    });
}
