//! Reading nf_tables by netlink: the generation, our chains and rules as hashes, the elements of our sets.
//!
//! No process is run for that, and only our own chains are read however many others a node has. Rules are
//! compared as the kernel holds them, without their counters, so no tool's way of writing them matters.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use nix::errno::Errno;

use super::{
    Parts, hash,
    sets::{Kind, NftContents, NftKey, nft_name},
};
use crate::{
    dataplane::{
        Error,
        nfnl::{
            Attributes, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, Nfnl, NlError, Request, attribute,
            attributes, be32, text,
        },
    },
    model::ids::Family,
};

pub(super) const NFNL_SUBSYS_NFTABLES: u8 = 10;
const MSG_GETTABLE: u8 = 1;
pub(super) const MSG_GETCHAIN: u8 = 4;
const MSG_GETRULE: u8 = 7;
const MSG_GETSET: u8 = 10;
const MSG_GETSETELEM: u8 = 13;
const MSG_GETGEN: u8 = 16;

/// `NFTA_*_TABLE` of chains, rules and sets; `NFTA_TABLE_NAME`; `NFTA_GEN_ID`.
pub(super) const FIRST: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
pub(super) const CHAIN_NAME: u16 = 3;
const SET_NAME: u16 = 2;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const TARGET_REVISION: u16 = 2;
const TARGET_INFO: u16 = 3;
const VERDICT_CHAIN: u16 = 2;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEM_KEY: u16 = 1;
const ELEM_DATA: u16 = 2;

const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_FORWARD: u32 = 2;

/// Our table's name in the kernel.
pub(super) const OURS: &str = "meshlb";

/// A base chain of somebody else at the input or forward hook.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ForeignChain {
    pub family: &'static str,
    pub table: String,
    pub name: String,
    /// `input` or `forward`.
    pub hook: &'static str,
    /// The family of iptables whose chain it is, or would be if somebody used that.
    pub iptables: Option<Family>,
}

/// Reads nf_tables in the network namespace of the thread that uses it first.
pub(crate) struct NftReader {
    socket: Option<Nfnl>,
}

impl fmt::Debug for NftReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NftReader").finish_non_exhaustive()
    }
}

pub(super) fn request(command: u8, family: u8, fill: impl FnOnce(&mut Attributes)) -> Request {
    let mut a = Attributes::default();
    fill(&mut a);
    Request { subsystem: NFNL_SUBSYS_NFTABLES, command, flags: 0, family, attributes: a.0 }
}

pub(super) fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

fn is(error: NlError, errno: Errno) -> bool {
    error == NlError::Kernel(errno as i32)
}

/// Whether it is not there, or the kernel has nothing in which it could be: the module is not loaded, or has no such family.
pub(super) fn is_absent(error: NlError) -> bool {
    [Errno::ENOENT, Errno::EINVAL, Errno::EOPNOTSUPP].into_iter().any(|errno| is(error, errno))
}

fn explain(what: &str, error: NlError) -> Error {
    let object = format!("nf_tables {what}");
    match error {
        NlError::Malformed => Error::Failed { object, reason: "the kernel's answer is malformed".into() },
        NlError::Kernel(n) => match Errno::from_raw(n) {
            Errno::EPERM | Errno::EACCES => Error::Permission { object },
            Errno::EINVAL | Errno::EOPNOTSUPP => Error::MissingFeature {
                feature: "nf_tables".into(),
                advice: "load the module nf_tables".into(),
            },
            e @ (Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM) => {
                Error::Transient { object, reason: e.desc().into() }
            }
            e => Error::Failed { object, reason: e.desc().into() },
        },
    }
}

impl NftReader {
    pub(crate) fn new() -> Self {
        Self { socket: None }
    }

