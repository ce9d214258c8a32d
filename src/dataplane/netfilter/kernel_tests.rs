//! Both renderers against this machine's kernel.

use super::testing::{
    RENDERERS, Renderer, dual, elements, in_netns, iptables_without_nft, program, sh, vip, with_each,
};
use super::*;
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

/// Everything in this network namespace that a renderer could touch, without counters and handles, sorted.
/// Empty tables and built-in chains don't count: programs make them by looking.
fn everything() -> Vec<String> {
    let mut text = String::new();
    for program in [
        "iptables-nft-save",
        "ip6tables-nft-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
        "ipset save",
    ] {
        text += &sh(&format!(
            "{program} | sed 's/ \\[[0-9:]*\\]//; /^#/d; /^[*]/d; /^COMMIT/d; /^:.* ACCEPT/d; s/^/{program} /'"
        ));
    }
    text += &sh("nft -s list ruleset inet");
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn mentions(lines: &[String], what: &str) -> bool {
    lines.iter().any(|l| l.contains(what))
}

/// Lines of one that the other lacks.
fn lacks(one: &[String], other: &[String]) -> Vec<String> {
    one.iter().filter(|l| !other.contains(l)).cloned().collect()
}

#[test]
fn install_then_observe_then_nothing_to_write() {
    with_each(|mut r| {
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Absent);
        r.install(&dual(), &all()).unwrap();
        let writes = r.writes();
        for _ in 0..2 {
            let state = r.observe(&dual()).unwrap();
            assert_eq!(state.program, ProgramState::Installed);
            assert_eq!(state.elements, all());
            assert_eq!(state.leftovers, Vec::<String>::new());
            assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        }
        assert_eq!(r.writes(), writes);

        // A process that starts again and knows the fingerprint finds its rules and writes nothing.
        let mut again = r.again();
        assert_eq!(again.observe(&dual()).unwrap().program, ProgramState::Installed);
        assert_eq!(again.probe().unwrap(), Probe::Unchanged);
        assert_eq!(again.writes(), 0);

        // Installing once more changes nothing that can be seen.
        let before = everything();
        r.install(&dual(), &all()).unwrap();
        assert_eq!(lacks(&everything(), &before), Vec::<String>::new());
        assert_eq!(lacks(&before, &everything()), Vec::<String>::new());
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Installed);
    });
}

#[test]
fn a_rehearsal_leaves_nothing() {
    in_netns(|| {
        for layout in [sets::Layout::Whole, sets::Layout::Small { hairpin: true }] {
            nftwrite::run(&rules_nft::rehearsal_text(&dual(), layout)).unwrap();
            assert_eq!(sh("nft list ruleset"), "");
        }
    });
}

#[test]
fn a_table_that_is_alike_is_filled_anew_and_any_other_replaced() {
    with_each(|mut r| {
        r.install(&dual(), &all()).unwrap();
        let handle = || sh("nft -a list table inet meshlb | head -1");
        let (before, first) = (everything(), handle());
        assert!(first.contains("handle"), "{first}");
        for broken in [
            "true",
            "nft flush chain inet meshlb guard",
            "nft flush set inet meshlb published-4",
            "nft flush map inet meshlb loopback-6",
        ] {
            sh(broken);
            r.install(&dual(), &all()).unwrap();
            assert_eq!((everything(), handle()), (before.clone(), first.clone()), "{broken}");
        }
        for other in [
            "nft add chain inet meshlb more",
            "nft add set inet meshlb more '{ type ipv4_addr; }'",
            "nft flush chain inet meshlb lo-in; nft delete chain inet meshlb lo-in
             nft add chain inet meshlb lo-in '{ type filter hook input priority 7; }'",
        ] {
            let was = handle();
            sh(other);
            r.install(&dual(), &all()).unwrap();
            assert_ne!(handle(), was, "{other}");
            assert_eq!(everything(), before, "{other}");
        }
    });
}

#[test]
fn an_element_that_is_refused_keeps_no_other_out() {
    with_each(|mut r| {
        // Without sets for IPv6.
        let program = program(&[Family::V4], false);
        r.install(&program, &elements(&[Family::V4])).unwrap();
        let put = |addr, port| {
            ElementChange::Put(vip(addr, Protocol::Tcp, port), Some(Mark(0x100 + u32::from(port))))
        };
        let mut changes: Vec<_> = (1..=40).map(|port| put("10.200.0.6", port)).collect();
        changes.insert(20, put("fd00:200::6", 1));
        let results = r.apply(&program, &changes);
        let failed: Vec<usize> = (0..changes.len()).filter(|i| results[*i].is_err()).collect();
        assert_eq!(failed, [20], "{results:?}");
        let mut want = elements(&[Family::V4]);
        note(&mut want, &changes, &results);
        assert_eq!(r.observe(&program).unwrap().elements, want);
    });
}

