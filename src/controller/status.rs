//! The status of a MeshService: pure, from what is known of it.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::{
    allocate::ServiceAllocation,
    api::{
        FieldError,
        mesh_node::NOT_UNDERSTOOD,
        status::{EndpointCounts, MeshServiceStatus, PortStatus, Summary},
        values::{IpText, Protocol as ApiProtocol},
    },
    model::{
        ids::{PortId, Protocol},
        service::Service,
    },
};

/// What is known of a service.
pub struct Known<'a> {
    /// Its `metadata.generation`.
    pub generation: Option<i64>,
    /// What its spec comes to.
    pub verdict: Verdict<'a>,
    /// Its endpoints.
    pub endpoints: EndpointCounts,
    /// Why there is no endpoint, where that is plain.
    pub why_none: Option<String>,
    /// What can't be used of its EndpointSlices.
    pub unusable: Option<String>,
    /// Aliases that it asks for and does not have.
    pub aliases: Vec<String>,
    /// Its ports that no ready endpoint has, where there are ready ones.
    pub unmatched: Vec<PortId>,
    /// What the nodes say about it.
    pub programmed: Programmed,
    /// Now.
    pub now: jiff::Timestamp,
}

/// What nodes say about a service, as a condition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Programmed {
    /// `True`, `False` or `Unknown`.
    pub status: &'static str,
    /// In one word.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

impl Programmed {
    /// Nobody has said anything against it.
    pub fn good() -> Self {
        let message = "no node reports that it could not serve what is allocated".to_owned();
        Self { status: "True", reason: "Programmed".to_owned(), message }
    }
}

