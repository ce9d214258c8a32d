//! The comparison itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::op::{Op, Phase};
use crate::{
    compile::merge::Touched,
    dataplane::{ElementChange, IpvsChange, ProgramState},
    model::{
        ids::{Family, Mark, PerFamily, Protocol},
        kernel::{
            Element, Elements, KernelState, RealServerKey, Target, Timeouts, UdpFlows, VipRoute,
            VirtualServer, VirtualServerKey, sysctl_fits,
        },
    },
};

/// What was found in a kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observed {
    /// Our IPVS services.
    pub virtual_servers: HashMap<VirtualServerKey, VirtualServer>,
    /// Marks of other programs' IPVS services that lie in our field: never given out.
    pub foreign_marks: BTreeSet<Mark>,
    /// Our set elements.
    pub elements: Elements,
    /// Marks that entries lead to, those of other renderers too.
    pub led_to: BTreeSet<Mark>,
    /// The fixed rules, compared with the desired ones.
    pub program: ProgramState,
    /// What another renderer left.
    pub leftovers: Vec<String>,
    /// Our routes.
    pub routes: PerFamily<VipRoute>,
    /// Values of the sysctls that we require; missing files are absent.
    pub sysctls: BTreeMap<String, String>,
    /// IPVS timeouts in force.
    pub timeouts: Timeouts,
}

/// Collects operations by phase.
#[derive(Default)]
struct Ordered(BTreeMap<Phase, Vec<Op>>);

impl Ordered {
    fn push(&mut self, phase: Phase, op: Op) {
        self.0.entry(phase).or_default().push(op);
    }

    fn into_ops(self) -> Vec<Op> {
        self.0.into_values().flatten().collect()
    }
}

/// Changes that make a whole kernel as desired.
pub fn plan_all(desired: &KernelState, observed: &Observed) -> Vec<Op> {
    let mut ops = Ordered::default();
    for (path, value) in &desired.sysctls {
        let was = observed.sysctls.get(path);
        if was.is_none_or(|was| !sysctl_fits(path, value, was)) {
            let op = Op::Sysctl { path: path.clone(), value: value.clone(), was: was.cloned() };
            ops.push(Phase::Sysctls, op);
        }
    }
    if let Some(timeouts) = desired.timeouts.filter(|t| *t != observed.timeouts) {
        ops.push(Phase::Sysctls, Op::Timeouts { timeouts, was: observed.timeouts });
    }
    let install = match (&desired.program, &observed.program) {
        (None, _) | (Some(_), ProgramState::Installed) => None,
        (Some(program), ProgramState::Absent) => Some((program, vec!["install".to_owned()])),
        (Some(program), ProgramState::Drifted(reasons)) => Some((program, reasons.clone())),
    };
    let reinstalled = install.is_some();
    if let Some((program, reasons)) = install {
        ops.push(Phase::MarksIn, Op::Install { program: Box::new(program.clone()), reasons });
    }
    if !observed.leftovers.is_empty() {
        ops.push(Phase::Leftovers, Op::RemoveLeftovers(observed.leftovers.clone()));
    }
    for family in Family::ALL {
        match (desired.routes.get(family), observed.routes.get(family)) {
            (Some(want), have) if have != Some(want) => ops.push(Phase::RoutesIn, Op::PutRoute(*want)),
            (None, Some(have)) => ops.push(Phase::RoutesOut, Op::DelRoute(family, have.range)),
            _ => {}
        }
    }
    let servers = differing_servers(&desired.virtual_servers, &observed.virtual_servers);
    let elements = differing_elements(&desired.elements, &observed.elements);
    let all = || desired.elements.keys().chain(observed.elements.keys());
    let targets = |marks: &BTreeSet<Mark>| led_to(marks, all(), &desired.elements, &observed.elements);
    diff_servers(&mut ops, &servers, desired, &observed.virtual_servers, &targets);
    diff_elements(&mut ops, &elements, desired, &observed.elements, reinstalled);
    free_reused_marks(&mut ops, &elements, desired, &observed.elements, reinstalled);
    trim_gaining_marks(&mut ops, &elements, desired, &observed.elements);
    ops.into_ops()
}

