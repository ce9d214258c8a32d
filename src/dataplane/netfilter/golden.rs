//! The rendered text, as a person reviews it. Files in tests/golden.

use super::{
    accept,
    rules_iptables::{Guard, Options, Saved, parse_save, restore_text, rules},
    rules_nft::{install_text, table_text},
    sets::{Layout, NftContents},
    testing::{dual, elements, program},
};
use crate::model::{
    ids::Family,
    kernel::{Elements, Program},
};

fn golden(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../../tests/golden");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

fn iptables_text(program: &Program, options: Options) -> String {
    let text = |f| restore_text(&rules(program, f, options), &Saved::default());
    format!("# iptables-restore\n{}# ip6tables-restore\n{}", text(Family::V4), text(Family::V6))
}

#[test]
fn iptables_dual_stack() {
    golden("iptables-dual", &iptables_text(&dual(), Options::default()));
}

#[test]
fn iptables_one_family_with_bridges() {
    golden("iptables-v6-bridges", &iptables_text(&program(&[Family::V6], true), Options::default()));
}

#[test]
fn iptables_without_nft() {
    for (name, security) in [("iptables-nft-alone", false), ("iptables-legacy-alone", true)] {
        let options = Options { guard: Guard::Filter { security }, ..Options::default() };
        golden(name, &iptables_text(&program(&Family::ALL, true), options));
    }
}

#[test]
fn nft_small_table() {
    golden(
        "nft-small-dual",
        &install_text(&dual(), &elements(&Family::ALL), Layout::Small { hairpin: false }),
    );
}

#[test]
fn nft_whole_program() {
    golden(
        "nft-dual-bridges",
        &install_text(&program(&Family::ALL, true), &elements(&Family::ALL), Layout::Whole),
    );
    golden("nft-v4-empty", &install_text(&program(&[Family::V4], false), &Elements::new(), Layout::Whole));
}

#[test]
fn accepting_rules() {
    let text = |f| restore_text(&accept::rules(&dual(), f), &Saved::default());
    golden(
        "nft-accept",
        &format!("# iptables-restore\n{}# ip6tables-restore\n{}", text(Family::V4), text(Family::V6)),
    );
}

#[test]
fn a_program_is_known_by_all_that_differs() {
    let text = |p: &Program| table_text(p, &NftContents::new(), Layout::Whole);
    let base = dual();
    let mut mask = dual();
    mask.mask = 0xfff;
    assert_ne!(text(&base), text(&mask));
    assert_ne!(text(&base), text(&program(&[Family::V4], false)));
    assert_ne!(text(&base), text(&program(&Family::ALL, true)));
}

const SAVE: &str = "\
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [1:2]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:MESHLB-INPUT - [0:0]
:MESHLB-OLD - [0:0]
-A INPUT -m comment --comment \"meshlb\" -j MESHLB-INPUT
-A INPUT -j MARK --set-xmark 0x4000/0x4000
-A INPUT -m comment --comment meshlb -j MESHLB-INPUT
-A INPUT -s 10.0.0.1/32 -j MESHLB-INPUT
-A OUTPUT -j MESHLB-OLD
-A MESHLB-INPUT -j RETURN
COMMIT
";

#[test]
fn jumps_are_added_once_and_never_moved() {
    let text = restore_text(&rules(&dual(), Family::V4, Options::default()), &parse_save(SAVE));
    let mangle: Vec<_> = text.lines().skip_while(|l| *l != "*mangle").collect();
    assert!(!mangle.iter().any(|l| l.starts_with("-I INPUT")), "{mangle:?}");
    for line in [
        "-D INPUT -s 10.0.0.1/32 -j MESHLB-INPUT",
        "-D OUTPUT -j MESHLB-OLD",
        "-I OUTPUT 1 -m comment --comment meshlb -j MESHLB-OUTPUT",
        "-X MESHLB-OLD",
    ] {
        assert_eq!(mangle.iter().filter(|l| **l == line).count(), 1, "{line}: {mangle:?}");
    }
    // One of the two jumps from INPUT goes.
    let twice = mangle.iter().filter(|l| l.starts_with("-D INPUT -m comment"));
    assert_eq!(twice.count(), 1, "{mangle:?}");
    assert!(!text.contains("0x4000"));
}

#[test]
fn removal_names_only_ours() {
    let text = restore_text(&[], &parse_save(SAVE));
    let want = "*mangle\n:MESHLB-INPUT - [0:0]\n:MESHLB-OLD - [0:0]\n\
        -D INPUT -m comment --comment \"meshlb\" -j MESHLB-INPUT\n\
        -D INPUT -m comment --comment meshlb -j MESHLB-INPUT\n\
        -D INPUT -s 10.0.0.1/32 -j MESHLB-INPUT\n-D OUTPUT -j MESHLB-OLD\n\
        -X MESHLB-INPUT\n-X MESHLB-OLD\nCOMMIT\n";
    assert_eq!(text, want);
    assert_eq!(restore_text(&[], &Saved::default()), "");
}