/// What a spec comes to.
pub enum Verdict<'a> {
    /// It is served, with this; why it has no headless Service, if it should have one.
    Served(&'a Service, Option<&'a ServiceAllocation>, Option<&'a str>),
    /// It is wrong; what goes on instead.
    Wrong(&'a [FieldError], Last<'a>),
    /// It asks for what can't be done, and is not served.
    Withheld(&'a [FieldError]),
    /// A core Service of its name is somebody else's, and so would be its endpoints.
    NameTaken,
}

/// The last valid version of a service whose spec is wrong.
#[derive(Clone, Copy)]
pub enum Last<'a> {
    /// There is one; why it has no headless Service, if it should have one.
    Known(Option<&'a str>),
    /// There is one, by the status, which says what it has and no more: this controller was not there yet.
    Unseen,
    /// There is none.
    None,
}

/// The status that a service is to have; `old` is the one that it has.
pub fn status(known: &Known<'_>, old: &MeshServiceStatus) -> MeshServiceStatus {
    let mut new = MeshServiceStatus {
        endpoints: Some(known.endpoints.clone()),
        observed_generation: known.generation,
        ..MeshServiceStatus::default()
    };
    let mut conditions =
        Conditions { old: &old.conditions, generation: known.generation, now: known.now, new: Vec::new() };
    match &known.verdict {
        Verdict::Served(service, allocation, problem) => {
            conditions.set("Accepted", true, "Accepted", "the spec is valid");
            served(service, *allocation, &mut new, &mut conditions);
            conditions.programmed(&known.programmed);
            ready(*problem, &mut conditions, known);
        }
        Verdict::Wrong(errors, last) => {
            // Nothing that worked is lost.
            (new.vips, new.ports, new.summary) = (old.vips.clone(), old.ports.clone(), old.summary.clone());
            let end = if matches!(last, Last::None) { "" } else { "; the last valid version stays in force" };
            conditions.set("Accepted", false, "Invalid", &(join(errors) + end));
            match last {
                Last::Known(headless_problem) => {
                    conditions.keep("Allocated");
                    conditions.programmed(&known.programmed);
                    ready(*headless_problem, &mut conditions, known);
                }
                Last::Unseen => {
                    conditions.keep("Allocated");
                    conditions.programmed(&known.programmed);
                    new.endpoints = old.endpoints.clone();
                    let message = "the last valid version goes on, and is not known to this controller: which endpoints \
                                   it has can't be said until the spec is valid";
                    conditions.put("Ready", "Unknown", "Invalid", message);
                }
                Last::None => not_accepted(&mut conditions),
            }
        }
        Verdict::Withheld(errors) => {
            conditions.set("Accepted", false, "NotSupportedYet", &join(errors));
            not_accepted(&mut conditions);
        }
        Verdict::NameTaken => {
            let message = "there is a Service of this name that belongs to somebody else: rename one of them, or give \
                           serviceName instead of selector";
            conditions.set("Accepted", false, "ServiceNameTaken", message);
            not_accepted(&mut conditions);
        }
    }
    if let (Some(summary), Some(endpoints)) = (&mut new.summary, &new.endpoints) {
        summary.endpoints = format!("{}/{}", endpoints.ready, endpoints.total);
    }
    new.conditions = conditions.new;
    new
}

fn not_accepted(conditions: &mut Conditions<'_>) {
    conditions.set(
        "Allocated",
        false,
        "NotAccepted",
        "nothing is allocated for a service that is not accepted",
    );
    conditions.set(
        "Programmed",
        false,
        "NotAccepted",
        "nothing is programmed for a service that is not accepted",
    );
    conditions.set("Ready", false, "NotAccepted", "the service is not served");
}

/// What it is given.
fn served(
    service: &Service,
    allocation: Option<&ServiceAllocation>,
    new: &mut MeshServiceStatus,
    conditions: &mut Conditions<'_>,
) {
    let none = ServiceAllocation::default();
    let allocation = allocation.unwrap_or(&none);
    // The primary family first, as in spec.ipFamilies.
    let vips = service.families.iter().filter_map(|family| allocation.vips.get(*family));
    new.vips = vips.map(|vip| IpText(vip.to_string())).collect();
    new.ports = service
        .ports
        .iter()
        .map(|port| PortStatus {
            name: port.name.as_ref().map(ToString::to_string),
            protocol: protocol(port.protocol),
            port: port.port.into(),
            end_port: port.end_port.map(i32::from),
            published_port: allocation.published.get(&port.id()).map(|n| i32::from(*n)),
        })
        .collect();
    let span = |port: u16, span: u16| {
        if span > 1 { format!("{port}-{}", port.saturating_add(span - 1)) } else { port.to_string() }
    };
    let ports = service.ports.iter().map(|p| format!("{}/{}", span(p.port, p.span()), p.protocol));
    let published = service.ports.iter().filter_map(|p| {
        Some(format!("{}/{}", span(*allocation.published.get(&p.id())?, p.span()), p.protocol))
    });
    new.summary =
        Some(Summary { ports: short(ports), published: short(published), endpoints: String::new() });
    let blocking: Vec<_> = allocation.conflicts.iter().filter(|c| c.is_blocking()).collect();
    let notes: Vec<String> = allocation.conflicts.iter().map(ToString::to_string).collect();
    match (blocking.first(), allocation.conflicts.first()) {
        (Some(first), _) => conditions.set("Allocated", false, first.reason(), &notes.join("; ")),
        (None, Some(first)) => conditions.set("Allocated", true, first.reason(), &notes.join("; ")),
        (None, None) => conditions.set("Allocated", true, "Allocated", "all that was asked for is allocated"),
    }
}

/// Whether it is served, by the conditions so far and by what is known of its endpoints and nodes.
fn ready(headless_problem: Option<&str>, conditions: &mut Conditions<'_>, known: &Known<'_>) {
    let (endpoints, programmed) = (&known.endpoints, &known.programmed);
    let allocated = conditions.new.iter().find(|c| c.type_ == "Allocated");
    let missing = match allocated {
        None => Some("NotAllocated".to_owned()),
        Some(c) => (c.status != "True").then(|| c.reason.clone()),
    };
    if let Some(reason) = missing {
        conditions.set("Ready", false, &reason, "not all that was asked for is allocated");
    } else if let Some(problem) = headless_problem {
        conditions.set("Ready", false, "HeadlessServiceFailed", problem);
    } else if !known.unmatched.is_empty() {
        let ports: Vec<String> =
            known.unmatched.iter().map(|id| format!("{}/{}", id.port, id.protocol)).collect();
        let message = format!(
            "no ready endpoint has a port for {}: see targetPort, and the ports of the EndpointSlices",
            short(ports.into_iter())
        );
        conditions.set("Ready", false, "NoTargetPort", &message);
    } else if endpoints.ready == 0 {
        let none = known.why_none.as_deref().unwrap_or("there are no endpoints");
        let message = if endpoints.total == 0 { none } else { "no endpoint is ready" };
        conditions.set("Ready", false, "NoEndpoints", message);
    } else if programmed.status == "True" {
        conditions.set(
            "Ready",
            true,
            "Serving",
            "allocated, there are endpoints, and no node reports a failure",
        );
    } else {
        conditions.put("Ready", programmed.status, &programmed.reason, "see the condition Programmed");
    }
    if !known.aliases.is_empty() {
        conditions.add_to_ready("AliasTaken", &known.aliases.join("; "));
    }
    if let Some(problem) = &known.unusable {
        conditions.add_to_ready("EndpointSliceUnusable", problem);
    }
}

/// At most what the schema allows.
fn short(parts: impl Iterator<Item = String>) -> String {
    let mut out = String::new();
    for part in parts {
        if out.len() + part.len() > 4000 {
            return out + ",…";
        }
        if !out.is_empty() {
            out.push(',');
        }
        out += &part;
    }
    out
}

fn protocol(protocol: Protocol) -> ApiProtocol {
    match protocol {
        Protocol::Tcp => ApiProtocol::Tcp,
        Protocol::Udp => ApiProtocol::Udp,
        Protocol::Sctp => ApiProtocol::Sctp,
    }
}

fn join(errors: &[FieldError]) -> String {
    let all: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect();
    all.join("; ")
}

struct Conditions<'a> {
    old: &'a [Condition],
    generation: Option<i64>,
    now: jiff::Timestamp,
    new: Vec<Condition>,
}

