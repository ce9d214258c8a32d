//! Against this machine's kernel, in a network namespace of its own.

use std::net::IpAddr;

use super::*;
use crate::{
    dataplane::netfilter::testing::in_netns,
    model::{
        ids::{Family, Protocol},
        kernel::Target,
    },
};

fn spec(name: &str, kind: SetType, family: Family) -> SetSpec {
    SetSpec { name: name.into(), kind, family, marks: kind == SetType::IpPort, max_elements: MAX_ELEMENTS }
}

fn target(addr: &str, protocol: Protocol, port: u16) -> Entry {
    let mark = SkbMark { value: 0x100, mask: 0x3fff };
    Entry { key: Key::IpPort(Target { addr: addr.parse().unwrap(), protocol, port }), mark: Some(mark) }
}

fn add(set: &str, entry: Entry) -> Change {
    Change { set: set.into(), verb: Verb::Add, entry }
}

#[test]
fn sets_of_every_kind_come_back() {
    in_netns(|| {
        let mut ipset = Ipset::new();
        for (family, a, b) in
            [(Family::V4, "10.200.0.5", "10.244.1.11"), (Family::V6, "fd00:200::5", "fd00:244:1::11")]
        {
            let (a, b): (IpAddr, IpAddr) = (a.parse().unwrap(), b.parse().unwrap());
            let specs = [
                spec("t-ipport", SetType::IpPort, family),
                spec("t-ip", SetType::Ip, family),
                spec("t-pair", SetType::Pair, family),
            ];
            let pairs = ipset.has_type(SetType::Pair);
            let specs: Vec<_> = specs.into_iter().filter(|s| pairs || s.kind != SetType::Pair).collect();
            for s in &specs {
                ipset.create(s).unwrap();
                ipset.create(s).unwrap();
            }
            let entries = [
                add("t-ipport", target(&a.to_string(), Protocol::Tcp, 80)),
                add("t-ipport", target(&a.to_string(), Protocol::Udp, 80)),
                add("t-ipport", target(&a.to_string(), Protocol::Sctp, 80)),
                add("t-ip", Entry { key: Key::Ip(b), mark: None }),
                add("t-pair", Entry { key: Key::Pair(b, b), mark: None }),
            ];
            let entries: Vec<_> = entries.into_iter().filter(|c| pairs || c.set != "t-pair").collect();
            let good = vec![Ok(()); entries.len()];
            assert_eq!(ipset.change(&entries), good);
            assert_eq!(ipset.change(&entries), good, "adding again replaces");
            for s in &specs {
                let listing = ipset.list(&s.name).unwrap().unwrap();
                assert!(listing.header.fits(s), "{:?}", listing.header);
                let mut want: Vec<_> = entries.iter().filter(|c| c.set == s.name).map(|c| c.entry).collect();
                let mut got = listing.entries;
                want.sort_by_key(|e| e.key);
                got.sort_by_key(|e| e.key);
                assert_eq!(got, want);
                assert_eq!(listing.strange, 0);
            }
            let del: Vec<_> = entries.iter().map(|c| Change { verb: Verb::Del, ..c.clone() }).collect();
            assert_eq!(ipset.change(&del), good);
            assert_eq!(ipset.change(&del), good, "deleting what is gone");
            let headers = ipset.headers().unwrap();
            assert!(headers.len() == specs.len() && headers.iter().all(|h| h.elements == 0));
            for s in &specs {
                ipset.destroy(&s.name).unwrap();
                ipset.destroy(&s.name).unwrap();
            }
        }
    });
}

#[test]
fn thousands_in_one_call_and_a_swap() {
    in_netns(|| {
        let mut ipset = Ipset::new();
        ipset.create(&spec("t-a", SetType::IpPort, Family::V4)).unwrap();
        ipset.create(&spec("t-b", SetType::IpPort, Family::V4)).unwrap();
        let changes: Vec<_> = (0..20_000u32)
            .map(|i| {
                let addr = std::net::Ipv4Addr::from(0x0ac8_0000 + i);
                add("t-a", target(&addr.to_string(), Protocol::Tcp, 80))
            })
            .collect();
        assert!(ipset.change(&changes).iter().all(Result::is_ok));
        ipset.swap("t-a", "t-b").unwrap();
        assert_eq!(ipset.list("t-a").unwrap().unwrap().entries.len(), 0);
        assert_eq!(ipset.list("t-b").unwrap().unwrap().entries.len(), 20_000);
        assert_eq!(ipset.list("t-none").unwrap(), None);
    });
}

#[test]
fn one_bad_entry_does_not_stop_the_others() {
    in_netns(|| {
        let mut ipset = Ipset::new();
        ipset.create(&spec("t-a", SetType::IpPort, Family::V4)).unwrap();
        let changes = [
            add("t-a", target("10.0.0.1", Protocol::Tcp, 1)),
            add("t-a", target("fd00::1", Protocol::Tcp, 2)),
            add("t-a", target("10.0.0.3", Protocol::Tcp, 3)),
            add("t-none", target("10.0.0.4", Protocol::Tcp, 4)),
        ];
        let results = ipset.change(&changes);
        assert!(results[0].is_ok() && results[2].is_ok(), "{results:?}");
        assert!(results[1].as_ref().unwrap_err().to_string().contains("t-a fd00::1,tcp:2"), "{results:?}");
        assert!(results[3].as_ref().unwrap_err().to_string().contains("no such set"), "{results:?}");
        assert_eq!(ipset.list("t-a").unwrap().unwrap().entries.len(), 2);
    });
}

#[test]
fn a_full_set_says_what_to_do() {
    in_netns(|| {
        let status = std::process::Command::new("ipset")
            .args(["create", "t-small", "hash:ip,port", "maxelem", "1", "skbinfo"])
            .status();
        if !status.is_ok_and(|s| s.success()) {
            return;
        }
        let mut ipset = Ipset::new();
        // The kernel counts by region, so it takes some more than one.
        let changes: Vec<_> =
            (1..500).map(|port| add("t-small", target("10.0.0.1", Protocol::Tcp, port))).collect();
        let results = ipset.change(&changes);
        let full = results.iter().find_map(|r| r.as_ref().err()).unwrap().to_string();
        assert!(full.contains("t-small") && full.contains("full"), "{full}");
        let wrong = ipset.create(&spec("t-small", SetType::Ip, Family::V4)).unwrap_err().to_string();
        assert!(wrong.contains("ipset destroy t-small"), "{wrong}");
    });
}
