//! What `--renderer auto` means on this host, and what a person should know about its firewall.

use super::{
    Variant,
    nftread::{ForeignChain, NftReader},
    rules_iptables::target,
    xtables::plain_variant,
};
use crate::{
    dataplane::Error,
    model::{
        ids::Family,
        kernel::{FamilyProgram, Program},
    },
};

/// A renderer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RendererChoice {
    /// [`super::Iptables`] with this variant.
    Iptables(Variant),
    /// [`super::Nftables`].
    Nftables,
}

impl RendererChoice {
    /// The renderer's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iptables(variant) => variant.name(),
            Self::Nftables => "nftables",
        }
    }
}

/// The renderer that fits this host, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Detection {
    /// The renderer.
    pub choice: RendererChoice,
    /// Why, each as one line.
    pub reasons: Vec<String>,
    /// What is odd about this host, each as one line.
    pub warnings: Vec<String>,
}

/// What one variant of iptables holds that is not ours.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Usage {
    installed: bool,
    rules: usize,
    /// Chains that kubelet makes in the variant that it uses.
    kubelet: bool,
}

/// Looks at this host, in the network namespace of the calling thread.
pub fn detect() -> Detection {
    let mut notes = Vec::new();
    let mut look = |variant: Variant| {
        let installed = variant.installed();
        look_at(installed.then_some(variant), |family| variant.save_text(family), &mut notes)
    };
    let (nft, legacy) = (look(Variant::Nft), look(Variant::Legacy));
    let mut detection = decide(nft, legacy, plain_variant());
    detection.warnings.extend(notes);
    detection
}

/// What a variant holds, if it is installed, by what `save` prints for a family.
fn look_at(
    installed: Option<Variant>,
    save: impl Fn(Family) -> Result<String, Error>,
    notes: &mut Vec<String>,
) -> Usage {
    let mut usage = Usage { installed: installed.is_some(), ..Usage::default() };
    let mut unreadable = 0;
    for (variant, family) in installed.into_iter().flat_map(|v| Family::ALL.map(|family| (v, family))) {
        match save(family) {
            Ok(text) => count(&text, &mut usage),
            Err(e) => {
                // Without rights nothing can be read, and a lock is let go of.
                unreadable += usize::from(!matches!(e, Error::Permission { .. } | Error::Transient { .. }));
                notes.push(format!("{variant} can't be read for {family}: {e}"));
            }
        }
    }
    // Nor could it be written.
    usage.installed &= unreadable < Family::ALL.len();
    usage
}

fn count(text: &str, usage: &mut Usage) {
    let foreign = |line: &&str| {
        line.strip_prefix("-A ").is_some_and(|rest| !rest.starts_with("MESHLB-"))
            && !target(line).is_some_and(|to| to.starts_with("MESHLB-"))
    };
    usage.rules += text.lines().filter(foreign).count();
    usage.kubelet |= text.contains(":KUBE-IPTABLES-HINT ") || text.contains(":KUBE-KUBELET-CANARY ");
}

fn decide(nft: Usage, legacy: Usage, plain: Option<Variant>) -> Detection {
    let (mut reasons, mut warnings) = (Vec::new(), Vec::new());
    if nft.rules > 0 && legacy.rules > 0 {
        warnings.push(format!(
            "this host has {} rules in iptables-nft and {} in iptables-legacy; a packet passes both, so a drop in either is final",
            nft.rules, legacy.rules
        ));
    }
    let choice = match (nft.installed, legacy.installed) {
        (false, false) => {
            reasons.push("no iptables program is installed here that works".to_owned());
            RendererChoice::Nftables
        }
        (true, false) => {
            reasons.push("iptables-nft is the only iptables that is installed".to_owned());
            RendererChoice::Iptables(Variant::Nft)
        }
        (false, true) => {
            reasons.push("iptables-legacy is the only iptables that is installed".to_owned());
            RendererChoice::Iptables(Variant::Legacy)
        }
        (true, true) => {
            let (variant, reason) = if nft.kubelet != legacy.kubelet {
                let variant = if nft.kubelet { Variant::Nft } else { Variant::Legacy };
                (variant, format!("kubelet uses {variant}"))
            } else if nft.rules != legacy.rules {
                let variant = if nft.rules > legacy.rules { Variant::Nft } else { Variant::Legacy };
                (variant, format!("{variant} holds most rules here ({} and {})", nft.rules, legacy.rules))
            } else {
                let variant = plain.unwrap_or(Variant::Nft);
                (variant, format!("the program iptables is {variant}"))
            };
            reasons.push(reason);
            RendererChoice::Iptables(variant)
        }
    };
    Detection { choice, reasons, warnings }
}

