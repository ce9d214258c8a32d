//! Both renderers on this machine's kernel where something is odd: tables that iptables-nft can't read, sets that are full,
//! programs that are gone, the other renderer's table.

use super::{
    nftread::NftReader,
    testing::{RENDERERS, dual, elements, in_netns, iptables, iptables_without_nft, sh, vip},
    *,
};
use crate::{
    dataplane::{Netfilter, Probe, ProgramState},
    model::{
        ids::{Family, Mark, Protocol},
        kernel::Element,
    },
};

fn all() -> Elements {
    elements(&Family::ALL)
}

/// Rules that only nft can make, in tables of iptables-nft.
const NATIVE: &str = "iptables-nft -P INPUT ACCEPT; ip6tables-nft -P FORWARD ACCEPT
 iptables-nft -t mangle -P INPUT ACCEPT
 nft insert rule ip filter INPUT ct state invalid drop; nft add rule ip filter INPUT ct state invalid drop
 nft insert rule ip6 filter FORWARD ct state invalid drop
 nft add rule ip mangle INPUT ct state invalid drop
 iptables-nft-save | grep -q \"filter' is incompatible\"; iptables-nft-save | grep -q \"mangle' is incompatible\"
 ip6tables-nft-save | grep -q \"filter' is incompatible\"";

fn ruleset() -> String {
    sh("nft -s list ruleset")
}

fn jumps(ruleset: &str, to: &str) -> usize {
    ruleset.lines().filter(|line| line.contains(&format!("jump {to}"))).count()
}

fn is_installed(r: &mut dyn Netfilter) {
    let state = r.observe(&dual()).unwrap();
    assert_eq!((state.program, state.elements), (ProgramState::Installed, all()));
    assert_eq!(state.leftovers, Vec::<String>::new());
    assert_eq!(r.probe().unwrap(), Probe::Unchanged);
}

#[test]
fn iptables_nft_that_can_t_read_its_tables_gets_no_rule_twice_and_keeps_none() {
    for native_first in [true, false] {
        in_netns(move || {
            let mut r = iptables(Variant::Nft);
            if native_first {
                sh(NATIVE);
                r.install(&dual(), &all()).unwrap();
            } else {
                r.install(&dual(), &all()).unwrap();
                sh(NATIVE);
            }
            is_installed(&mut r);
            let before = ruleset();
            assert_eq!(
                (jumps(&before, "MESHLB-INPUT"), jumps(&before, "MESHLB-FORWARD")),
                (4, 2),
                "{before}"
            );
            for _ in 0..2 {
                r.install(&dual(), &all()).unwrap();
                assert_eq!(ruleset(), before);
            }
            // One too many, and one that is not as we make it.
            sh(
                "iptables-nft -I INPUT -m comment --comment meshlb -j MESHLB-INPUT; nft insert rule ip filter INPUT ip saddr 1.2.3.4 jump MESHLB-INPUT",
            );
            assert!(matches!(r.probe().unwrap(), Probe::Changed(_)));
            r.install(&dual(), &all()).unwrap();
            assert_eq!(jumps(&ruleset(), "MESHLB-INPUT"), 4, "{}", ruleset());
            r.remove().unwrap();
            let left = ruleset();
            assert!(!left.contains("MESHLB") && !left.contains("meshlb"), "{left}");
            assert_eq!(left.matches("ct state invalid drop").count(), 4, "{left}");
            assert_eq!(sh("ipset list -n"), "");
        });
    }
}