#[test]
fn changes_of_elements_arrive() {
    with_each(|mut r| {
        r.install(&dual(), &all()).unwrap();
        let mut want = all();
        let published = |port| Element::Published(testing::target("192.168.50.9", Protocol::Udp, port));
        let changes = vec![
            ElementChange::Put(vip("10.200.0.6", Protocol::Tcp, 443), Some(Mark(0x101))),
            ElementChange::Put(vip("10.200.0.5", Protocol::Tcp, 80), Some(Mark(0x102))),
            ElementChange::Put(vip("10.200.0.5", Protocol::Udp, 80), Some(Mark(0x100))),
            ElementChange::Put(published(1), Some(Mark(0x103))),
            ElementChange::Put(published(2), Some(Mark(0x104))),
            ElementChange::Del(published(2)),
            ElementChange::Del(published(3)),
            ElementChange::Del(vip("fd00:200::5", Protocol::Sctp, 80)),
            ElementChange::Del(vip("10.200.9.9", Protocol::Tcp, 9)),
            ElementChange::Put(Element::Loopback(Family::V4, Protocol::Tcp, 30080), Some(Mark(0x105))),
            ElementChange::Del(Element::Endpoint("10.244.2.11".parse().unwrap())),
            ElementChange::Put(Element::Local("10.244.1.12".parse().unwrap()), None),
            ElementChange::Put(Element::Own(testing::target("10.200.0.2", Protocol::Udp, 53)), None),
        ];
        let results = r.apply(&dual(), &changes);
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        note(&mut want, &changes, &results);
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        let state = r.observe(&dual()).unwrap();
        assert_eq!(state.program, ProgramState::Installed);
        assert_eq!(state.elements, want);

        // The same once more is no error.
        assert!(r.apply(&dual(), &changes).iter().all(Result::is_ok));
        assert_eq!(r.observe(&dual()).unwrap().elements, want);

        let back: Vec<_> = want.keys().map(|e| ElementChange::Del(*e)).collect();
        assert!(r.apply(&dual(), &back).iter().all(Result::is_ok));
        let state = r.observe(&dual()).unwrap();
        assert_eq!((state.program, state.elements.len()), (ProgramState::Installed, 0));
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
    });
}

#[test]
fn an_endpoint_costs_iptables_no_process() {
    for variant in Variant::ALL {
        in_netns(move || {
            let mut r = testing::iptables(variant);
            r.install(&dual(), &all()).unwrap();
            let before = r.runs();
            if !testing::has_pairs() {
                eprintln!("skipped: no hash:net,net on this kernel");
                return;
            }
            let changes = [
                ElementChange::Put(Element::Endpoint("10.244.7.7".parse().unwrap()), None),
                ElementChange::Put(Element::Local("10.244.7.7".parse().unwrap()), None),
                ElementChange::Put(vip("10.200.7.7", Protocol::Tcp, 80), Some(Mark(0x177))),
            ];
            assert!(r.apply(&dual(), &changes).iter().all(Result::is_ok));
            assert_eq!(r.runs(), before);
        });
    }
}

const FOREIGN: &str = r#"
set -e
for I in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
  $I -N KUBE-SERVICES -t nat; $I -t nat -A KUBE-SERVICES -p tcp --dport 1 -j RETURN; $I -t nat -A PREROUTING -j KUBE-SERVICES
  $I -A INPUT -p tcp --dport 22 -m comment --comment "a -j MESHLB- look" -j ACCEPT
  $I -A INPUT -m comment --comment "say \" -j MESHLB-INPUT b"; $I -t mangle -A OUTPUT -j MARK --set-xmark 0x4000/0x4000
done
ipset create other hash:ip; ipset add other 1.2.3.4; iptables-nft -A INPUT -m set --match-set other src -j ACCEPT
nft -f - <<E
table inet theirs {
  set s { type ipv4_addr
    elements = { 1.1.1.1 }
  }
  chain c { type filter hook input priority 5; policy accept;
    ip saddr @s counter accept
  }
}
E
"#;

#[test]
fn what_is_not_ours_stays() {
    with_each(|mut r| {
        sh(FOREIGN);
        let before = everything();
        r.install(&dual(), &all()).unwrap();
        r.observe(&dual()).unwrap();
        r.remove_leftovers().unwrap();
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Installed);
        r.remove().unwrap();
        assert_eq!(everything(), before);
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Absent);
        r.remove().unwrap();
    });
}