/// Changes for some keys only, against what we know we wrote.
pub fn plan(desired: &KernelState, known: &KernelState, touched: &Touched) -> Vec<Op> {
    let mut ops = Ordered::default();
    // A change of a service touches all of its elements.
    let targets =
        |marks: &BTreeSet<Mark>| led_to(marks, touched.elements.iter(), &desired.elements, &known.elements);
    diff_servers(&mut ops, &touched.virtual_servers, desired, &known.virtual_servers, &targets);
    diff_elements(&mut ops, &touched.elements, desired, &known.elements, false);
    free_reused_marks(&mut ops, &touched.elements, desired, &known.elements, false);
    trim_gaining_marks(&mut ops, &touched.elements, desired, &known.elements);
    ops.into_ops()
}

/// What is in only one of them, or not the same in both. Most often that is nothing: no list of all keys is made for it.
fn differing_servers(
    desired: &HashMap<VirtualServerKey, VirtualServer>,
    observed: &HashMap<VirtualServerKey, VirtualServer>,
) -> BTreeSet<VirtualServerKey> {
    let differs = |(key, want): &(&VirtualServerKey, &VirtualServer)| {
        observed.get(key).is_none_or(|have| have.config != want.config || have.reals != want.reals)
    };
    let wanted = desired.iter().filter(differs).map(|(key, _)| *key);
    wanted.chain(observed.keys().filter(|key| !desired.contains_key(key)).copied()).collect()
}

fn differing_elements(desired: &Elements, observed: &Elements) -> BTreeSet<Element> {
    if desired == observed {
        return BTreeSet::new();
    }
    let wanted = desired.iter().filter(|(element, mark)| observed.get(element) != Some(mark));
    let gone = observed.keys().filter(|element| !desired.contains_key(element));
    wanted.map(|(element, _)| element).chain(gone).copied().collect()
}

fn diff_servers(
    ops: &mut Ordered,
    keys: &BTreeSet<VirtualServerKey>,
    desired: &KernelState,
    observed: &HashMap<VirtualServerKey, VirtualServer>,
    targets: &dyn Fn(&BTreeSet<Mark>) -> LedTo,
) {
    let mut gone: BTreeSet<(VirtualServerKey, RealServerKey)> = BTreeSet::new();
    for key in keys {
        let before = ops.0.get(&Phase::ServersOut).map_or(0, Vec::len);
        match (desired.virtual_servers.get(key), observed.get(key)) {
            (Some(want), None) => {
                ops.push(Phase::ServersIn, Op::Ipvs(IpvsChange::AddService(*key, want.config.clone())));
                for (real, config) in want.reals.iter() {
                    ops.push(Phase::ServersIn, Op::Ipvs(IpvsChange::AddReal(*key, *real, *config)));
                }
            }
            (None, Some(have)) => {
                ops.push(Phase::ServersOut, Op::Ipvs(IpvsChange::DelService(*key)));
                gone.extend(have.reals.keys().map(|real| (*key, *real)));
            }
            (Some(want), Some(have)) => diff_server(ops, *key, want, have),
            (None, None) => {}
        }
        for op in ops.0.get(&Phase::ServersOut).into_iter().flatten().skip(before) {
            if let Op::Ipvs(IpvsChange::DelReal(key, real)) = op {
                gone.insert((*key, *real));
            }
        }
    }
    let protocol = |key: &VirtualServerKey| {
        let told = |servers: &HashMap<VirtualServerKey, VirtualServer>| servers.get(key)?.protocol;
        told(&desired.virtual_servers).or_else(|| told(observed))
    };
    gone.retain(|(key, _)| protocol(key).is_none_or(|p| p == Protocol::Udp));
    if gone.is_empty() {
        return;
    }
    let by = targets(&gone.iter().map(|(key, _)| key.mark).collect());
    let mut flows = UdpFlows::new();
    for (key, real) in gone {
        let to = by.get(&key.mark).into_iter().flatten();
        let to = to.filter(|t| t.protocol == Protocol::Udp && Family::of(&t.addr) == key.family);
        for target in to {
            flows.entry(real).or_default().insert((target.addr, target.port));
        }
    }
    if !flows.is_empty() {
        ops.push(Phase::FlowsOut, Op::ForgetUdp(flows));
    }
}

/// What leads to a mark.
type LedTo = BTreeMap<Mark, BTreeSet<Target>>;