#[test]
fn nftables_leaves_a_table_that_only_nft_can_read_to_its_owner_and_tells_him() {
    in_netns(|| {
        sh(NATIVE);
        let mut r = Nftables::new().unwrap();
        r.install(&dual(), &all()).unwrap();
        is_installed(&mut r);
        assert_eq!(advice(&dual(), "nftables").unwrap(), Vec::<String>::new());
        assert!(!ruleset().contains("MESHLB"), "{}", ruleset());
        sh("nft chain ip filter INPUT '{ policy drop; }'; nft chain ip6 filter FORWARD '{ policy drop; }'");
        r.install(&dual(), &all()).unwrap();
        is_installed(&mut r);
        assert!(!ruleset().contains("MESHLB"), "{}", ruleset());
        let advice = advice(&dual(), "nftables").unwrap();
        let commands: Vec<_> = advice.iter().map(|line| line.split("nft insert").nth(1).unwrap()).collect();
        let wanted = [
            " rule ip filter INPUT ip daddr 10.200.0.0/16 accept",
            " rule ip6 filter FORWARD ct original ip6 daddr fd00:200::/112 ct state established,related accept",
            " rule ip6 filter FORWARD ct status dnat ct state established,related accept",
        ];
        assert_eq!(commands, wanted, "{advice:?}");
        for command in commands {
            sh(&format!("nft insert{command}"));
        }
        // Where iptables can still be read, the rules are ours.
        sh("ip6tables-nft -t filter -F; iptables-nft -t filter -F; ip6tables-nft -P FORWARD DROP");
        r.install(&dual(), &all()).unwrap();
        is_installed(&mut r);
        assert_eq!(jumps(&ruleset(), "MESHLB-FORWARD"), 2, "{}", ruleset());
        assert_eq!(super::advice(&dual(), "nftables").unwrap(), Vec::<String>::new());
    });
}

#[test]
fn accepting_rules_stay_where_nft_is_used_after_them() {
    in_netns(|| {
        sh("iptables-nft -P INPUT DROP");
        let mut r = Nftables::new().unwrap();
        r.install(&dual(), &all()).unwrap();
        sh("nft add rule ip filter INPUT ct state invalid drop");
        for _ in 0..2 {
            is_installed(&mut r);
            r.remove_leftovers().unwrap();
            r.install(&dual(), &all()).unwrap();
        }
        assert_eq!(jumps(&ruleset(), "MESHLB-INPUT"), 1, "{}", ruleset());
        assert_eq!(advice(&dual(), "nftables").unwrap(), Vec::<String>::new());
        r.remove().unwrap();
        assert!(!ruleset().contains("MESHLB"), "{}", ruleset());
    });
}

#[test]
fn chains_are_removed_without_the_program_that_made_them() {
    in_netns(|| {
        iptables(Variant::Nft).install(&dual(), &all()).unwrap();
        let mut reader = NftReader::new();
        for family in Family::ALL {
            for table in rules_iptables::TABLES {
                let ours = reader.ours(family, table).unwrap();
                assert_eq!(ours.is_empty(), table == "security", "{table}");
                reader.delete(family, table, &ours).unwrap();
            }
        }
        reader.delete_table().unwrap();
        reader.delete_table().unwrap();
        assert!(!ruleset().to_lowercase().contains("meshlb"), "{}", ruleset());
        // All or nothing.
        sh(
            "iptables-nft -N MESHLB-X; iptables-nft -N MESHLB-INPUT; iptables-nft -A INPUT -j MESHLB-X; nft add map ip filter m '{ type ipv4_addr : verdict; }'; nft add element ip filter m '{ 1.2.3.4 : jump MESHLB-INPUT }'",
        );
        let ours = reader.ours(Family::V4, "filter").unwrap();
        assert!(reader.delete(Family::V4, "filter", &ours).is_err());
        assert_eq!(reader.ours(Family::V4, "filter").unwrap(), ours);
    });
}