fn drift(mut r: Box<dyn Renderer>, command: &str, names: &str) {
    r.install(&dual(), &all()).unwrap();
    assert_eq!(r.probe().unwrap(), Probe::Unchanged);
    sh(command);
    if r.name() != "iptables-legacy" || !command.contains("legacy") {
        // The old tables are looked at more rarely.
        let Probe::Changed(what) = r.probe().unwrap() else { panic!("{}: not seen: {command}", r.name()) };
        assert!(what.contains(names), "{command}: {what}");
    }
    let state = r.observe(&dual()).unwrap();
    match &state.program {
        ProgramState::Drifted(texts) => {
            assert!(texts.iter().any(|t| t.contains(names)), "{command}: {texts:?}")
        }
        ProgramState::Installed => assert_ne!(state.elements, all(), "{command}"),
        ProgramState::Absent => assert_eq!(names, "inet meshlb"),
    }
    r.install(&dual(), &all()).unwrap();
    let state = r.observe(&dual()).unwrap();
    assert_eq!((state.program, state.elements), (ProgramState::Installed, all()), "{command}");
}

#[test]
fn drift_is_seen_named_and_healed() {
    let both: [(usize, &str); 2] = [(0, "iptables-nft"), (1, "iptables-legacy")];
    for (which, i) in both {
        let cases = [
            (format!("{i} -t mangle -D MESHLB-INPUT 1"), "iptables mangle MESHLB-INPUT was changed"),
            (format!("{i} -t nat -F MESHLB-POSTROUTING"), "iptables nat MESHLB-POSTROUTING was changed"),
            (
                format!("{i} -D INPUT -m comment --comment meshlb -j MESHLB-INPUT"),
                "INPUT jump to MESHLB-INPUT is missing",
            ),
            (
                format!("{i} -A INPUT -m comment --comment meshlb -j MESHLB-INPUT"),
                "INPUT jump to MESHLB-INPUT was changed",
            ),
            (format!("{i} -t mangle -F; {i} -t nat -F; {i} -F"), "is missing"),
            (format!("{i} -t mangle -F; {i} -t mangle -X"), "is missing"),
            ("ipset flush meshlb-vips-4".to_owned(), "ipset meshlb-vips-4"),
            ("ipset del meshlb-hairpin-6 fd00:244:1::11,fd00:244:1::11".to_owned(), "ipset meshlb-hairpin-6"),
            ("nft delete table inet meshlb".to_owned(), "inet meshlb"),
            ("nft flush chain inet meshlb guard".to_owned(), "inet meshlb guard was changed"),
            ("nft flush set inet meshlb published-4".to_owned(), "published-4"),
            ("nft add element inet meshlb own-4 '{ 1.2.3.4 . tcp . 5 }'".to_owned(), "own-4"),
            (
                "nft add chain inet meshlb x; nft add rule inet meshlb x accept".to_owned(),
                "inet meshlb x is not ours",
            ),
        ];
        for (command, names) in cases {
            if command.contains("hairpin") && !testing::has_pairs() {
                continue;
            }
            in_netns(move || drift(RENDERERS[which](), &command, names));
        }
    }
    for (command, names) in [
        ("nft flush chain inet meshlb unmark", "inet meshlb unmark was changed"),
        ("nft flush ruleset", "inet meshlb"),
        ("nft flush map inet meshlb vips-4", "vips-4"),
        ("nft delete element inet meshlb published-4 '{ 192.168.50.1 . tcp . 30080 }'", "published-4"),
        ("nft delete element inet meshlb published-marks-6 '{ fd00:50::1 . tcp . 30080 }'", "published-6"),
        ("iptables-nft -P FORWARD DROP", "iptables"),
        ("iptables-legacy -P INPUT DROP", "iptables-legacy"),
    ] {
        in_netns(move || drift_nftables(command, names));
    }
}

fn drift_nftables(command: &str, names: &str) {
    let r = RENDERERS[2]();
    if command.contains("legacy") {
        let mut r = r;
        r.install(&dual(), &all()).unwrap();
        sh(command);
        let state = r.observe(&dual()).unwrap();
        assert!(matches!(&state.program, ProgramState::Drifted(t) if t[0].contains(names)), "{state:?}");
        r.install(&dual(), &all()).unwrap();
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Installed);
        assert!(sh("iptables-legacy-save").contains("-A MESHLB-INPUT"));
    } else if names == "published-6" {
        let mut r = r;
        r.install(&dual(), &all()).unwrap();
        sh(command);
        // The mark is gone, so the element is; what is left of it must not be taken for good.
        let state = r.observe(&dual()).unwrap();
        assert!(matches!(&state.program, ProgramState::Drifted(t) if t[0].contains(names)), "{state:?}");
    } else {
        drift(r, command, names);
    }
}

