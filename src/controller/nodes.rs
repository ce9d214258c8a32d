//! What the nodes' MeshNodes come to for a service: the condition `Programmed`. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::status::{NODE_FAILING, Programmed};
use crate::{
    api::{
        MeshNodeStatus,
        mesh_node::{HELD_OFF, NOT_UNDERSTOOD, SERVING},
    },
    model::ids::ServiceKey,
};

/// So many nodes are named in a condition, at most.
const NAMED: usize = 3;

/// What of a MeshNode matters here.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Said {
    /// The uid of the Node that it belongs to.
    owner: Option<String>,
    state: State,
    /// Services that fail, as far as they are named.
    failing: BTreeMap<ServiceKey, Failure>,
    /// Whether more fail than are named.
    more: bool,
}

/// Why a node does not serve a service.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Failure {
    reason: String,
    /// Empty where only its name is given.
    message: String,
    /// Of which spec alone that is said.
    generation: Option<i64>,
}

impl Failure {
    /// Whether something is wrong on the node, and not with a spec.
    fn is_local(&self) -> bool {
        self.reason != NOT_UNDERSTOOD
    }

    /// Whether it is said of the spec as it is now. A node that is down says the same for ever.
    fn is_of(&self, now: Option<i64>) -> bool {
        self.is_local() || self.generation.is_none() || now.is_none() || self.generation == now
    }

    fn text(&self) -> String {
        match (&*self.message, self.generation) {
            ("", Some(generation)) => format!("its agent refuses generation {generation}: see its log"),
            (message, _) => message.to_owned(),
        }
    }
}

/// How a node is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum State {
    /// Its agent has not said anything yet.
    #[default]
    Silent,
    /// It serves, but for what it names.
    Serving,
    /// Nothing new is programmed there.
    Failing,
    /// An uninstallation is under way.
    HeldOff,
}

impl Said {
    /// What a MeshNode says.
    pub fn new(owner: Option<String>, status: &MeshNodeStatus) -> Self {
        let state = match status.conditions.iter().find(|c| c.type_ == SERVING) {
            None => State::Silent,
            Some(c) if c.status == "True" => State::Serving,
            Some(c) if c.reason == HELD_OFF => State::HeldOff,
            Some(_) => State::Failing,
        };
        let named = status.failing.services.iter().map(|f| {
            let (reason, message) = (f.reason.clone(), f.message.clone());
            let failure = Failure { reason, message, generation: f.generation };
            (ServiceKey::new(f.namespace.as_str(), f.name.as_str()), failure)
        });
        let refused = status.not_understood.iter().flat_map(|list| &list.services).map(|spec| {
            let (reason, generation) = (NOT_UNDERSTOOD.to_owned(), Some(spec.generation));
            let failure = Failure { reason, message: String::new(), generation };
            (ServiceKey::new(spec.namespace.as_str(), spec.name.as_str()), failure)
        });
        // What is said of a service in full counts.
        let failing: BTreeMap<_, _> = refused.chain(named).collect();
        let exceeds = |count: i32, named: usize| usize::try_from(count).is_ok_and(|count| count > named);
        let more = match &status.not_understood {
            Some(list) => {
                let ours = failing.values().filter(|failure| failure.is_local()).count();
                exceeds(status.failing.count, ours) || exceeds(list.count, list.services.len())
            }
            // An older agent counts both as one.
            None => exceeds(status.failing.count, status.failing.services.len()),
        };
        Self { owner, state, failing, more }
    }
}

/// For which services another condition may hold.
#[derive(PartialEq, Eq, Debug)]
pub enum Touched {
    /// For these.
    Some(BTreeSet<ServiceKey>),
    /// For all.
    All,
}

/// All nodes.
#[derive(Default, Debug)]
pub struct Nodes {
    said: BTreeMap<String, Said>,
    /// The Nodes that there are, with their uids.
    uids: BTreeMap<String, String>,
    /// By service, the nodes that name it.
    by_service: HashMap<ServiceKey, BTreeSet<String>>,
    /// Nodes that fail as a whole.
    failing: BTreeSet<String>,
    /// Nodes on which something is wrong for single services.
    faulty: BTreeSet<String>,
    /// Nodes that name only some of what fails.
    more: BTreeSet<String>,
    /// Nodes that say anything about services.
    counted: BTreeSet<String>,
    /// No agent is there any more, whatever they have said.
    deserted: bool,
}