impl Conditions<'_> {
    fn set(&mut self, type_: &str, true_: bool, reason: &str, message: &str) {
        self.put(type_, if true_ { "True" } else { "False" }, reason, message);
    }

    fn programmed(&mut self, programmed: &Programmed) {
        self.put("Programmed", programmed.status, &programmed.reason, &programmed.message);
    }

    fn put(&mut self, type_: &str, status: &str, reason: &str, message: &str) {
        let old = self.old.iter().find(|c| c.type_ == type_ && c.status == status);
        self.new.push(Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            // maxLength of a condition's message in the API.
            message: message.chars().take(32_000).collect(),
            observed_generation: self.generation,
            last_transition_time: old.map_or(Time(self.now), |c| c.last_transition_time.clone()),
        });
    }

    /// Says something more; where the service is ready, it is the reason.
    fn add_to_ready(&mut self, reason: &str, message: &str) {
        for ready in self.new.iter_mut().filter(|c| c.type_ == "Ready") {
            if ready.status == "True" {
                ready.reason = reason.to_owned();
            }
            ready.message = format!("{}; {message}", ready.message).chars().take(32_000).collect();
        }
    }

    fn keep(&mut self, type_: &str) {
        self.new.extend(self.old.iter().find(|c| c.type_ == type_).cloned());
    }
}

/// Something that a person wants to know of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct News {
    /// Whether it is as one would like it.
    pub good: bool,
    /// In one word, as conditions and Events write it.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

/// Reason of `Programmed` where nothing is said against a service but that nodes fail as a whole.
pub const NODE_FAILING: &str = "NodeFailing";

/// That a service has endpoints is told in an Event where it had none for so long.
const NEWS_AFTER: jiff::SignedDuration = jiff::SignedDuration::from_secs(30);

