//! What an installation brings, for people: every set, every chain with its number of rules, and the jumps to them.

use super::{
    rules_iptables::{CHAINS, Rule},
    rules_nft::{TABLE, table_text},
    sets::{Layout, NftContents, Stores, set_name},
};
use crate::model::{ids::Family, kernel::Program};

/// Chains of iptables in one family.
pub(crate) fn iptables(family: Family, rules: &[Rule]) -> Vec<String> {
    let command = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let told = CHAINS.iter().filter_map(|c| {
        let n = rules.iter().filter(|r| r.table == c.table && r.chain == c.name).count();
        let from = c.builtin.map_or(String::new(), |builtin| format!(", jump from {builtin}"));
        (n > 0).then(|| format!("chain {command} {} {}: {}{from}", c.table, c.name, count(n)))
    });
    told.collect()
}

/// Sets of ipset.
pub(crate) fn ipsets(stores: Stores, families: impl Iterator<Item = Family>) -> Vec<String> {
    let of = |family| stores.ipsets().map(move |kind| format!("set ipset {}", set_name(kind, family)));
    families.flat_map(of).collect()
}

/// Sets, maps and chains of our nft table.
pub(crate) fn nft(program: &Program, layout: Layout) -> Vec<String> {
    let (mut sets, mut out) = (Vec::new(), Vec::<(String, usize)>::new());
    let mut inside = false;
    for line in table_text(program, &NftContents::default(), layout).lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            out.push((name.to_owned(), 0));
            inside = true;
        } else if let Some((kind, name)) = line.strip_suffix(" {").and_then(|head| head.split_once(' '))
            && matches!(kind, "set" | "map")
        {
            sets.push(format!("{kind} nft {TABLE} {name}"));
        } else if line == "}" {
            inside = false;
        } else if let Some((_, n)) = out.last_mut().filter(|_| inside && !line.starts_with("type ")) {
            *n += 1;
        }
    }
    let chains = out.into_iter().map(|(name, n)| format!("chain nft {TABLE} {name}: {}", count(n)));
    sets.into_iter().chain(chains).collect()
}

fn count(n: usize) -> String {
    format!("{n} rule{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::netfilter::{
            rules_iptables::{Options, rules},
            rules_nft::chain_names,
        },
        model::{
            fixtures::{config, facts},
            kernel::FamilyProgram,
        },
    };

    fn program() -> Program {
        let (config, facts) = (config(), facts());
        let mut families = crate::model::ids::PerFamily::default();
        for (family, range) in config.ranges.iter() {
            let (ingress, node) = (config.ingress(family).unwrap(), *facts.primary.get(family).unwrap());
            families.set(family, Some(FamilyProgram { range: *range, ingress, node }));
        }
        let link = || vec!["eth0".into()];
        Program { mask: 0x3fff, families, masquerade_bridges: vec![], uplinks: link(), outside: link() }
    }

    #[test]
    fn every_chain_and_rule_is_counted() {
        let program = program();
        let rules = rules(&program, Family::V4, Options::default());
        let told = iptables(Family::V4, &rules);
        assert!(told.contains(&"chain iptables nat MESHLB-INGRESS: 1 rule".into()), "{told:?}");
        assert!(
            told.iter()
                .any(|t| t.starts_with("chain iptables filter MESHLB-FORWARD: 2 rules, jump from FORWARD")),
            "{told:?}"
        );
        let number =
            |t: &String| t.split_once(": ").unwrap().1.split(' ').next().unwrap().parse::<usize>().unwrap();
        assert_eq!(told.iter().map(number).sum::<usize>(), rules.len());
        let told = nft(&program, Layout::Whole);
        assert!(told.contains(&"map nft inet meshlb vips-4".into()), "{told:?}");
        let told: Vec<String> = told.into_iter().filter(|t| t.starts_with("chain ")).collect();
        let mut names: Vec<String> = chain_names(Some(&program), Layout::Whole);
        let mut seen: Vec<String> = told
            .iter()
            .map(|t| t.strip_prefix("chain nft inet meshlb ").unwrap().split(':').next().unwrap().to_owned())
            .collect();
        names.sort();
        seen.sort();
        assert_eq!(names, seen);
        assert!(told.iter().all(|t| number(t) > 0), "{told:?}");
    }
}