impl Nodes {
    /// Takes in a MeshNode, or that it is gone.
    pub fn put_said(&mut self, name: &str, said: Option<Said>) -> Touched {
        self.change(name, |nodes| match said {
            Some(said) => drop(nodes.said.insert(name.to_owned(), said)),
            None => drop(nodes.said.remove(name)),
        })
    }

    /// Takes in a Node's uid, or that it is gone.
    pub fn put_node(&mut self, name: &str, uid: Option<String>) -> Touched {
        self.change(name, |nodes| match uid {
            Some(uid) => drop(nodes.uids.insert(name.to_owned(), uid)),
            None => drop(nodes.uids.remove(name)),
        })
    }

    /// Takes in whether no agent is there any more.
    pub fn set_deserted(&mut self, deserted: bool) -> Touched {
        let before = std::mem::replace(&mut self.deserted, deserted);
        if before == deserted { Touched::Some(BTreeSet::new()) } else { Touched::All }
    }

    fn nothing_fails(&self) -> bool {
        // What is not understood keeps no agent from being ready, and is said for ever by one that is down.
        self.failing.is_empty() && self.faulty.is_empty()
    }

    /// Names of all MeshNodes.
    pub fn said_names(&self) -> impl Iterator<Item = &String> {
        self.said.keys()
    }

    /// Names of all Nodes.
    pub fn node_names(&self) -> impl Iterator<Item = &String> {
        self.uids.keys()
    }

    /// How many nodes are in each state, stale reports left out.
    pub fn states(&self) -> BTreeMap<&'static str, usize> {
        let mut out = BTreeMap::from([("serving", 0), ("failing", 0), ("held_off", 0)]);
        for said in self.said.keys().filter_map(|name| self.valid(name)) {
            let state = match said.state {
                State::Silent => continue,
                State::Serving if said.failing.is_empty() => "serving",
                State::Serving | State::Failing => "failing",
                State::HeldOff => "held_off",
            };
            *out.entry(state).or_default() += 1;
        }
        out
    }

    /// A MeshNode outlives its Node for a moment, and a Node of that name that came later is another one.
    fn valid(&self, name: &str) -> Option<&Said> {
        let said = self.said.get(name)?;
        let uid = self.uids.get(name)?;
        said.owner.as_ref().is_none_or(|owner| owner == uid).then_some(said)
    }

    /// The same, of a node that says anything about services.
    fn counts(&self, name: &str) -> Option<&Said> {
        self.valid(name).filter(|said| matches!(said.state, State::Serving | State::Failing))
    }

    fn change(&mut self, name: &str, change: impl FnOnce(&mut Self)) -> Touched {
        let before = self.counts(name).cloned();
        let any = !self.counted.is_empty();
        let well = self.nothing_fails();
        change(self);
        let after = self.counts(name).cloned();
        if before == after {
            return Touched::Some(BTreeSet::new());
        }
        let named = |said: &Option<Said>| said.as_ref().map(|s| s.failing.clone()).unwrap_or_default();
        let (old, new) = (named(&before), named(&after));
        for key in old.keys() {
            if let Some(names) = self.by_service.get_mut(key) {
                names.remove(name);
                if names.is_empty() {
                    self.by_service.remove(key);
                }
            }
        }
        for key in new.keys() {
            self.by_service.entry(key.clone()).or_default().insert(name.to_owned());
        }
        let is = |test: fn(&Said) -> bool| after.as_ref().is_some_and(test);
        let mut all = put(&mut self.failing, name, is(|said| said.state == State::Failing));
        all |= put(&mut self.more, name, is(|said| said.more));
        put(&mut self.faulty, name, is(|said| said.failing.values().any(Failure::is_local)));
        put(&mut self.counted, name, after.is_some());
        let all = all || (self.deserted && well != self.nothing_fails());
        if all || any == self.counted.is_empty() {
            return Touched::All;
        }
        let keys = old.keys().chain(new.keys());
        Touched::Some(keys.filter(|key| old.get(*key) != new.get(*key)).cloned().collect())
    }

    /// What the condition of a service is to say, whose spec is of that generation.
    pub fn programmed(&self, key: &ServiceKey, generation: Option<i64>) -> Programmed {
        let of = |name: &String| self.said.get(name).and_then(|said| said.failing.get(key));
        let named = self.by_service.get(key).into_iter().flatten();
        let named: BTreeMap<&String, &Failure> = named
            .filter_map(|name| Some((name, of(name)?)))
            .filter(|(_, failure)| failure.is_of(generation))
            .collect();
        let whole = self.failing.iter().filter(|name| !named.contains_key(name));
        let count = named.len() + whole.clone().count();
        if count > 0 {
            let reason = named.values().next().map_or(NODE_FAILING, |failure| &failure.reason);
            let first = named.iter().map(|(name, failure)| format!("{name}: {}", failure.text()));
            // Why it fails is in its MeshNode: here it would be written into every service.
            let whole = whole.map(|name| format!("{name}: see its MeshNode"));
            let mut parts: Vec<String> = first.chain(whole).take(NAMED).collect();
            if count > parts.len() {
                parts.push(format!("and {} more", count - parts.len()));
            }
            let s = if count == 1 { " does" } else { "s do" };
            let message = format!("{count} node{s} not serve it as it should be: {}", parts.join("; "));
            return Programmed { status: "False", reason: reason.to_owned(), message };
        }
        // One that says what fails is there, though it is not ready for that.
        if self.deserted && self.nothing_fails() {
            let message =
                "no agent is ready, so nobody programs the nodes: see the agents' DaemonSet".to_owned();
            return Programmed { status: "Unknown", reason: "NoAgents".to_owned(), message };
        }
        if self.counted.is_empty() {
            let message = "no agent has reported yet: kubectl get meshnodes".to_owned();
            return Programmed { status: "Unknown", reason: "NoAgents".to_owned(), message };
        }
        if let Some(first) = self.more.first() {
            let others = self.more.len() - 1;
            let and = if others > 0 { format!(" (and {others} more)") } else { String::new() };
            let message =
                format!("more services fail on node {first}{and} than it can name: this may be one");
            return Programmed { status: "Unknown", reason: "TooManyFailures".to_owned(), message };
        }
        Programmed::good()
    }
}

