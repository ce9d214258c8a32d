//! What the agent does besides programming: keeps the state file, logs, measures, says how it is.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use tracing::{info, warn};

use super::{
    dns::Feed,
    keeper::Keeper,
    notes::{notes_of, problems_of},
    report::firewall_advice,
};
use crate::{
    admin::Health,
    allocate::{Conflict, ServiceAllocation},
    compile::CompiledService,
    dataplane::{Error, Ipvs, ipvs::KernelIpvs},
    meshnode::{self, Fault, Faults, Report},
    metrics::{EndpointTraffic, Metrics, Outcome, RoundKind, ServiceTraffic, TrafficSource},
    model::{
        ids::{Mark, Scope, ServiceKey},
        kernel::VirtualServerKey,
        refusal::Refusal,
        service::Granted,
    },
    plan::Op,
    reconcile::{Drift, Engine, Turn, agent::Observer},
};

/// How often other programs' nft chains are looked at.
const FIREWALL_EVERY: Duration = Duration::from_secs(30);

/// Observes the agent's loop.
pub struct Watcher {
    keeper: Keeper,
    metrics: Metrics,
    health: Health,
    traffic: Traffic,
    dns: Feed,
    /// Problems that were logged, by service.
    told: BTreeMap<ServiceKey, Vec<String>>,
    /// What else was logged of services.
    noted: BTreeMap<ServiceKey, Vec<String>>,
    /// Why the kernel is not as desired.
    reason: String,
    /// Writes that were reported so far, by backend.
    written: [u64; 3],
    turns: u64,
    /// Advice about allocations that depend on history, and the generation it is about.
    advice: Option<String>,
    advised: Option<u64>,
    /// What only the owner of this host's firewall can do, and when that was looked at.
    firewall: Vec<String>,
    firewall_seen: Option<Instant>,
    /// Why the state can't be written.
    unsaved: Vec<String>,
    faults: Faults,
    /// Where what is wrong is reported to, in Kubernetes.
    node: Option<meshnode::writer::Handle>,
}

impl Watcher {
    /// An observer of a loop that has not started yet.
    pub fn new(
        keeper: Keeper,
        metrics: Metrics,
        health: Health,
        traffic: Traffic,
        dns: Feed,
        node: Option<meshnode::writer::Handle>,
    ) -> Self {
        Self {
            keeper,
            metrics,
            health,
            traffic,
            dns,
            told: BTreeMap::new(),
            noted: BTreeMap::new(),
            firewall: Vec::new(),
            firewall_seen: None,
            unsaved: Vec::new(),
            reason: "the source has not been read yet".into(),
            written: [0; 3],
            turns: 0,
            advice: None,
            advised: None,
            faults: Faults::default(),
            node,
        }
    }

    fn tell(&mut self, engine: &Engine, key: &ServiceKey) {
        let service = engine.merged().services().get(key);
        let mut now: Vec<String> = service.map(|service| problems_of(engine, service)).unwrap_or_default();
        now.extend(self.dns.conflicts(key));
        self.faults.settled(key, service.and_then(|service| fault_of(engine, service)));
        let before = self.told.remove(key).unwrap_or_default();
        tell_changes(&format!("{key}: "), &before, &now);
        let notes: Vec<String> = service.map(|service| notes_of(engine, service)).unwrap_or_default();
        let noted = self.noted.remove(key).unwrap_or_default();
        for note in notes.iter().filter(|note| !noted.contains(note)) {
            info!("{key}: {note}");
        }
        if !notes.is_empty() {
            self.noted.insert(key.clone(), notes);
        }
        if !now.is_empty() {
            self.told.insert(key.clone(), now);
        }
    }

    /// A firewall may come, or go, at any time.
    fn look_at_firewall(&mut self, engine: &Engine) {
        if self.firewall_seen.is_some_and(|at| at.elapsed() < FIREWALL_EVERY) {
            return;
        }
        self.firewall_seen = Some(Instant::now());
        let now = firewall_advice(engine);
        tell_changes("", &self.firewall, &now);
        self.metrics.problems("firewall", now.len());
        self.firewall = now;
    }

