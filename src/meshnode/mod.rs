//! What an agent says about its node in its `MeshNode`: pure here, written by [`writer`].
//!
//! ```text
//! agent's loop ─► Report ─► writer ─► MeshNode ─► controller ─► condition Programmed
//! ConfigMap meshlb-uninstall ─► writer ─► agent's loop: clean up and hold off
//! ```

pub mod writer;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::{
    api::{
        mesh_node::{
            ADDRESSES, CLEANED_UP, Failing, FailingService, HELD_OFF, MeshNodeStatus, NAMED, NOT_UNDERSTOOD,
            NotUnderstood, REFUSALS, RefusedSpec, SERVING,
        },
        values::IpText,
    },
    model::{ids::ServiceKey, refusal::Refusal},
};

/// Name of the ConfigMap, in the agents' own namespace, that asks all of them to clean up and hold off.
pub const UNINSTALL: &str = "meshlb-uninstall";

/// A whole node that fails is reported after this long: most of what fails is tried again and done within it.
const SUSTAINED: Duration = Duration::from_secs(30);
/// `maxLength` of a failing service's message.
const MESSAGE: usize = 512;

/// Why a node does not serve a service as it should.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// In one word; docs/kubernetes.md lists them.
    pub reason: &'static str,
    /// In a sentence.
    pub message: String,
}

/// How a node is as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// The kernel is as it should be, but for the failing services.
    Serving,
    /// The kernel could not be brought up to date, for so long that it has to be told.
    ProgrammingFailed(String),
    /// The agent could not start.
    StartFailed(String),
    /// It holds off for an uninstallation.
    HeldOff {
        /// Uid of the ConfigMap that asks for it: what was said to an earlier one is no answer.
        asked: Arc<str>,
        /// What could not be removed, if anything.
        cleaned: Result<(), String>,
    },
}

/// What there is to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// How netfilter is programmed, where that is known.
    pub renderer: String,
    /// Addresses that published ports answer on, in order.
    pub addresses: Vec<IpAddr>,
    /// How many services fail for what is wrong on the node.
    pub count: usize,
    /// The first of them.
    pub named: Vec<(ServiceKey, Fault)>,
    /// Services that this agent does not accept and the controller does.
    pub not_understood: Arc<BTreeMap<ServiceKey, Refusal>>,
    /// All of it together.
    pub state: State,
}

impl Report {
    /// Of an agent that serves nothing.
    pub fn of(state: State) -> Self {
        Self {
            renderer: String::new(),
            addresses: Vec::new(),
            count: 0,
            named: Vec::new(),
            not_understood: Arc::default(),
            state,
        }
    }

    /// Those of the node first: of the others the names are in a list of their own.
    fn failing_services(&self) -> Vec<FailingService> {
        let failing = |key: &ServiceKey, reason: &str, message: &str, generation| FailingService {
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            reason: reason.to_owned(),
            message: cut(message, MESSAGE),
            generation,
        };
        let ours = self.named.iter().map(|(key, fault)| failing(key, fault.reason, &fault.message, None));
        let is_named = |key: &ServiceKey| self.named.iter().any(|(named, _)| named == key);
        let others = self.not_understood.iter().filter(|(key, _)| !is_named(key));
        let others =
            others.map(|(key, refusal)| failing(key, NOT_UNDERSTOOD, &refusal.why, Some(refusal.generation)));
        ours.chain(others).take(NAMED).collect()
    }

    fn refused_specs(&self) -> Option<NotUnderstood> {
        let spec = |(key, refusal): (&ServiceKey, &Refusal)| RefusedSpec {
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            generation: refusal.generation,
        };
        let count = self.not_understood.len();
        (count > 0).then(|| NotUnderstood {
            count: i32::try_from(count).unwrap_or(i32::MAX),
            services: self.not_understood.iter().take(REFUSALS).map(spec).collect(),
        })
    }

    /// Whether it has to be known at once.
    fn is_urgent(&self) -> bool {
        matches!(self.state, State::StartFailed(_) | State::HeldOff { .. })
    }