/// Whether that changes anything.
fn put(set: &mut BTreeSet<String>, name: &str, is: bool) -> bool {
    if is { set.insert(name.to_owned()) } else { set.remove(name) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::mesh_node::FailingService,
        meshnode::{Fault, Report, State as Whole},
        model::refusal::Refusal,
    };

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    fn some(names: &[&str]) -> Touched {
        Touched::Some(names.iter().map(|name| key(name)).collect())
    }

    fn said(node: &str, state: Whole, failing: &[&str]) -> Option<Said> {
        let fault = |name: &&str| {
            let message = format!("published port 30080/TCP is held ({name})");
            (key(name), Fault { reason: "PublishedPortHeld", message })
        };
        let named: Vec<_> = failing.iter().map(fault).collect();
        let report = Report { count: named.len(), named, ..Report::of(state) };
        Some(Said::new(Some(format!("uid-{node}")), &report.status(None, jiff::Timestamp::UNIX_EPOCH)))
    }

    fn text(nodes: &Nodes, name: &str) -> String {
        text_of(nodes, name, 2)
    }

    /// The same of a spec of that generation.
    fn text_of(nodes: &Nodes, name: &str, generation: i64) -> String {
        let p = nodes.programmed(&key(name), Some(generation));
        format!("{} {}: {}", p.status, p.reason, p.message)
    }

    /// Nodes that serve, all of them.
    fn serving(names: &[&str]) -> Nodes {
        let mut nodes = Nodes::default();
        for name in names {
            nodes.put_node(name, Some(format!("uid-{name}")));
            nodes.put_said(name, said(name, Whole::Serving, &[]));
        }
        nodes
    }

    #[test]
    fn a_service_is_programmed_where_nobody_names_it() {
        let mut nodes = Nodes::default();
        assert!(text(&nodes, "a").starts_with("Unknown NoAgents"));
        assert_eq!(nodes.put_node("n1", Some("uid-n1".into())), some(&[]));
        assert_eq!(nodes.put_said("n1", said("n1", Whole::Serving, &[])), Touched::All);
        assert!(text(&nodes, "a").starts_with("True Programmed"));
        // A thousand more that are well touch nobody.
        assert_eq!(nodes.put_node("n2", Some("uid-n2".into())), some(&[]));
        assert_eq!(nodes.put_said("n2", said("n2", Whole::Serving, &[])), some(&[]));
        assert_eq!(nodes.put_said("n2", said("n2", Whole::Serving, &["a", "b"])), some(&["a", "b"]));
        assert_eq!(
            text(&nodes, "a"),
            "False PublishedPortHeld: 1 node does not serve it as it should be: n2: published port 30080/TCP is held (a)"
        );
        assert!(text(&nodes, "c").starts_with("True"));
        assert_eq!(nodes.put_said("n2", said("n2", Whole::Serving, &["b"])), some(&["a"]));
        assert!(text(&nodes, "a").starts_with("True"));
        assert_eq!(nodes.states(), [("serving", 1), ("failing", 1), ("held_off", 0)].into());
        assert_eq!(nodes.put_said("n2", None), some(&["b"]));
    }

    #[test]
    fn three_nodes_are_named_and_all_are_counted() {
        let names = ["n1", "n2", "n3", "n4", "n5"];
        let mut nodes = serving(&names);
        for name in names {
            nodes.put_said(name, said(name, Whole::Serving, &["a"]));
        }
        let message = text(&nodes, "a");
        assert!(message.starts_with("False PublishedPortHeld: 5 nodes do not serve it"), "{message}");
        assert!(
            message.contains("n3: ") && !message.contains("n4: ") && message.ends_with("; and 2 more"),
            "{message}"
        );
    }

    #[test]
    fn a_node_that_fails_as_a_whole_is_told_of_every_service() {
        let mut nodes = serving(&["n1", "n2"]);
        let failed = |why: &str| said("n2", Whole::ProgrammingFailed(why.into()), &["b"]);
        assert_eq!(nodes.put_said("n2", failed("no memory")), Touched::All);
        assert_eq!(
            text(&nodes, "a"),
            "False NodeFailing: 1 node does not serve it as it should be: n2: see its MeshNode"
        );
        assert!(
            text(&nodes, "b").starts_with("False PublishedPortHeld: 1 node does"),
            "{}",
            text(&nodes, "b")
        );
        // Another reason of the same is no reason to write all services.
        assert_eq!(nodes.put_said("n2", failed("still none")), some(&[]));
        // Who holds off is not asked.
        assert_eq!(
            nodes.put_said("n2", said("n2", Whole::HeldOff { asked: "u1".into(), cleaned: Ok(()) }, &[])),
            Touched::All
        );
        assert!(text(&nodes, "a").starts_with("True"));
        assert_eq!(
            nodes.put_said("n1", said("n1", Whole::HeldOff { asked: "u1".into(), cleaned: Ok(()) }, &[])),
            Touched::All
        );
        assert!(text(&nodes, "a").starts_with("Unknown NoAgents"));
        assert_eq!(nodes.states()["held_off"], 2);
    }

    #[test]
    fn without_any_agent_nothing_that_was_said_counts() {
        let mut nodes = serving(&["n1", "n2"]);
        assert_eq!(nodes.set_deserted(false), some(&[]));
        assert_eq!(nodes.set_deserted(true), Touched::All);
        assert!(text(&nodes, "a").starts_with("Unknown NoAgents: no agent is ready"));
        assert_eq!(nodes.set_deserted(true), some(&[]));
        // Not ready, since something fails: it is there.
        assert_eq!(nodes.put_said("n2", said("n2", Whole::Serving, &["b"])), Touched::All);
        assert!(text(&nodes, "b").starts_with("False PublishedPortHeld"));
        assert!(text(&nodes, "a").starts_with("True"));
        assert_eq!(nodes.put_said("n2", said("n2", Whole::Serving, &[])), Touched::All);
        assert_eq!(nodes.set_deserted(false), Touched::All);
        assert!(text(&nodes, "a").starts_with("True"));
    }

    #[test]
    fn what_is_not_named_is_not_guessed() {
        let mut nodes = serving(&["n1"]);
        let named = vec![(key("a"), Fault { reason: "KernelRefused", message: "full".into() })];
        let report = Report { count: 51, named, ..Report::of(Whole::Serving) };
        let status = report.status(None, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(nodes.put_said("n1", Some(Said::new(None, &status))), Touched::All);
        assert!(text(&nodes, "a").starts_with("False KernelRefused"));
        assert!(text(&nodes, "b").starts_with("Unknown TooManyFailures"), "{}", text(&nodes, "b"));
    }

    /// A node that does not understand generation 2 of these.
    fn refusing(names: impl Iterator<Item = String>) -> Option<Said> {
        let refusal = || Refusal { generation: 2, why: "spec.later: is not a field here".into() };
        let not_understood = std::sync::Arc::new(names.map(|name| (key(&name), refusal())).collect());
        let report = Report { not_understood, ..Report::of(Whole::Serving) };
        Some(Said::new(None, &report.status(None, jiff::Timestamp::UNIX_EPOCH)))
    }

    #[test]
    fn what_is_not_understood_is_said_of_that_spec_alone() {
        let mut nodes = serving(&["n1", "n2"]);
        let refuses = || refusing(["a".to_owned()].into_iter());
        assert_eq!(nodes.put_said("n2", refuses()), some(&["a"]));
        assert_eq!(
            text(&nodes, "a"),
            "False NotUnderstood: 1 node does not serve it as it should be: n2: spec.later: is not a field here"
        );
        // Mended, while that node is down.
        assert!(text_of(&nodes, "a", 3).starts_with("True Programmed"), "{}", text_of(&nodes, "a", 3));
        // What is wrong on a node is so whatever the spec is.
        nodes.put_said("n1", said("n1", Whole::Serving, &["a"]));
        assert!(text_of(&nodes, "a", 3).starts_with("False PublishedPortHeld: 1 node does"));
        // Nor does it look as if an agent were there.
        nodes.put_said("n1", said("n1", Whole::Serving, &[]));
        nodes.set_deserted(true);
        assert!(text_of(&nodes, "a", 3).starts_with("Unknown NoAgents"), "{}", text_of(&nodes, "a", 3));
    }

    #[test]
    fn a_spec_that_many_services_have_is_refused_for_those_alone() {
        let mut nodes = serving(&["n1"]);
        let many: BTreeSet<ServiceKey> = (0..1000).map(|i| key(&format!("s{i:04}"))).collect();
        let refuses = |count: usize| refusing((0..count).map(|i| format!("s{i:04}")));
        assert_eq!(nodes.put_said("n1", refuses(1000)), Touched::Some(many));
        assert!(text(&nodes, "a").starts_with("True Programmed"), "{}", text(&nodes, "a"));
        assert!(text(&nodes, "s0049").ends_with("n1: spec.later: is not a field here"));
        let unexplained = text(&nodes, "s0999");
        assert!(
            unexplained.starts_with("False NotUnderstood")
                && unexplained.ends_with("n1: its agent refuses generation 2: see its log"),
            "{unexplained}"
        );
        // Of what is not in the list nobody knows.
        assert_eq!(nodes.put_said("n1", refuses(1001)), Touched::All);
        assert!(text(&nodes, "s1000").starts_with("Unknown TooManyFailures"));
        // An agent of an earlier version counts both as one.
        let mut status = Report::of(Whole::Serving).status(None, jiff::Timestamp::UNIX_EPOCH);
        status.failing.count = 1;
        status.failing.services = vec![FailingService {
            namespace: "default".into(),
            name: "a".into(),
            reason: NOT_UNDERSTOOD.into(),
            message: "no".into(),
            generation: None,
        }];
        nodes.put_said("n1", Some(Said::new(None, &status)));
        assert!(text(&nodes, "a").starts_with("False NotUnderstood"));
        assert!(text(&nodes, "b").starts_with("True Programmed"), "{}", text(&nodes, "b"));
    }

    #[test]
    fn reports_of_nodes_that_are_gone_are_ignored() {
        let mut nodes = serving(&["n1", "n2"]);
        nodes.put_said("n2", said("n2", Whole::Serving, &["a"]));
        assert_eq!(nodes.put_node("n2", None), some(&["a"]));
        assert!(text(&nodes, "a").starts_with("True"));
        // Another machine of that name.
        assert_eq!(nodes.put_node("n2", Some("uid-new".into())), some(&[]));
        assert!(text(&nodes, "a").starts_with("True"));
        assert_eq!(nodes.put_said("n2", said("n2", Whole::StartFailed("no ip_vs".into()), &[])), some(&[]));
        assert_eq!(nodes.put_node("n2", Some("uid-n2".into())), Touched::All);
        assert!(text(&nodes, "a").starts_with("False NodeFailing"));
    }
}