    pub(super) fn with<T>(
        &mut self,
        what: &str,
        ask: impl FnOnce(&mut Nfnl) -> Result<T, NlError>,
    ) -> Result<T, Error> {
        if self.socket.is_none() {
            let open = Nfnl::open();
            self.socket =
                Some(open.map_err(|e| {
                    explain(what, e.raw_os_error().map_or(NlError::Malformed, NlError::Kernel))
                })?);
        }
        let Some(socket) = self.socket.as_mut() else { return Err(explain(what, NlError::Malformed)) };
        let result = ask(socket);
        if result.is_err() {
            self.socket = None;
        }
        result.map_err(|e| explain(what, e))
    }

    /// The number that every nf_tables transaction of this network namespace raises.
    pub(crate) fn generation(&mut self) -> Result<u32, Error> {
        let payload = self.with("generation", |s| s.get(&request(MSG_GETGEN, 0, |_| {})))?;
        attribute(&payload, FIRST).and_then(be32).ok_or_else(|| explain("generation", NlError::Malformed))
    }

    /// Whether the kernel has nf_tables.
    pub(crate) fn available(&mut self) -> bool {
        self.generation().is_ok()
    }

    /// Whether our table is there.
    pub(crate) fn has_table(&mut self) -> Result<bool, Error> {
        let get = request(MSG_GETTABLE, NFPROTO_INET, |a| a.text(FIRST, OURS));
        self.with("table inet meshlb", |s| match s.get(&get) {
            Ok(_) => Ok(true),
            // Without the module there is no table.
            Err(e) if is_absent(e) => Ok(false),
            Err(e) => Err(e),
        })
    }