    /// The status that says it; `old` is the one that is there.
    pub fn status(&self, old: Option<&MeshNodeStatus>, now: jiff::Timestamp) -> MeshNodeStatus {
        let before = old.map(|old| old.conditions.as_slice()).unwrap_or_default();
        let condition = |type_: &str, true_: bool, reason: &str, message: &str| {
            let status = if true_ { "True" } else { "False" };
            let same = before.iter().find(|c| c.type_ == type_ && c.status == status);
            Condition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message: cut(message, MESSAGE),
                observed_generation: None,
                last_transition_time: same.map_or(Time(now), |c| c.last_transition_time.clone()),
            }
        };
        let conditions = match &self.state {
            State::Serving => {
                let message = "the kernel is as it should be, but for failing services";
                vec![condition(SERVING, true, "Serving", message)]
            }
            State::ProgrammingFailed(why) => vec![condition(SERVING, false, "ProgrammingFailed", why)],
            State::StartFailed(why) => vec![condition(SERVING, false, "StartFailed", why)],
            State::HeldOff { asked, cleaned } => {
                let held = condition(SERVING, false, HELD_OFF, "an uninstallation is under way");
                let cleaned = match cleaned {
                    Ok(()) => {
                        let message = format!(
                            "nothing of meshlb is left in this node's kernel; asked by ConfigMap {UNINSTALL}, uid {asked}"
                        );
                        condition(CLEANED_UP, true, CLEANED_UP, &message)
                    }
                    Err(why) => condition(CLEANED_UP, false, "CleanupFailed", why),
                };
                vec![held, cleaned]
            }
        };
        MeshNodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            renderer: self.renderer.clone(),
            addresses: self.addresses.iter().take(ADDRESSES).map(|ip| IpText(ip.to_string())).collect(),
            failing: Failing {
                count: i32::try_from(self.count).unwrap_or(i32::MAX),
                services: self.failing_services(),
            },
            not_understood: self.refused_specs(),
            conditions,
        }
    }
}

fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// What fails on a node, as the agent's loop finds it.
#[derive(Default, Debug)]
pub struct Faults {
    /// What keeps a service from being served although the kernel took everything.
    standing: BTreeMap<ServiceKey, Fault>,
    /// Services that the kernel refused part of, at the last turn.
    refused: BTreeMap<ServiceKey, Fault>,
    /// Services that this agent does not accept and the controller does.
    not_understood: Arc<BTreeMap<ServiceKey, Refusal>>,
    /// Why the last turn failed as a whole, and since when turns have.
    whole: Option<(String, Instant)>,
}

impl Faults {
    /// A service has been settled.
    pub fn settled(&mut self, key: &ServiceKey, fault: Option<Fault>) {
        match fault {
            Some(fault) => drop(self.standing.insert(key.clone(), fault)),
            None => drop(self.standing.remove(key)),
        }
    }

    /// These services, and no others, are accepted by the controller and not here, for that reason.
    pub fn not_understood(&mut self, services: BTreeMap<ServiceKey, Refusal>) {
        self.not_understood = Arc::new(services);
    }

    /// A turn has ended: what was refused, by service where it was one's.
    pub fn turned(&mut self, refused: impl Iterator<Item = (Option<ServiceKey>, String)>, now: Instant) {
        self.refused.clear();
        let mut whole = None;
        for (owner, message) in refused {
            match owner {
                Some(key) => {
                    self.refused.entry(key).or_insert(Fault { reason: "KernelRefused", message });
                }
                None => whole = whole.or(Some(message)),
            }
        }
        match whole {
            Some(message) => self.failed(&message, now),
            None => self.whole = None,
        }
    }

    /// A turn could not even be prepared.
    pub fn failed(&mut self, message: &str, now: Instant) {
        let since = self.whole.as_ref().map_or(now, |(_, since)| *since);
        self.whole = Some((message.to_owned(), since));
    }

    /// How many fail for what is wrong on the node, and the first of them.
    pub fn named(&self) -> (usize, Vec<(ServiceKey, Fault)>) {
        // Of two reasons for one service the later one here counts.
        let all: BTreeMap<&ServiceKey, &Fault> =
            [&self.standing, &self.refused].into_iter().flatten().collect();
        let first = all.iter().take(NAMED);
        (all.len(), first.map(|(key, fault)| ((*key).clone(), (*fault).clone())).collect())
    }

    /// Services that this agent does not accept and the controller does.
    pub fn refusals(&self) -> Arc<BTreeMap<ServiceKey, Refusal>> {
        self.not_understood.clone()
    }