/// What is worth an Event in a change of a status: what was allocated, every condition that is not met and says something new, and nodes that
/// begin or end to fail it. A node that fails as a whole is its MeshNode's to tell: it would be an Event of every service.
pub fn news(old: &MeshServiceStatus, new: &MeshServiceStatus) -> Vec<News> {
    let find = |status: &MeshServiceStatus, type_: &str| {
        status.conditions.iter().find(|c| c.type_ == type_).cloned()
    };
    let mut out = Vec::new();
    for type_ in ["Accepted", "Allocated"] {
        let (before, Some(after)) = (find(old, type_), find(new, type_)) else { continue };
        let told = before.is_some_and(|b| {
            (b.status, b.reason, b.message)
                == (after.status.clone(), after.reason.clone(), after.message.clone())
        });
        let plain = after.status == "True" && after.reason == type_;
        if !told && !plain && after.reason != "NotAccepted" {
            out.push(News { good: after.status == "True", reason: after.reason, message: after.message });
        }
    }
    // Which nodes fail changes often; that any does, or none does any more, is the news.
    let (before, after) = (find(old, "Programmed"), find(new, "Programmed"));
    let told_elsewhere = |reason: &str| reason == "NotAccepted" || reason == NODE_FAILING;
    let refused = before.as_ref().is_some_and(|c| c.reason == NOT_UNDERSTOOD);
    let before_generation = before.as_ref().and_then(|c| c.observed_generation);
    let failed = before.is_some_and(|c| c.status == "False" && !told_elsewhere(&c.reason));
    if let Some(after) = after.filter(|c| !told_elsewhere(&c.reason)) {
        match after.status.as_str() {
            "False" if !failed => {
                out.push(News { good: false, reason: after.reason, message: after.message });
            }
            // A refusal is of one generation: of the next one nothing has been said yet.
            "True" if failed && !(refused && before_generation != after.observed_generation) => {
                out.push(News { good: true, reason: after.reason, message: after.message });
            }
            _ => {}
        }
    }
    // What people wait for, and what they are called for at night.
    let about = ["NoEndpoints", "NoTargetPort", "HeadlessServiceFailed"];
    if let (Some(before), Some(after)) = (find(old, "Ready"), find(new, "Ready")) {
        let (was, is) = (before.status == "True", after.status == "True");
        // Those of a new service come a moment after it, which is no news.
        let lasted = after.last_transition_time.0.duration_since(before.last_transition_time.0);
        let is_over = is && lasted >= NEWS_AFTER;
        let told = ["EndpointSliceUnusable", "AliasTaken"].contains(&&*after.reason);
        if told && before.message != after.message {
            out.push(News { good: false, reason: after.reason, message: after.message });
        } else if (was && about.contains(&&*after.reason)) || (is_over && about.contains(&&*before.reason)) {
            out.push(News { good: is, reason: after.reason, message: after.message });
        }
    }
    if differ(old, new) {
        let vips = new.vips.iter().map(|vip| format!("virtual IP {}", vip.0));
        let ports = new.ports.iter().filter_map(|p| {
            Some(format!("{}/{} published on {}", p.port, p.protocol.as_str(), p.published_port?))
        });
        let parts: Vec<String> = vips.chain(ports).collect();
        if !parts.is_empty() {
            out.push(News { good: true, reason: "Allocated".into(), message: parts.join(", ") });
        }
    }
    out
}

/// Virtual IPs and published ports that a status gives, each as a text.
pub fn held(status: &MeshServiceStatus) -> BTreeSet<String> {
    let ports = status.ports.iter();
    let ports = ports.filter_map(|p| Some(format!("{}/{}", p.published_port?, p.protocol.as_str())));
    status.vips.iter().map(|vip| vip.0.clone()).chain(ports).collect()
}

/// Whether a service has no longer all that it had.
pub fn gives_up(old: &MeshServiceStatus, new: &MeshServiceStatus) -> bool {
    let spans = |status: &MeshServiceStatus| {
        let span = |p: &PortStatus| {
            let first = p.published_port?;
            Some((p.protocol, first, first.saturating_add(p.span().into())))
        };
        status.ports.iter().filter_map(span).collect::<Vec<_>>()
    };
    let (before, after) = (spans(old), spans(new));
    let has = |(protocol, first, end): &(_, i32, i32)| {
        after.iter().any(|(p, f, e)| p == protocol && f <= first && end <= e)
    };
    old.vips.iter().any(|vip| !new.vips.contains(vip)) || !before.iter().all(has)
}

/// Whether a service has something else than it had.
pub fn differ(old: &MeshServiceStatus, new: &MeshServiceStatus) -> bool {
    (&old.vips, &old.ports) != (&new.vips, &new.ports)
}

/// Whether nothing differs but what endpoints and nodes do: their numbers, whether there is one, and who fails.
pub fn only_counts(old: &MeshServiceStatus, new: &MeshServiceStatus) -> bool {
    let without = |status: &MeshServiceStatus| {
        let mut status = status.clone();
        status.endpoints = None;
        status.conditions.retain(|c| c.type_ != "Ready" && c.type_ != "Programmed");
        if let Some(summary) = &mut status.summary {
            summary.endpoints = String::new();
        }
        status
    };
    without(old) == without(new)
}