/// Which of these elements lead to one of these marks, or did.
fn led_to<'a>(
    marks: &BTreeSet<Mark>,
    elements: impl Iterator<Item = &'a Element>,
    desired: &Elements,
    observed: &Elements,
) -> LedTo {
    let mut out = LedTo::new();
    for element in elements {
        let (Element::Vip(target) | Element::Published(target)) = element else { continue };
        for mark in [desired.get(element), observed.get(element)].into_iter().flatten().flatten() {
            if marks.contains(mark) {
                out.entry(*mark).or_default().insert(*target);
            }
        }
    }
    out
}

fn diff_server(ops: &mut Ordered, key: VirtualServerKey, want: &VirtualServer, have: &VirtualServer) {
    if want.config != have.config {
        ops.push(Phase::ServersIn, Op::Ipvs(IpvsChange::SetService(key, want.config.clone())));
    }
    for (real, config) in want.reals.iter() {
        match have.reals.get(real) {
            None => ops.push(Phase::ServersIn, Op::Ipvs(IpvsChange::AddReal(key, *real, *config))),
            Some(old) if old != config => {
                // One that takes less must not go down before its replacement is there.
                let phase = if config.weight < old.weight { Phase::ServersOut } else { Phase::ServersIn };
                ops.push(phase, Op::Ipvs(IpvsChange::SetReal(key, *real, *config)));
            }
            Some(_) => {}
        }
    }
    for real in have.reals.keys().filter(|real| !want.reals.contains_key(*real)) {
        ops.push(Phase::ServersOut, Op::Ipvs(IpvsChange::DelReal(key, *real)));
    }
}

fn diff_elements(
    ops: &mut Ordered,
    keys: &BTreeSet<Element>,
    desired: &KernelState,
    observed: &Elements,
    reinstalled: bool,
) {
    // An installation brings exactly the desired elements with it, in one step.
    if reinstalled {
        return;
    }
    for element in keys {
        match (desired.elements.get(element), observed.get(element)) {
            (Some(want), have) if have != Some(want) => {
                let phase = match (element.is_mark(), *want) {
                    (false, _) => Phase::EndpointsIn,
                    (true, Some(Mark::NOWHERE)) if have.is_some() => Phase::MarksOut,
                    (true, _) => Phase::MarksIn,
                };
                ops.push(phase, Op::Element(ElementChange::Put(*element, *want)));
            }
            (None, Some(_)) => {
                let phase = if element.is_mark() { Phase::MarksOut } else { Phase::EndpointsOut };
                ops.push(phase, Op::Element(ElementChange::Del(*element)));
            }
            _ => {}
        }
    }
}

/// An entry that leads to a mark whose server is about to get destinations, and that is not to lead
/// there any more, goes first: refused is better than answered by another service.
fn free_reused_marks(
    ops: &mut Ordered,
    keys: &BTreeSet<Element>,
    desired: &KernelState,
    observed: &Elements,
    reinstalled: bool,
) {
    let growing: BTreeSet<Mark> = ops
        .0
        .get(&Phase::ServersIn)
        .into_iter()
        .flatten()
        .filter_map(|op| match op {
            Op::Ipvs(IpvsChange::AddReal(key, ..) | IpvsChange::SetReal(key, ..)) => Some(key.mark),
            _ => None,
        })
        .collect();
    if growing.is_empty() {
        return;
    }
    for element in keys {
        let Some(Some(mark)) = observed.get(element) else { continue };
        let want = desired.elements.get(element);
        if growing.contains(mark) && want != Some(&Some(*mark)) {
            // What is published goes on being so, or a socket of the host would answer for a moment. (Into sets that are to be
            // made anew nothing can be written.)
            let freed = match (element, want) {
                (Element::Published(_) | Element::Loopback(..), Some(_)) if !reinstalled => {
                    ElementChange::Put(*element, Some(Mark::NOWHERE))
                }
                _ => ElementChange::Del(*element),
            };
            // The same once more would find nothing to do.
            if let Some(out) = ops.0.get_mut(&Phase::MarksOut) {
                out.retain(|op| *op != Op::Element(freed.clone()));
            }
            ops.push(Phase::MarksFreed, Op::Element(freed));
        }
    }
}