    /// How the node is as a whole.
    pub fn state(&self, now: Instant) -> State {
        match &self.whole {
            Some((message, since)) if now.duration_since(*since) >= SUSTAINED => {
                State::ProgrammingFailed(message.clone())
            }
            _ => State::Serving,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    fn fault(reason: &'static str) -> Fault {
        Fault { reason, message: "x".repeat(600) }
    }

    fn at(second: i64) -> jiff::Timestamp {
        jiff::Timestamp::from_second(second).unwrap()
    }

    fn said(status: &MeshNodeStatus) -> Vec<String> {
        let one = |c: &Condition| format!("{} {} {}", c.type_, c.status, c.reason);
        status.conditions.iter().map(one).collect()
    }

    #[test]
    fn a_status_says_the_same_until_something_else_is_so() {
        let mut report = Report::of(State::Serving);
        report.addresses = vec!["192.168.50.1".parse().unwrap()];
        let first = report.status(None, at(1));
        assert_eq!(report.status(Some(&first), at(2)), first, "another time is no reason to write");
        assert_eq!(said(&first), ["Serving True Serving"]);
        report.state = State::ProgrammingFailed("ipset: no memory".into());
        let second = report.status(Some(&first), at(3));
        assert_eq!(said(&second), ["Serving False ProgrammingFailed"]);
        assert_eq!(second.conditions[0].last_transition_time, Time(at(3)));
        assert_eq!(second.conditions[0].message, "ipset: no memory");
        let held_off = |asked: &str, cleaned| State::HeldOff { asked: asked.into(), cleaned };
        report.state = held_off("u1", Err("rules: busy".into()));
        let third = report.status(Some(&second), at(4));
        assert_eq!(said(&third), ["Serving False HeldOff", "CleanedUp False CleanupFailed"]);
        assert_eq!(third.conditions[0].last_transition_time, Time(at(3)));
        report.state = held_off("u1", Ok(()));
        let fourth = report.status(Some(&third), at(5));
        assert_eq!(said(&fourth)[1], "CleanedUp True CleanedUp");
        report.state = held_off("u2", Ok(()));
        assert_ne!(report.status(Some(&fourth), at(6)), fourth, "who asks again is answered");
    }

    #[test]
    fn at_most_fifty_are_named_and_all_are_counted() {
        let mut faults = Faults::default();
        for i in 0..60 {
            faults.settled(&key(&format!("a{i:02}")), Some(fault("PublishedPortHeld")));
        }
        let refused = (0..60).map(|i| (Some(key(&format!("b{i:02}"))), "no memory".to_owned()));
        let both = std::iter::once((Some(key("a07")), "busy".to_owned()));
        faults.turned(refused.chain(both), Instant::now());
        let (count, named) = faults.named();
        assert_eq!((count, named.len()), (120, NAMED));
        assert_eq!(named[7], (key("a07"), Fault { reason: "KernelRefused", message: "busy".into() }));
        assert_eq!(named[49].0, key("a49"));
        let status = Report { count, named, ..Report::of(State::Serving) }.status(None, at(1));
        assert_eq!((status.failing.count, status.failing.services.len()), (120, NAMED));
        assert_eq!(status.failing.services[0].message.chars().count(), MESSAGE);
        faults.turned(std::iter::empty(), Instant::now());
        for i in 0..60 {
            faults.settled(&key(&format!("a{i:02}")), None);
        }
        assert_eq!(faults.named(), (0, vec![]));
    }

    /// What a status says of services that fail: name, reason and generation.
    fn failing(faults: &Faults) -> (MeshNodeStatus, Vec<String>) {
        let (count, named) = faults.named();
        let report = Report { count, named, not_understood: faults.refusals(), ..Report::of(State::Serving) };
        let status = report.status(None, at(1));
        let line = |f: &FailingService| format!("{} {} {:?}", f.name, f.reason, f.generation);
        let lines = status.failing.services.iter().map(line).collect();
        (status, lines)
    }

    fn refusals(names: impl Iterator<Item = String>) -> BTreeMap<ServiceKey, Refusal> {
        names.map(|name| (key(&name), Refusal { generation: 2, why: "no".into() })).collect()
    }

    #[test]
    fn what_the_controller_accepts_and_this_agent_does_not_is_told_with_its_generation() {
        let mut faults = Faults::default();
        faults.settled(&key("b"), Some(fault("PublishedPortHeld")));
        faults.not_understood(refusals(["a".to_owned(), "b".to_owned()].into_iter()));
        let (status, lines) = failing(&faults);
        assert_eq!(lines, ["b PublishedPortHeld None", "a NotUnderstood Some(2)"]);
        assert_eq!(status.failing.count, 1, "it counts what is wrong on the node");
        let listed = status.not_understood.unwrap();
        assert_eq!((listed.count, listed.services.len()), (2, 2));
        faults.not_understood(BTreeMap::new());
        assert_eq!(failing(&faults).0.not_understood, None);
    }

    #[test]
    fn refusals_take_no_name_from_what_is_wrong_on_the_node() {
        let mut faults = Faults::default();
        faults.not_understood(refusals((0..1200).map(|i| format!("a{i:04}"))));
        faults.settled(&key("z"), Some(fault("PublishedPortHeld")));
        let (status, lines) = failing(&faults);
        assert_eq!((status.failing.count, lines.len(), &*lines[0]), (1, NAMED, "z PublishedPortHeld None"));
        let listed = status.not_understood.unwrap();
        assert_eq!((listed.count, listed.services.len()), (1200, REFUSALS));
    }

    #[test]
    fn a_node_fails_when_it_has_failed_for_a_while() {
        let mut faults = Faults::default();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        faults.failed("xtables lock", start);
        assert_eq!(faults.state(later(5)), State::Serving);
        faults.turned([(None, "no memory".to_owned())].into_iter(), later(20));
        assert_eq!(faults.state(later(29)), State::Serving);
        assert_eq!(faults.state(later(30)), State::ProgrammingFailed("no memory".into()));
        // What is refused of one service is that one's.
        faults.turned([(Some(key("a")), "full".to_owned())].into_iter(), later(31));
        assert_eq!(faults.state(later(90)), State::Serving);
        assert_eq!(faults.named().0, 1);
    }
}