/// Rules that only the firewall's owner can add, each as a line with the command: an accept of ours doesn't
/// override a drop in another base chain. `renderer` is the one in use.
pub fn advice(program: &Program, renderer: &str) -> Result<Vec<String>, Error> {
    let mut reader = NftReader::new();
    if !reader.available() {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for chain in reader.dropping_chains()? {
        if !accepts_there(&mut reader, &chain, renderer)? {
            out.extend(chain_advice(&chain, program));
        }
    }
    // With nftables the mark is looked up behind iptables' chains. What iptables-legacy has is not looked at here: it costs a process.
    if renderer == Variant::Nft.name() {
        out.extend(mark_advice(&mut reader, program)?);
    }
    Ok(out)
}

/// Rules of others in mangle that write our bits of the mark after ours have: what they concern is then no service's, and refused.
fn mark_advice(reader: &mut NftReader, program: &Program) -> Result<Vec<String>, Error> {
    let mut out = Vec::new();
    for (family, _) in program.families.iter() {
        for builtin in ["INPUT", "OUTPUT"] {
            let ours = format!("MESHLB-{builtin}");
            if reader.marks_behind(family, builtin, &ours, program.mask)? {
                out.push(format!(
                    "a rule behind {ours} in {builtin} of the table mangle ({family}) sets or restores mark bits that are ours: where \
                     it matches, connections to services are refused. Put it before {ours}, or give it masks without {:#x} (--nfmask and \
                     --ctmask of CONNMARK)",
                    program.mask
                ));
            }
        }
    }
    Ok(out)
}

/// Whether it is a chain of iptables in which our rules accept what has to pass, or will once they are installed.
fn accepts_there(reader: &mut NftReader, chain: &ForeignChain, renderer: &str) -> Result<bool, Error> {
    let Some(family) = chain.iptables else { return Ok(false) };
    let ours = format!("MESHLB-{}", chain.name);
    if reader.iptables_jump(family, &chain.table, &chain.name, &ours)?.is_some() {
        return Ok(true);
    }
    // That one writes rules into its own flavour only.
    if renderer == Variant::Legacy.name() {
        return Ok(false);
    }
    Ok(Variant::Nft.installed() && Variant::Nft.reads(family, &chain.table)?)
}

fn chain_advice(chain: &ForeignChain, program: &Program) -> Vec<String> {
    let ForeignChain { family, table, name, hook, .. } = chain;
    if table == "firewalld" {
        return firewalld_advice(hook, program);
    }
    let place = format!("{family} {table} {name}");
    let mut out = Vec::new();
    for (f, p) in program.families.iter() {
        let ip = if f == Family::V4 { "ip" } else { "ip6" };
        if (*family == "ip" || *family == "ip6") && *family != ip {
            continue;
        }
        let rule = match *hook {
            "input" => format!("{ip} daddr {} accept", p.range),
            _ => format!("ct original {ip} daddr {} ct state established,related accept", p.range),
        };
        out.push(format!(
            "the nftables chain {place} drops what none of its rules accepts; let packets for services pass: nft insert rule {place} {rule}"
        ));
    }
    if *hook == "forward" {
        out.push(format!(
            "the nftables chain {place} drops what none of its rules accepts; let answers from published ports pass: \
             nft insert rule {place} ct status dnat ct state established,related accept"
        ));
    }
    out
}

/// firewalld writes its table anew at each reload, so the rule has to be in its configuration. Answers and what was
/// translated pass its FORWARD chain anyway.
fn firewalld_advice(hook: &str, program: &Program) -> Vec<String> {
    if hook != "input" {
        return Vec::new();
    }
    let rule = |(family, p): (Family, &FamilyProgram)| {
        let family = if family == Family::V4 { "ipv4" } else { "ipv6" };
        format!(
            "firewalld rejects what its zones don't allow; let packets for services pass, in each zone that clients and \
             pods are in: firewall-cmd --permanent --add-rich-rule='rule family={family} destination address={} accept' \
             && firewall-cmd --reload",
            p.range
        )
    };
    program.families.iter().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(rules: usize, kubelet: bool) -> Usage {
        Usage { installed: true, rules, kubelet }
    }

    #[test]
    fn follows_kubelet_then_rules_then_the_plain_program() {
        let nft = RendererChoice::Iptables(Variant::Nft);
        let legacy = RendererChoice::Iptables(Variant::Legacy);
        let none = Usage::default();
        for (a, b, plain, want) in [
            (usage(3, false), usage(9, true), Some(Variant::Nft), legacy),
            (usage(3, true), usage(9, false), None, nft),
            (usage(9, false), usage(3, false), Some(Variant::Legacy), nft),
            (usage(0, false), usage(0, false), Some(Variant::Legacy), legacy),
            (usage(0, false), usage(0, false), None, nft),
            (none, usage(0, false), None, legacy),
            (usage(0, false), none, None, nft),
            (none, none, None, RendererChoice::Nftables),
        ] {
            let detection = decide(a, b, plain);
            assert_eq!(detection.choice, want, "{detection:?}");
            assert_eq!(detection.reasons.len(), 1);
        }
    }

    #[test]
    fn a_flavour_that_cannot_be_read_is_as_if_it_were_not_there() {
        let broken =
            |_| Err(Error::Failed { object: "iptables-nft-save".into(), reason: "no such device".into() });
        let (mut notes, nft) = (Vec::new(), Some(Variant::Nft));
        let usage_of_broken = look_at(nft, broken, &mut notes);
        assert_eq!((usage_of_broken.installed, notes.len()), (false, 2));
        assert!(notes[0].contains("no such device"), "{notes:?}");
        let legacy = RendererChoice::Iptables(Variant::Legacy);
        assert_eq!(decide(usage_of_broken, usage(0, false), nft).choice, legacy);
        // One family, or a moment, is not enough.
        let half = |family| if family == Family::V4 { Ok(String::new()) } else { broken(family) };
        assert!(look_at(nft, half, &mut notes).installed);
        let locked = |_| Err(Error::Transient { object: "xtables lock".into(), reason: "held".into() });
        assert!(look_at(nft, locked, &mut notes).installed);
        assert!(!look_at(None, |_| Ok("-A INPUT -j X\n".into()), &mut notes).installed);
    }

    #[test]
    fn a_mixed_host_is_told_about() {
        let detection = decide(usage(3, false), usage(9, false), None);
        assert!(detection.warnings[0].contains("3 rules in iptables-nft and 9 in iptables-legacy"));
    }

    #[test]
    fn our_own_rules_don_t_count() {
        let mut u = usage(0, false);
        count(
            "*filter\n:KUBE-KUBELET-CANARY - [0:0]\n-A INPUT -j MESHLB-INPUT\n-A MESHLB-INPUT -j ACCEPT\n-A INPUT -j X\n",
            &mut u,
        );
        assert_eq!((u.rules, u.kubelet), (1, true));
    }
}