/// A service that an entry is about to lead to for the first time lets go of destinations that are not
/// wanted before that, not after.
fn trim_gaining_marks(
    ops: &mut Ordered,
    keys: &BTreeSet<Element>,
    desired: &KernelState,
    observed: &Elements,
) {
    let Some(out) = ops.0.get_mut(&Phase::ServersOut) else { return };
    let gaining: BTreeSet<Mark> = keys
        .iter()
        .filter(|element| observed.get(element) != desired.elements.get(element))
        .filter_map(|element| desired.elements.get(element).copied().flatten())
        .collect();
    let goes = |op: &Op| matches!(op, Op::Ipvs(IpvsChange::DelService(key) | IpvsChange::DelReal(key, _) | IpvsChange::SetReal(key, ..)) if gaining.contains(&key.mark));
    let (trimmed, rest): (Vec<Op>, Vec<Op>) = std::mem::take(out).into_iter().partition(goes);
    *out = rest;
    if !trimmed.is_empty() {
        ops.0.entry(Phase::ServersTrimmed).or_default().extend(trimmed);
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::kernel::{RealServerConfig, VirtualServerConfig};

    #[test]
    fn only_flows_of_the_service_that_lost_a_destination_are_forgotten() {
        let target = |addr: &str, port| Target { addr: addr.parse().unwrap(), protocol: Protocol::Udp, port };
        let real = RealServerKey { addr: "10.244.1.11".parse().unwrap(), port: 5353 };
        let key = |mark| VirtualServerKey { family: Family::V4, mark: Mark(mark) };
        let server = |reals: &[RealServerKey]| VirtualServer {
            config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
            protocol: Some(Protocol::Udp),
            reals: std::sync::Arc::new(reals.iter().map(|r| (*r, RealServerConfig { weight: 1 })).collect()),
        };
        let mut have = KernelState::default();
        let vip = Element::Vip(target("10.200.0.5", 53));
        let published = Element::Published(target("192.168.50.1", 30053));
        let other = Element::Vip(target("10.200.0.6", 53));
        have.elements.extend([
            (vip, Some(Mark(256))),
            (published, Some(Mark(256))),
            (other, Some(Mark(257))),
        ]);
        have.virtual_servers.extend([(key(256), server(&[real])), (key(257), server(&[real]))]);
        let mut want = have.clone();
        want.virtual_servers.insert(key(256), server(&[]));
        let mut touched = Touched::default();
        touched.virtual_servers.insert(key(256));
        touched.elements.extend([vip, published]);
        let ops = plan(&want, &have, &touched);
        let by =
            [("10.200.0.5", 53), ("192.168.50.1", 30053)].map(|(addr, port)| (addr.parse().unwrap(), port));
        let flows = UdpFlows::from([(real, BTreeSet::from(by))]);
        assert_eq!(ops, [Op::Ipvs(IpvsChange::DelReal(key(256), real)), Op::ForgetUdp(flows)]);
    }

    #[test]
    fn flows_by_a_published_port_whose_server_took_nothing_any_more_are_forgotten_too() {
        let to: IpAddr = "192.168.50.1".parse().unwrap();
        let published = Element::Published(Target { addr: to, protocol: Protocol::Udp, port: 30053 });
        let real = RealServerKey { addr: "10.244.1.11".parse().unwrap(), port: 5353 };
        let key = VirtualServerKey { family: Family::V4, mark: Mark(256) };
        let server = VirtualServer {
            config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
            protocol: Some(Protocol::Udp),
            reals: std::sync::Arc::new([(real, RealServerConfig { weight: 0 })].into_iter().collect()),
        };
        let have = KernelState {
            elements: [(published, Some(Mark::NOWHERE))].into(),
            virtual_servers: [(key, server)].into(),
            ..KernelState::default()
        };
        let want = KernelState { elements: [(published, Some(Mark(256)))].into(), ..KernelState::default() };
        let touched = Touched { virtual_servers: [key].into(), elements: [published].into() };
        let flows = UdpFlows::from([(real, BTreeSet::from([(to, 30053)]))]);
        let ops = plan(&want, &have, &touched);
        assert!(ops.contains(&Op::ForgetUdp(flows)), "{ops:?}");
    }
}