#[test]
fn what_a_full_set_does_not_take_keeps_nothing_else_from_being_installed() {
    for variant in Variant::ALL {
        in_netns(move || {
            let mut r = iptables(variant);
            r.limit_sets(64);
            let mut many = all();
            let vips = (1..=900).map(|port| vip("10.200.7.7", Protocol::Tcp, port));
            many.extend(vips.map(|element| (element, Some(Mark(0x177)))));
            let published = |port| Element::Published(testing::target("192.168.50.1", Protocol::Udp, port));
            many.extend((1..=900).map(|port| (published(port), Some(Mark(0x178)))));
            for _ in 0..2 {
                let error = r.install(&dual(), &many).unwrap_err().to_string();
                assert!(error.contains("ipset meshlb-") && error.contains("the set is full"), "{error}");
                assert!(error.contains(" more; all else is served") && !error.contains("scratch"), "{error}");
                assert!(Family::ALL.into_iter().all(|family| r.stands(family)));
                let state = r.observe(&dual()).unwrap();
                assert_eq!(state.program, ProgramState::Installed);
                assert!(state.elements.len() > 64 && state.elements.len() < many.len());
                assert!(state.elements.iter().all(|(element, mark)| many.get(element) == Some(mark)));
                assert_eq!(r.probe().unwrap(), Probe::Unchanged);
            }
            // The guard knows all the same what is published.
            let guarded =
                sh("nft list set inet meshlb published-4 | tr ',' '\\n' | grep -c '192.168.50.1 . udp'");
            assert_eq!(guarded.trim(), "901");
            let there = r.observe(&dual()).unwrap().elements;
            let (lacking, _) = many.iter().find(|(element, _)| !there.contains_key(element)).unwrap();
            let results = r.apply(&dual(), &[ElementChange::Put(*lacking, Some(Mark(0x177)))]);
            assert!(results[0].as_ref().is_err_and(|e| e.to_string().contains("full")), "{results:?}");
            assert_eq!(r.probe().unwrap(), Probe::Unchanged);
            let dels: Vec<_> =
                many.keys().filter(|e| !all().contains_key(e)).map(|e| ElementChange::Del(*e)).collect();
            assert!(r.apply(&dual(), &dels).iter().all(Result::is_ok));
            let puts: Vec<_> = all().iter().map(|(e, mark)| ElementChange::Put(*e, *mark)).collect();
            assert!(r.apply(&dual(), &puts).iter().all(Result::is_ok));
            is_installed(&mut r);
        });
    }
}

#[test]
fn who_writes_our_mark_bits_behind_us_is_told() {
    in_netns(|| {
        iptables(Variant::Nft).install(&dual(), &all()).unwrap();
        let told = || advice(&dual(), "iptables-nft").unwrap();
        let rule = |how: &str| sh(&format!("iptables-nft -t mangle {how}"));
        assert_eq!(told(), Vec::<String>::new());
        for (chain, does) in [
            ("INPUT", "MARK --set-mark 0x1"),
            ("OUTPUT", "MARK --set-xmark 0/0x2000"),
            ("INPUT", "CONNMARK --restore-mark"),
            ("OUTPUT", "CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff"),
            ("INPUT", "MARK --xor-mark 0x1"),
            ("INPUT", "CONNMARK --restore-mark --nfmask 0xffffc000"),
        ] {
            rule(&format!("-A {chain} -j {does}"));
            let now = told();
            assert!(now.len() == 1 && now[0].contains(&format!("MESHLB-{chain}")), "{does}: {now:?}");
            assert!(now[0].contains("(IPv4)") && now[0].contains("0x3fff"), "{now:?}");
            rule(&format!("-D {chain} -j {does}"));
            // Before ours it does no harm.
            rule(&format!("-I {chain} -j {does}"));
            assert_eq!(told(), Vec::<String>::new(), "{does}");
            rule(&format!("-D {chain} -j {does}"));
        }
        for harmless in [
            "MARK --set-xmark 0x10000/0x10000",
            "CONNMARK --save-mark",
            "CONNMARK --restore-mark --nfmask 0xffffc000 --ctmask 0xffffc000",
        ] {
            rule(&format!("-A INPUT -j {harmless}"));
        }
        assert_eq!(told(), Vec::<String>::new());
    });
}