#[test]
fn a_change_of_renderer_leaves_no_trace() {
    for first in RENDERERS {
        for second in RENDERERS {
            in_netns(move || {
                sh("iptables-nft -P FORWARD DROP; iptables-legacy -A INPUT -j DROP");
                let (mut a, mut b) = (first(), second());
                if a.name() == b.name() {
                    return;
                }
                let what = format!("from {} to {}", a.name(), b.name());
                b.install(&dual(), &all()).unwrap();
                b.remove_leftovers().unwrap();
                let alone = everything();
                b.remove().unwrap();
                a.install(&dual(), &all()).unwrap();
                let state = b.observe(&dual()).unwrap();
                assert_ne!(state.program, ProgramState::Installed, "{what}");
                b.install(&dual(), &all()).unwrap();
                b.remove_leftovers().unwrap();
                let state = b.observe(&dual()).unwrap();
                assert_eq!(state.program, ProgramState::Installed, "{what}");
                assert_eq!(state.leftovers, Vec::<String>::new(), "{what}");
                assert_eq!(state.elements, all());
                assert_eq!(lacks(&everything(), &alone), Vec::<String>::new(), "{what}");
                assert_eq!(lacks(&alone, &everything()), Vec::<String>::new(), "{what}");
            });
        }
    }
}

#[test]
fn another_configuration_is_seen_and_a_family_that_goes_is_taken_away() {
    with_each(|mut r| {
        r.install(&dual(), &all()).unwrap();
        let only = program(&[Family::V4], true);
        let state = r.observe(&only).unwrap();
        assert!(matches!(state.program, ProgramState::Drifted(_)));
        r.install(&only, &elements(&[Family::V4])).unwrap();
        let state = r.observe(&only).unwrap();
        assert_eq!((state.program, state.elements), (ProgramState::Installed, elements(&[Family::V4])));
        assert!(!mentions(&everything(), "fd00"), "{:?}", everything());
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
    });
}

#[test]
fn foreign_writes_are_not_taken_for_ours() {
    with_each(|mut r| {
        r.install(&dual(), &all()).unwrap();
        let writes = r.writes();
        sh(FOREIGN);
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        assert_eq!(r.writes(), writes);
        assert_eq!(r.observe(&dual()).unwrap().program, ProgramState::Installed);
    });
}

#[test]
fn without_nft_the_filter_table_refuses() {
    for variant in Variant::ALL {
        in_netns(move || {
            let mut r = iptables_without_nft(variant);
            r.install(&dual(), &all()).unwrap();
            assert!(!r.warnings().is_empty());
            let state = r.observe(&dual()).unwrap();
            assert_eq!((state.program, state.elements), (ProgramState::Installed, all()));
            assert_eq!(r.probe().unwrap(), Probe::Unchanged);
            assert!(!sh("nft list tables").contains("meshlb"));
            let changes: Vec<_> = all().keys().map(|e| ElementChange::Del(*e)).collect();
            assert!(r.apply(&dual(), &changes).iter().all(Result::is_ok));
            assert_eq!(r.observe(&dual()).unwrap().elements.len(), 0);
            r.remove().unwrap();
            assert!(!mentions(&everything(), "MESHLB"));
        });
    }
}

#[test]
fn many_elements() {
    with_each(|mut r| {
        let mut many = all();
        for i in 0..20_000u32 {
            let addr = std::net::Ipv4Addr::from(0x0ac8_0100 + i).to_string();
            many.insert(vip(&addr, Protocol::Tcp, 80), Some(Mark(0x100 + i % 0x3000)));
        }
        let start = std::time::Instant::now();
        r.install(&dual(), &many).unwrap();
        let installed = start.elapsed();
        assert_eq!(r.observe(&dual()).unwrap().elements, many);
        let observed = start.elapsed() - installed;
        let changes: Vec<_> = many
            .keys()
            .filter(|e| !all().contains_key(e))
            .map(|e| ElementChange::Put(*e, Some(Mark(0x3fff))))
            .collect();
        assert!(r.apply(&dual(), &changes).iter().all(Result::is_ok));
        let applied = start.elapsed() - installed - observed;
        let start = std::time::Instant::now();
        assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        let first = start.elapsed();
        let start = std::time::Instant::now();
        for _ in 0..100 {
            assert_eq!(r.probe().unwrap(), Probe::Unchanged);
        }
        eprintln!(
            "{}: 20,000 elements: install {installed:?}, observe {observed:?}, change all {applied:?}, probe {first:?} then {:?}",
            r.name(),
            start.elapsed() / 100
        );
    });
}