    /// Writes the state; what stands in the way is told once, and counted while it lasts.
    fn save(&mut self, engine: &Engine) -> Result<(), String> {
        let saved = self.keeper.save(engine).map_err(|e| format!("{e:#}"));
        let now: Vec<String> = saved.as_ref().err().cloned().into_iter().collect();
        tell_changes("", &self.unsaved, &now);
        self.metrics.problems("state", now.len());
        self.unsaved = now;
        saved
    }

    /// Says how the node is, once that is known.
    fn report(&self, engine: &Engine) {
        let Some(node) = &self.node else { return };
        let state = self.faults.state(Instant::now());
        if self.turns == 0 && state == meshnode::State::Serving {
            return;
        }
        let (count, named) = self.faults.named();
        node.report(Report {
            renderer: engine.dataplane.netfilter.name().to_owned(),
            addresses: engine.facts().published_addresses.iter().copied().collect(),
            count,
            named,
            not_understood: self.faults.refusals(),
            state,
        });
    }

    fn count_writes(&mut self, engine: &Engine) {
        let dataplane = &engine.dataplane;
        let now = [dataplane.ipvs.writes(), dataplane.netfilter.writes(), dataplane.host.writes()];
        for ((backend, now), before) in ["ipvs", "netfilter", "host"].into_iter().zip(now).zip(self.written) {
            self.metrics.writes(backend, now.saturating_sub(before));
        }
        self.written = now;
    }
}

/// Logs what is new, and what is over.
fn tell_changes(about: &str, before: &[String], now: &[String]) {
    for line in now.iter().filter(|line| !before.contains(line)) {
        warn!("{about}{line}");
    }
    for line in before.iter().filter(|line| !now.contains(line)) {
        info!("{about}no longer: {line}");
    }
}

impl Observer for Watcher {
    fn before_apply(&mut self, engine: &Engine, _: &[Op]) -> Result<(), String> {
        self.dns.see_node(engine);
        // After a restart what is answered is there already; on a kernel without anything of ours it has yet to come.
        if !engine.found_nothing() {
            self.dns.begin(engine);
        }
        match self.save(engine) {
            // Endpoints that are gone must not stay because a disk is full.
            Err(_) if self.keeper.on_disk() => Ok(()),
            saved => saved,
        }
    }

    fn drifted(&mut self, drift: &Drift) {
        for (kind, n) in drift {
            self.metrics.drift(kind, *n);
        }
    }

    fn after_turn(&mut self, engine: &Engine, turn: &Turn, since: Option<Instant>) {
        // Whatever went wrong has been told.
        let _ = self.save(engine);
        let others = self.dns.update(engine, &turn.services, since);
        for key in others.difference(&turn.services) {
            self.tell(engine, key);
        }
        for key in &turn.services {
            self.tell(engine, key);
            self.traffic.set(key, engine.merged().services().get(key));
        }
        if self.advised != Some(engine.generation()) {
            self.advised = Some(engine.generation());
            let dir = self.keeper.source.dir();
            let advice = dir.and_then(|dir| super::lock::advice(engine.allocator(), dir));
            if let Some(advice) = advice.as_ref().filter(|a| self.advice.as_ref() != Some(a)) {
                warn!("{advice}");
            }
            self.advice = advice;
        }
        let failing = engine.failing();
        let refused = failing.iter().filter(|f| !f.follows).map(|f| {
            let owner = f.op.owner(engine.merged());
            (owner.cloned(), format!("{}: {}", f.op, f.error))
        });
        self.faults.turned(refused, Instant::now());
        let outcome = if turn.failures.is_empty() { Outcome::Success } else { Outcome::Failure };
        let kind = if turn.full { RoundKind::Full } else { RoundKind::Incremental };
        self.metrics.reconcile(outcome, kind, turn.took);
        if let (Some(since), true) = (since, turn.failures.is_empty()) {
            self.metrics.source_to_kernel(since.elapsed());
        }
        self.count_writes(engine);
        self.metrics.services(engine.merged().services().len());
        self.metrics.problems("services", self.told.values().map(Vec::len).sum());
        self.metrics.problems("changes", failing.iter().filter(|f| !f.follows).count());
        self.turns += 1;
        self.metrics.programmed_generation(self.turns);
        self.reason = match failing.first() {
            Some(first) => format!("changes that failed: {}, first: {}", failing.len(), first.error),
            None => String::new(),
        };
    }

