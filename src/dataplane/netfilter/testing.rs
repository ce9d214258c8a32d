//! Tests against a real kernel: each in a network namespace of its own, which ends with its thread.

use std::sync::OnceLock;

use nix::sched::{CloneFlags, unshare};

use super::{Iptables, Nftables, Variant, exec};
use crate::{
    dataplane::{
        Netfilter,
        ipset::{Ipset, SetType},
    },
    model::{
        ids::{Family, Mark, PerFamily, Protocol},
        kernel::{BridgeSubnet, Element, Elements, FamilyProgram, Program, Target},
    },
};

/// Runs `test` in a fresh network namespace, or says why not.
pub(crate) fn in_netns(test: impl FnOnce() + Send + 'static) {
    let outcome = std::thread::spawn(|| {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
            // CI must not pass by leaving this out.
            assert!(std::env::var_os("MESHLB_NO_SKIP").is_none(), "no network namespace: {e}");
            eprintln!("skipped: no network namespace: {e}");
            return;
        }
        test();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// A command of the test itself: fails the test when it fails.
pub(crate) fn sh(command: &str) -> String {
    exec::run("sh", &["-c", command], "").unwrap_or_else(|e| panic!("{command}: {e}"))
}

/// Whether this kernel has `-m ipvs`.
fn has_ipvs_match() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let try_it = |rules: &str| {
            let text = format!("*mangle\n:MESHLB-TRY - [0:0]\n{rules}COMMIT\n");
            exec::run("iptables-nft-restore", &["--noflush"], &text)
        };
        let answer = try_it("-A MESHLB-TRY -m ipvs --ipvs -j RETURN\n");
        let _ = try_it("-X MESHLB-TRY\n");
        if let Err(e) = &answer {
            eprintln!("without -m ipvs on this kernel: {e}");
        }
        answer.is_ok()
    })
}

/// Whether this kernel has `hash:net,net`.
pub(crate) fn has_pairs() -> bool {
    Ipset::new().has_type(SetType::Pair)
}

fn fit(mut renderer: Iptables) -> Iptables {
    if !has_ipvs_match() {
        renderer.options.ipvs_match = "-m mark --mark 0x2000/0x2000";
    }
    renderer
}

pub(crate) fn iptables(variant: Variant) -> Iptables {
    fit(Iptables::new(variant).unwrap())
}

pub(crate) fn iptables_without_nft(variant: Variant) -> Iptables {
    fit(Iptables::without_nft(variant))
}

/// A renderer that can be made anew, as by a process that starts again.
pub(crate) trait Renderer: Netfilter {
    fn again(&self) -> Box<dyn Renderer>;
}

impl Renderer for Iptables {
    fn again(&self) -> Box<dyn Renderer> {
        let mut new = iptables(if self.name() == "iptables-nft" { Variant::Nft } else { Variant::Legacy });
        new.set_fingerprint(self.fingerprint());
        Box::new(new)
    }
}

impl Renderer for Nftables {
    fn again(&self) -> Box<dyn Renderer> {
        let mut new = Self::new().unwrap();
        new.set_fingerprint(self.fingerprint());
        Box::new(new)
    }
}

/// Makes a renderer.
pub(crate) type Make = fn() -> Box<dyn Renderer>;

pub(crate) const RENDERERS: [Make; 3] = [
    || Box::new(iptables(Variant::Nft)),
    || Box::new(iptables(Variant::Legacy)),
    || Box::new(Nftables::new().unwrap()),
];

/// Runs `test` with each renderer, each in a network namespace of its own.
pub(crate) fn with_each(test: fn(Box<dyn Renderer>)) {
    for make in RENDERERS {
        in_netns(move || {
            let renderer = make();
            eprintln!("with {}", renderer.name());
            test(renderer);
        });
    }
}

pub(crate) fn family_program(family: Family) -> FamilyProgram {
    let (range, ingress, node) = match family {
        Family::V4 => ("10.200.0.0/16", "10.200.0.1", "192.168.50.1"),
        Family::V6 => ("fd00:200::/112", "fd00:200::1", "fd00:50::1"),
    };
    FamilyProgram {
        range: range.parse().unwrap(),
        ingress: ingress.parse().unwrap(),
        node: node.parse().unwrap(),
    }
}

pub(crate) fn program(families: &[Family], bridges: bool) -> Program {
    let mut per = PerFamily::default();
    for family in families {
        per.set(*family, Some(family_program(*family)));
    }
    let bridge = |subnet: &str| BridgeSubnet { bridge: "cni0".into(), subnet: subnet.parse().unwrap() };
    let masquerade_bridges =
        if bridges { vec![bridge("10.244.1.0/24"), bridge("fd00:244:1::/64")] } else { Vec::new() };
    let uplinks = vec!["eth0".into(), "wg0".into()];
    Program { mask: 0x3fff, families: per, masquerade_bridges, uplinks, outside: vec!["eth0".into()] }
}

pub(crate) fn dual() -> Program {
    program(&Family::ALL, false)
}

pub(crate) fn target(addr: &str, protocol: Protocol, port: u16) -> Target {
    Target { addr: addr.parse().unwrap(), protocol, port }
}

pub(crate) fn vip(addr: &str, protocol: Protocol, port: u16) -> Element {
    Element::Vip(target(addr, protocol, port))
}

/// One service on both families and all protocols, published, with two endpoints, one of them on this node.
pub(crate) fn elements(families: &[Family]) -> Elements {
    let mut out = Elements::new();
    let mark = Some(Mark(0x100));
    for family in families {
        let f = family_program(*family);
        let (vip, own, pods) = match family {
            Family::V4 => ("10.200.0.5", "192.168.50.1", ["10.244.1.11", "10.244.2.11"]),
            Family::V6 => ("fd00:200::5", "fd00:50::1", ["fd00:244:1::11", "fd00:244:2::11"]),
        };
        for protocol in Protocol::ALL {
            out.insert(Element::Vip(target(vip, protocol, 80)), mark);
            out.insert(Element::Vip(Target { addr: f.ingress, protocol, port: 30080 }), mark);
            out.insert(Element::Published(Target { addr: f.node, protocol, port: 30080 }), mark);
            out.insert(Element::Loopback(*family, protocol, 30080), mark);
        }
        out.insert(Element::Own(target(own, Protocol::Tcp, 8080)), None);
        out.insert(Element::Local(pods[0].parse().unwrap()), None);
        out.extend(pods.map(|a| (Element::Endpoint(a.parse().unwrap()), None)));
    }
    out
}