#[test]
fn a_set_of_our_name_and_another_type_is_replaced_unless_a_rule_uses_it() {
    for variant in Variant::ALL {
        in_netns(move || {
            let mut r = iptables(variant);
            sh("ipset create meshlb-vips-4 hash:ip; ipset create meshlb-vips-6 hash:ip,port");
            let rule = format!("{} -A INPUT -m set --match-set meshlb-vips-4 src -j ACCEPT", variant.name());
            sh(&rule);
            let error = r.install(&dual(), &all()).unwrap_err().to_string();
            assert!(error.contains("ipset meshlb-vips-4") && !error.contains("scratch"), "{error}");
            assert!(
                error.contains("hash:ip") && error.contains("`iptables-save | grep meshlb-vips-4`"),
                "{error}"
            );
            sh(&rule.replace("-A", "-D"));
            r.install(&dual(), &all()).unwrap();
            is_installed(&mut r);
        });
    }
}

#[test]
fn a_table_that_nobody_can_keep_up_to_date_is_taken_away() {
    for variant in Variant::ALL {
        in_netns(move || {
            let mut before = iptables(variant);
            before.install(&dual(), &all()).unwrap();
            let mut r = iptables_without_nft(variant);
            r.set_fingerprint(before.fingerprint());
            assert!(matches!(r.observe(&dual()).unwrap().program, ProgramState::Drifted(_)));
            r.install(&dual(), &all()).unwrap();
            assert!(!ruleset().contains("table inet meshlb"), "{}", ruleset());
            is_installed(&mut r);
            // And when it comes back by another's hand.
            Nftables::new().unwrap().install(&dual(), &all()).unwrap();
            let state = r.observe(&dual()).unwrap();
            assert!(
                matches!(&state.program, ProgramState::Drifted(what) if what.iter().any(|w| w.contains("inet meshlb"))),
                "{state:?}"
            );
        });
    }
}

#[test]
fn services_that_the_other_renderer_leads_to_are_known_without_any_record() {
    for first in RENDERERS {
        for second in RENDERERS {
            in_netns(move || {
                let (mut a, mut b) = (first(), second());
                if (a.name() == "nftables") == (b.name() == "nftables") {
                    return;
                }
                let mut more = all();
                let published = Element::Published(testing::target("192.168.50.9", Protocol::Udp, 9));
                more.insert(published, Some(Mark(0x101)));
                a.install(&dual(), &more).unwrap();
                let state = b.observe(&dual()).unwrap();
                let what = format!("from {} to {}", a.name(), b.name());
                assert!(state.led_to.is_superset(&[Mark(0x100), Mark(0x101)].into()), "{what}: {state:?}");
                assert!(!state.elements.contains_key(&published), "{what}: it does not stand");
                b.install(&dual(), &all()).unwrap();
                b.remove_leftovers().unwrap();
                assert!(!b.observe(&dual()).unwrap().led_to.contains(&Mark(0x101)), "{what}");
            });
        }
    }
}

#[test]
fn the_whole_table_goes_on_while_one_family_of_iptables_can_t_be_written() {
    in_netns(|| {
        let mut before = Nftables::new().unwrap();
        before.install(&dual(), &all()).unwrap();
        // The kernel lets no rule jump to a chain with a hook.
        sh(
            "nft add table ip6 nat; nft add chain ip6 nat MESHLB-PREROUTING '{ type filter hook prerouting priority 7; }'",
        );
        let mut r = iptables(Variant::Nft);
        let mut more = all();
        more.insert(vip("fd00:200::6", Protocol::Tcp, 80), Some(Mark(0x106)));
        r.install(&dual(), &more).unwrap_err();
        assert!(r.stands(Family::V4) && !r.stands(Family::V6));
        let table = sh("nft list table inet meshlb");
        assert!(table.contains("map vips-6") && table.contains("chain post-6"), "{table}");
        assert!(table.contains("th dport map @vips-6"), "the marking is gone: {table}");
        assert!(table.contains("fd00:200::6 . tcp . 80"), "it is not up to date: {table}");
        sh("nft delete chain ip6 nat MESHLB-PREROUTING");
        r.install(&dual(), &all()).unwrap();
        is_installed(&mut r);
        assert!(!sh("nft list table inet meshlb").contains("map vips-6"));
    });
}
