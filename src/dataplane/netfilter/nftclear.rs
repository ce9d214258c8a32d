//! What of ours is in the tables of iptables-nft, and taking it away, by netlink: also where iptables-nft can't read a table
//! since somebody has put rules of nft's own into it, and where no program is installed any more.

use super::nftread::{
    CHAIN_NAME, FIRST, MSG_GETCHAIN, NFNL_SUBSYS_NFTABLES, NftReader, OURS, RULE_CHAIN, RULE_HANDLE,
    expressions, family_number, is_absent, request, verdict_chain,
};
use crate::{
    dataplane::{
        Error,
        nfnl::{NFPROTO_INET, Request, attribute, text},
    },
    model::ids::Family,
};

const MSG_DELTABLE: u8 = 2;
const MSG_DELCHAIN: u8 = 5;
const MSG_DELRULE: u8 = 8;

/// How all our chains in the tables of iptables begin.
const PREFIX: &str = "MESHLB-";

/// A rule that leads to one of our chains and stands in a chain that is not ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Jump {
    pub(super) from: String,
    pub(super) to: String,
    /// Whether it is the jump that we write: with a comment and for every packet.
    pub(super) plain: bool,
    handle: Vec<u8>,
}

/// What of ours is in one table.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Ours {
    pub(super) chains: Vec<String>,
    pub(super) jumps: Vec<Jump>,
}

impl Ours {
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }
}

impl NftReader {
    /// Our chains in this table, and the jumps to them, in the order in which they stand.
    pub(super) fn ours(&mut self, family: Family, table: &str) -> Result<Ours, Error> {
        let number = family_number(family);
        let all = self.with("chains", |s| match s.dump(&request(MSG_GETCHAIN, number, |_| {})) {
            Err(e) if is_absent(e) => Ok(Vec::new()),
            other => other,
        })?;
        let here = all.iter().filter(|p| attribute(p, FIRST).is_some_and(|t| text(t) == table));
        let names = here.filter_map(|p| attribute(p, CHAIN_NAME).map(text));
        let chains: Vec<_> = names.filter(|name| name.starts_with(PREFIX)).collect();
        if chains.is_empty() {
            // The kernel lets nobody delete a chain that a rule leads to.
            return Ok(Ours::default());
        }
        let rules = self.rules(number, table, None)?;
        Ok(Ours { chains, jumps: rules.iter().filter_map(|rule| jump(rule)).collect() })
    }

    /// Deletes these jumps and chains of one table in one transaction.
    pub(super) fn delete(&mut self, family: Family, table: &str, ours: &Ours) -> Result<(), Error> {
        let number = family_number(family);
        let mut requests: Vec<Request> = Vec::new();
        for jump in &ours.jumps {
            requests.push(request(MSG_DELRULE, number, |a| {
                a.text(FIRST, table);
                a.text(RULE_CHAIN, &jump.from);
                a.put(RULE_HANDLE, &jump.handle);
            }));
        }
        // Emptied first, as they lead to each other.
        for chain in &ours.chains {
            requests.push(request(MSG_DELRULE, number, |a| {
                a.text(FIRST, table);
                a.text(RULE_CHAIN, chain);
            }));
        }
        for chain in &ours.chains {
            requests.push(request(MSG_DELCHAIN, number, |a| {
                a.text(FIRST, table);
                a.text(CHAIN_NAME, chain);
            }));
        }
        let what = format!("chains MESHLB-… of table {family} {table}");
        self.with(&what, |s| s.batch(NFNL_SUBSYS_NFTABLES, &requests))
    }

    /// Deletes our own table; a missing one is no error.
    pub(super) fn delete_table(&mut self) -> Result<(), Error> {
        let request = request(MSG_DELTABLE, NFPROTO_INET, |a| a.text(FIRST, OURS));
        self.with("table inet meshlb", |s| match s.batch(NFNL_SUBSYS_NFTABLES, &[request]) {
            Err(e) if is_absent(e) => Ok(()),
            other => other,
        })
    }
}

fn jump(rule: &[u8]) -> Option<Jump> {
    let to = verdict_chain(rule).filter(|to| to.starts_with(PREFIX))?;
    let from = text(attribute(rule, RULE_CHAIN)?);
    if from.starts_with(PREFIX) {
        return None;
    }
    let plain = expressions(rule).all(|(name, data)| match name.as_str() {
        "counter" | "immediate" => true,
        "match" => attribute(data, FIRST).is_some_and(|name| text(name) == "comment"),
        _ => false,
    });
    Some(Jump { from, to, plain, handle: attribute(rule, RULE_HANDLE)?.to_vec() })
}