    /// Names of all chains and named sets in our table.
    pub(crate) fn names(&mut self) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        for (message, name) in [(MSG_GETCHAIN, CHAIN_NAME), (MSG_GETSET, SET_NAME)] {
            let get = request(message, NFPROTO_INET, |a| a.text(FIRST, OURS));
            let found = self.with("names in table inet meshlb", |s| match s.dump(&get) {
                Err(e) if is_absent(e) => Ok(Vec::new()),
                other => other,
            })?;
            let ours = found.iter().filter(|p| attribute(p, FIRST).is_some_and(|table| text(table) == OURS));
            names.extend(ours.filter_map(|payload| attribute(payload, name).map(text)));
        }
        // Sets without a name of their own, which belong to rules.
        names.retain(|name| !name.starts_with("__"));
        Ok(names)
    }

    /// One chain's hook, type and policy as a hash; `None` where there is no such chain.
    fn chain(&mut self, family: u8, table: &str, name: &str) -> Result<Option<u64>, Error> {
        let get = request(MSG_GETCHAIN, family, |a| {
            a.text(FIRST, table);
            a.text(CHAIN_NAME, name);
        });
        self.with(&format!("chain {name}"), |s| match s.get(&get) {
            Ok(payload) => Ok(Some(chain_hash(&payload))),
            Err(e) if is_absent(e) => Ok(None),
            Err(e) => Err(e),
        })
    }

    pub(super) fn rules(
        &mut self,
        family: u8,
        table: &str,
        chain: Option<&str>,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let get = request(MSG_GETRULE, family, |a| {
            a.text(FIRST, table);
            if let Some(chain) = chain {
                a.text(RULE_CHAIN, chain);
            }
        });
        self.with(&format!("rules of table {table}"), |s| match s.dump(&get) {
            Err(e) if is_absent(e) => Ok(Vec::new()),
            other => other,
        })
    }

    /// Our table without its elements: one hash for each chain.
    pub(crate) fn table_parts(&mut self, chains: &[String]) -> Result<Parts, Error> {
        let mut parts = Parts::new();
        if !self.has_table()? {
            return Ok(parts);
        }
        for chain in chains {
            if let Some(hash) = self.chain(NFPROTO_INET, OURS, chain)? {
                parts.insert(format!("inet meshlb {chain}"), hash);
            }
        }
        for rule in self.rules(NFPROTO_INET, OURS, None)? {
            let chain = text(attribute(&rule, RULE_CHAIN).unwrap_or_default());
            let part = parts.entry(format!("inet meshlb {chain}")).or_insert(hash::START);
            *part = hash::bytes(*part, &rule_hash(&rule).to_le_bytes());
        }
        Ok(parts)
    }

    /// A chain that iptables-nft made, and the jumps to it, if the chain is there.
    pub(crate) fn iptables_chain(
        &mut self,
        family: Family,
        table: &str,
        chain: &str,
    ) -> Result<Option<u64>, Error> {
        let number = family_number(family);
        let Some(mut part) = self.chain(number, table, chain)? else { return Ok(None) };
        for rule in self.rules(number, table, Some(chain))? {
            part = hash::bytes(part, &rule_hash(&rule).to_le_bytes());
        }
        Ok(Some(part))
    }

    /// The rules of `builtin` that jump to `chain`, as a hash; `None` where there is none.
    pub(crate) fn iptables_jump(
        &mut self,
        family: Family,
        table: &str,
        builtin: &str,
        chain: &str,
    ) -> Result<Option<u64>, Error> {
        let rules = self.rules(family_number(family), table, Some(builtin))?;
        let ours = rules.iter().filter(|r| verdict_chain(r).as_deref() == Some(chain));
        Ok(ours.fold(None, |part, rule| {
            Some(hash::bytes(part.unwrap_or(hash::START), &rule_hash(rule).to_le_bytes()))
        }))
    }

    /// Whether a rule of iptables-nft in `builtin` of mangle, behind the jump to `ours`, writes any of these bits of the mark.
    pub(crate) fn marks_behind(
        &mut self,
        family: Family,
        builtin: &str,
        ours: &str,
        bits: u32,
    ) -> Result<bool, Error> {
        let rules = self.rules(family_number(family), "mangle", Some(builtin))?;
        let mut behind = rules.iter().skip_while(|rule| verdict_chain(rule).as_deref() != Some(ours));
        Ok(behind.any(|rule| mark_bits(rule) & bits != 0))
    }

    /// Whether iptables-nft's INPUT or FORWARD drops or rejects anything itself: by policy or by a rule.
    pub(crate) fn iptables_blocks(&mut self, family: Family) -> Result<bool, Error> {
        let number = family_number(family);
        for name in ["INPUT", "FORWARD"] {
            let get = request(MSG_GETCHAIN, number, |a| {
                a.text(FIRST, "filter");
                a.text(CHAIN_NAME, name);
            });
            let payload = self.with("chain", |s| match s.get(&get) {
                Err(e) if is_absent(e) => Ok(Vec::new()),
                other => other,
            })?;
            let drops = base_chain(&payload).is_some_and(|(_, drops)| drops);
            if drops || self.rules(number, "filter", Some(name))?.iter().any(|r| refuses_some(r)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What these sets of our table hold. A set that isn't there has no entry; keys that no element of ours
    /// can have are counted.
    pub(crate) fn contents(
        &mut self,
        sets: impl IntoIterator<Item = (Kind, Family)>,
    ) -> Result<(NftContents, usize), Error> {
        let (mut contents, mut strange) = (NftContents::new(), 0);
        for (kind, family) in sets {
            let name = nft_name(kind, family);
            let get = request(MSG_GETSETELEM, NFPROTO_INET, |a| {
                a.text(FIRST, OURS);
                a.text(ELEMENTS_SET, &name);
            });
            let dump = self.with(&format!("set {name}"), |s| match s.dump(&get) {
                Err(e) if is_absent(e) => Ok(None),
                other => other.map(Some),
            })?;
            let Some(dump) = dump else { continue };
            let keys = contents.entry((kind, family)).or_default();
            for message in dump {
                strange += read_elements(&message, kind, family, keys);
            }
        }
        Ok((contents, strange))
    }

    /// The value of one key: `None` where the set lacks it.
    pub(crate) fn lookup(
        &mut self,
        kind: Kind,
        family: Family,
        key: &NftKey,
    ) -> Result<Option<Option<u32>>, Error> {
        let name = nft_name(kind, family);
        let get = request(MSG_GETSETELEM, NFPROTO_INET, |a| {
            a.text(FIRST, OURS);
            a.text(ELEMENTS_SET, &name);
            a.nest(ELEMENTS, |a| {
                a.nest(LIST_ELEM, |a| a.nest(ELEM_KEY, |a| a.put(DATA_VALUE, &key.bytes())));
            });
        });
        let payload = self.with(&format!("set {name}, {key}"), |s| match s.get(&get) {
            Ok(payload) => Ok(payload),
            Err(e) if is(e, Errno::ENOENT) => Ok(Vec::new()),
            Err(e) => Err(e),
        })?;
        let mut keys = BTreeMap::new();
        read_elements(&payload, kind, family, &mut keys);
        Ok(keys.get(key).copied())
    }

    /// Base chains of others at input or forward that drop or reject what no rule of theirs accepted: by
    /// policy or by their last rule.
    pub(crate) fn dropping_chains(&mut self) -> Result<Vec<ForeignChain>, Error> {
        let mut out = Vec::new();
        for (number, family) in [(NFPROTO_INET, "inet"), (NFPROTO_IPV4, "ip"), (NFPROTO_IPV6, "ip6")] {
            let get = request(MSG_GETCHAIN, number, |_| {});
            let chains = self.with("chains", |s| match s.dump(&get) {
                Err(e) if is(e, Errno::EINVAL) || is(e, Errno::EOPNOTSUPP) => Ok(Vec::new()),
                other => other,
            })?;
            for payload in chains {
                let Some((hook, drops)) = base_chain(&payload) else { continue };
                let table = text(attribute(&payload, FIRST).unwrap_or_default());
                let name = text(attribute(&payload, CHAIN_NAME).unwrap_or_default());
                if table == OURS {
                    continue;
                }
                let builtin = table == "filter" && ["INPUT", "FORWARD"].contains(&&*name);
                let iptables = Family::ALL.into_iter().find(|f| builtin && family_number(*f) == number);
                if drops || self.rules(number, &table, Some(&name))?.last().is_some_and(|r| refuses_all(r)) {
                    out.push(ForeignChain { family, table, name, hook, iptables });
                }
            }
        }
        Ok(out)
    }
}

/// Hook and type; the policy, the handle and the use count are left to change.
fn chain_hash(payload: &[u8]) -> u64 {
    [CHAIN_HOOK, CHAIN_TYPE, CHAIN_POLICY]
        .into_iter()
        .filter_map(|kind| attribute(payload, kind))
        .fold(hash::START, hash::bytes)
}

pub(super) fn expressions(rule: &[u8]) -> impl Iterator<Item = (String, &[u8])> {
    attributes(attribute(rule, RULE_EXPRESSIONS).unwrap_or_default()).map(|(_, expression)| {
        (
            text(attribute(expression, EXPR_NAME).unwrap_or_default()),
            attribute(expression, EXPR_DATA).unwrap_or_default(),
        )
    })
}

/// What a rule does: its expressions without the counters' values.
fn rule_hash(rule: &[u8]) -> u64 {
    expressions(rule)
        .filter(|(name, _)| name != "counter")
        .fold(hash::START, |state, (name, data)| hash::bytes(hash::bytes(state, name.as_bytes()), data))
}

fn verdict(data: &[u8]) -> Option<&[u8]> {
    attribute(attribute(data, IMMEDIATE_DATA)?, DATA_VERDICT)
}

/// The chain that a rule jumps to.
pub(super) fn verdict_chain(rule: &[u8]) -> Option<String> {
    expressions(rule)
        .filter(|(name, _)| name == "immediate")
        .find_map(|(_, data)| attribute(verdict(data)?, VERDICT_CHAIN).map(text))
}

/// Whether a rule without any match drops or rejects.
fn refuses_all(rule: &[u8]) -> bool {
    let mut rest =
        expressions(rule).filter(|(name, _)| !["counter", "log", "limit"].contains(&name.as_str()));
    let (Some((name, data)), None) = (rest.next(), rest.next()) else { return false };
    // NF_DROP is 0.
    name == "reject"
        || (name == "immediate"
            && verdict(data).and_then(|v| attribute(v, VERDICT_CODE)).and_then(be32) == Some(0))
}

/// Whether a rule drops or rejects what it matches.
fn refuses_some(rule: &[u8]) -> bool {
    expressions(rule).any(|(name, data)| match name.as_str() {
        "reject" => true,
        "immediate" => verdict(data).and_then(|v| attribute(v, VERDICT_CODE)).and_then(be32) == Some(0),
        "target" => attribute(data, FIRST).is_some_and(|name| text(name) == "REJECT"),
        _ => false,
    })
}

/// Bits of the mark that a rule of iptables writes: `struct xt_mark_tginfo2` and `xt_connmark_tginfo1` and `2` of
/// `linux/netfilter/xt_mark.h` and `xt_connmark.h`. Both clear by a mask, and then put in by exclusive or what need not be within it.
fn mark_bits(rule: &[u8]) -> u32 {
    const RESTORE: u8 = 2;
    let bits = |(name, data): (String, &[u8])| {
        if name != "target" {
            return None;
        }
        let info = attribute(data, TARGET_INFO)?;
        let word = |at: usize| info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let revision = attribute(data, TARGET_REVISION).and_then(be32).unwrap_or(0);
        match text(attribute(data, FIRST)?).as_str() {
            "MARK" => Some(word(0)? | word(4)?),
            "CONNMARK" => {
                let from = word(4)?;
                let (put, mode) = match (info.get(12..)?, revision) {
                    ([mode, ..], 1) => (Some(from), *mode),
                    ([0, left, mode, ..], _) => (from.checked_shl((*left).into()), *mode),
                    ([_, right, mode, ..], _) => (from.checked_shr((*right).into()), *mode),
                    _ => return None,
                };
                (mode == RESTORE).then_some(word(8)? | put.unwrap_or(0))
            }
            _ => None,
        }
    };
    expressions(rule).filter_map(bits).fold(0, |all, bits| all | bits)
}

/// Hook of a base chain at input or forward, and whether its policy drops.
fn base_chain(payload: &[u8]) -> Option<(&'static str, bool)> {
    let hook = match attribute(attribute(payload, CHAIN_HOOK)?, HOOK_NUMBER).and_then(be32)? {
        NF_INET_LOCAL_IN => "input",
        NF_INET_FORWARD => "forward",
        _ => return None,
    };
    Some((hook, attribute(payload, CHAIN_POLICY).and_then(be32) == Some(0)))
}

/// Reads a message's elements into `keys`; returns how many are not of our kind.
fn read_elements(
    payload: &[u8],
    kind: Kind,
    family: Family,
    keys: &mut BTreeMap<NftKey, Option<u32>>,
) -> usize {
    let mut strange = 0;
    for (_, element) in attributes(attribute(payload, ELEMENTS).unwrap_or_default()) {
        let value = |what| attribute(element, what).and_then(|v| attribute(v, DATA_VALUE));
        let key = value(ELEM_KEY).and_then(|bytes| NftKey::parse(kind, family, bytes));
        match key {
            Some(key) => {
                let data = value(ELEM_DATA).and_then(|v| v.get(..4)?.try_into().ok()).map(u32::from_ne_bytes);
                keys.insert(key, data);
            }
            None => strange += 1,
        }
    }
    strange
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = (chain_hash(&bytes), rule_hash(&bytes), verdict_chain(&bytes), refuses_all(&bytes), base_chain(&bytes));
            for kind in Kind::ALL {
                let _ = read_elements(&bytes, kind, Family::V4, &mut BTreeMap::new());
            }
        }
    }
}