    fn turn_failed(&mut self, engine: &Engine, error: &str) {
        self.dns.turn_failed(engine);
        self.reason = error.to_owned();
        self.faults.failed(error, Instant::now());
    }

    fn drift(&mut self, what: &str) {
        self.reason = format!("healing: {what}");
    }

    fn refused(&mut self, services: BTreeMap<ServiceKey, Refusal>) {
        self.faults.not_understood(services);
    }

    fn heartbeat(&mut self, engine: &Engine, synced: bool, in_sync: bool) {
        self.health.beat();
        self.health.set_synced(synced);
        self.health.set_in_sync(in_sync, self.reason.as_str());
        self.metrics.in_sync(in_sync);
        self.dns.look(engine);
        self.health.set_notes(self.dns.problems());
        self.look_at_firewall(engine);
        self.report(engine);
    }
}

/// What keeps this node alone from serving a service: what is wrong everywhere is the controller's to tell.
fn fault_of(engine: &Engine, service: &CompiledService) -> Option<Fault> {
    let allocation = engine.allocator().get(&service.key);
    let granted = engine.snapshot().services().get(&service.key).and_then(|s| s.granted.as_ref());
    if let Some(fault) = missing(granted, allocation) {
        return Some(fault);
    }
    // Who publishes elsewhere only does as it was told.
    let ((protocol, port), _) = engine.blocked().iter().find(|(_, owner)| **owner == service.key)?;
    let message = format!("published port {port}/{protocol} is held by a socket of this node");
    Some(Fault { reason: "PublishedPortHeld", message })
}

/// What of all that it was given a service does not have here.
fn missing(granted: Option<&Granted>, allocation: Option<&ServiceAllocation>) -> Option<Fault> {
    let conflicts = allocation.map(|a| a.conflicts.as_slice()).unwrap_or_default();
    let told = |conflict: &Conflict| Fault { reason: conflict.reason(), message: conflict.to_string() };
    // Two statuses give the same: where one of them is stale, that is soon over.
    let taken = |c: &&Conflict| matches!(c, Conflict::VipTaken { .. } | Conflict::PortTaken { .. });
    if let Some(taken) = conflicts.iter().find(taken) {
        return Some(told(taken));
    }
    let has = |family| allocation.is_some_and(|a| a.vips.get(family).is_some());
    let lost = granted.and_then(|granted| granted.vips.iter().find(|(family, _)| !has(*family)));
    if let Some((_, vip)) = lost {
        let message = format!("virtual IP {vip}, which the status grants, is outside this node's --vip-cidr");
        return Some(Fault { reason: "VIPUnusable", message });
    }
    conflicts.iter().find(|c| matches!(c, Conflict::MarksExhausted { .. })).map(told)
}

/// Reads counters of all services when asked, on a connection of its own.
#[derive(Clone)]
pub struct Traffic(Arc<Mutex<Reader>>);

struct Reader {
    ipvs: KernelIpvs,
    services: BTreeMap<ServiceKey, Arc<CompiledService>>,
}

impl Traffic {
    /// Opens IPVS in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open() -> Result<Self, Error> {
        let reader = Reader { ipvs: KernelIpvs::open()?, services: BTreeMap::new() };
        Ok(Self(Arc::new(Mutex::new(reader))))
    }

    fn set(&self, key: &ServiceKey, service: Option<&Arc<CompiledService>>) {
        let mut reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match service {
            Some(service) => drop(reader.services.insert(key.clone(), service.clone())),
            None => drop(reader.services.remove(key)),
        }
    }
}

