//! The accepting rules that the nftables renderer needs in iptables' own chains.
//!
//! Where an iptables INPUT or FORWARD drops, no accept in our table saves a packet: every base chain must let
//! it pass. So there, and only there, two small chains stand in iptables' filter table.

use super::{
    rules_iptables::{Rule, Saved, target},
    sets::loopback,
};
use crate::model::{ids::Family, kernel::Program};

/// The rules of one family.
pub(crate) fn rules(program: &Program, family: Family) -> Vec<Rule> {
    let Some(f) = program.families.get(family) else { return Vec::new() };
    let rule = |chain, comment: &str, text: String| Rule {
        table: "filter",
        chain,
        text: format!("-m comment --comment \"meshlb: {comment}\" {text}"),
    };
    let replies = "-m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY";
    let to = |original: &str| format!("{replies} --ctorigdst {original} -j ACCEPT");
    let range = f.range.to_string();
    vec![
        // What no service takes is refused after IPVS, by the guard in the nft table.
        rule("MESHLB-INPUT", "to a service or refused by the guard", format!("-d {range} -j ACCEPT")),
        rule("MESHLB-INPUT", "replies to this node", to(&range)),
        rule("MESHLB-INPUT", "replies to this node", to(&f.node.to_string())),
        rule("MESHLB-INPUT", "replies to this node", to(&loopback(family).to_string())),
        // From this node to an endpoint on its own host network, by `lo`: what IPVS has sent on, and nothing else.
        rule(
            "MESHLB-INPUT",
            "from this node to an endpoint on it",
            "-i lo -m ipvs --ipvs -j ACCEPT".to_owned(),
        ),
        rule("MESHLB-FORWARD", "replies from VIPs", to(&range)),
        // Both directions: after the first packet, conntrack itself sends what was published on to the
        // endpoint, so it is forwarded and no longer comes by IPVS.
        rule(
            "MESHLB-FORWARD",
            "published ports",
            "-m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT -j ACCEPT".to_owned(),
        ),
    ]
}

/// Whether a rule needs the kernel's xt_ipvs.
pub(crate) fn asks_ipvs(rule: &Rule) -> bool {
    rule.text.contains("-m ipvs ")
}

/// Whether INPUT or FORWARD drops or rejects anything itself.
pub(crate) fn blocks(saved: &Saved) -> bool {
    saved.foreign.iter().any(|(_, line)| {
        (line.starts_with(':') && line.contains(" DROP ")) || matches!(target(line), Some("DROP" | "REJECT"))
    })
}