impl TrafficSource for Traffic {
    fn snapshot(&self) -> Arc<Vec<ServiceTraffic>> {
        // The lock is held only to copy the list: a scrape of many services must not hold up a turn.
        let services: Vec<_> = {
            let reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            reader.services.values().cloned().collect()
        };
        let mut out = Vec::new();
        for service in &services {
            let mut reader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for port in &service.ports {
                // Both scopes may have one mark. Without an endpoint it has no IPVS service, and is counted all the same: what
                // was counted so far goes on.
                let scopes: BTreeMap<Mark, Scope> =
                    port.marks.iter().rev().map(|(scope, mark)| (*mark, *scope)).collect();
                for (mark, scope) in scopes {
                    for family in service.families() {
                        let key = VirtualServerKey { family, mark };
                        let reals = match service.virtual_servers.get(&key) {
                            Some(_) => reader.ipvs.reals(key),
                            None => Ok(BTreeMap::new()),
                        };
                        match reals {
                            Ok(reals) => out.push(traffic_of(service, port, scope, key, &reals)),
                            Err(e) => warn!("counters of {}: {e}", service.key),
                        }
                    }
                }
            }
        }
        Arc::new(out)
    }
}

fn traffic_of(
    service: &CompiledService,
    port: &crate::compile::CompiledPort,
    scope: Scope,
    key: VirtualServerKey,
    reals: &BTreeMap<
        crate::model::kernel::RealServerKey,
        (crate::model::kernel::RealServerConfig, crate::dataplane::Counters),
    >,
) -> ServiceTraffic {
    let endpoints = reals
        .iter()
        .map(|(real, (config, counters))| EndpointTraffic {
            address: *real,
            target: service
                .reals
                .get(&(key, *real))
                .and_then(|info| info.target.clone())
                .unwrap_or_else(|| "".into()),
            weight: config.weight,
            counters: *counters,
        })
        .collect();
    ServiceTraffic {
        namespace: service.key.namespace.clone(),
        name: service.key.name.clone(),
        port: port.spec.label().into(),
        protocol: port.spec.protocol,
        family: key.family,
        scope,
        endpoints,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::PerFamily;

    #[test]
    fn what_another_has_is_not_told_as_out_of_range() {
        let granted = Granted {
            vips: PerFamily { v4: "10.200.7.7".parse().ok(), v6: None },
            published: [("80/TCP".parse().unwrap(), 30080)].into(),
        };
        let reason = |vip: Option<&str>, conflicts: Vec<Conflict>| {
            let vips = PerFamily { v4: vip.and_then(|vip| vip.parse().ok()), v6: None };
            let allocation = ServiceAllocation { vips, conflicts, ..ServiceAllocation::default() };
            missing(Some(&granted), Some(&allocation)).map(|fault| (fault.reason, fault.message))
        };
        let by = || ServiceKey::new("default", "other");
        let port = || "80/TCP".parse().unwrap();
        let vip = Conflict::VipTaken { vip: "10.200.7.7".parse().unwrap(), by: by() };
        let (why, message) = reason(None, vec![vip]).unwrap();
        assert_eq!((why, &*message), ("VIPTaken", "virtual IP 10.200.7.7 belongs to default/other"));
        let taken = Conflict::PortTaken { port: port(), number: 30080, by: by(), by_port: port() };
        assert_eq!(reason(Some("10.200.7.7"), vec![taken]).unwrap().0, "PublishedPortTaken");
        assert_eq!(reason(None, vec![]).unwrap().0, "VIPUnusable");
        let marks = Conflict::MarksExhausted { port: port(), scope: Scope::Vip };
        assert_eq!(reason(Some("10.200.7.7"), vec![marks]).unwrap().0, "MarksExhausted");
        assert_eq!(reason(Some("10.200.7.7"), vec![]), None);
    }
}
