//! Endpoints that are gone finish their connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use jiff::Timestamp;

use super::{
    Engine,
    published::{given_up, published},
};
use crate::{
    compile::{
        RealState,
        service::{Drains, ports_from},
    },
    dataplane::{Error, executor::Failure},
    model::{
        ids::{Family, Mark, Protocol, Scope},
        kernel::{Element, PublishedFlows, RealServerKey, Target, UdpFlows, VirtualServerKey},
    },
    plan::Op,
};

impl Engine {
    /// Drains that run.
    pub fn drains(&self) -> &Drains {
        &self.drains
    }

    /// Drained real servers whose last connection is gone, or whose time is up, are let go.
    ///
    /// # Errors
    /// The first thing that could not be read, after all others were looked at.
    pub fn expire_drains(&mut self, now: Timestamp) -> Result<(), Error> {
        let mut unread = None;
        let mut looked: BTreeMap<_, BTreeMap<RealServerKey, u32>> = BTreeMap::new();
        let (mut over_now, mut asked) = (Vec::new(), Vec::new());
        let keys: Vec<_> = self.drains.iter().map(|(key, until)| (*key, *until)).collect();
        for ((vs, real), until) in keys {
            // Before its service has turned up nobody can say what connections it has by published ports.
            if until > now && self.merged.owner(vs.mark).is_none() {
                continue;
            }
            let mut over = until <= now;
            if !over {
                let active = match looked.get(&vs) {
                    Some(known) => known,
                    None => {
                        let counts = match self.dataplane.ipvs.reals(vs) {
                            Ok(reals) => reals.into_iter().map(|(real, (_, c))| (real, c.active)).collect(),
                            Err(e) => {
                                unread.get_or_insert(e);
                                continue;
                            }
                        };
                        looked.entry(vs).or_insert(counts)
                    }
                };
                over = active.get(&real).copied().unwrap_or(0) == 0;
            }
            if !over {
                continue;
            }
            // IPVS calls a connection inactive when the first of its two sides is closed (tcp_state_active_table), and knows
            // nothing of those by published ports: conntrack knows both kinds.
            match if until > now { self.flows(vs, real) } else { None } {
                Some(flows) => asked.push(((vs, real), flows)),
                None => over_now.push((vs, real)),
            }
        }
        // All at once: the table may be long.
        let (asked, flows): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
        match self.dataplane.host.open_flows(&flows) {
            Ok(open) => {
                over_now.extend(asked.into_iter().zip(open).filter(|(_, open)| !open).map(|(key, _)| key))
            }
            Err(e) => {
                unread.get_or_insert(e);
            }
        }
        for (vs, real) in over_now {
            self.drains.insert((vs, real), now);
            if let Some(owner) = self.merged.owner(vs.mark) {
                self.dirty.insert(owner.clone());
            }
        }
        unread.map_or(Ok(()), Err)
    }

    /// What of conntrack could not be done is tried again with the next changes, some times: a kernel without the means for it
    /// must not keep the node from ever being as it should.
    pub(super) fn keep_flows(&mut self, failures: &[Failure]) {
        /// Where the kernel lacks the means, and where it only did not work: with pauses that double, some 13 s, after which a node
        /// is not told to fail for it yet.
        const TRIES: (u8, u8) = (5, 8);
        let of_conntrack = |failure: &&Failure| matches!(failure.op, Op::ForgetUdp(_) | Op::CutFlows(_));
        self.flows_left = failures.iter().filter(of_conntrack).map(|failure| failure.op.clone()).collect();
        self.flows_tried = if self.flows_left.is_empty() { 0 } else { self.flows_tried.saturating_add(1) };
        let mut errors = failures.iter().filter(of_conntrack).map(|failure| &failure.error);
        let lacking = errors.all(|error| matches!(error, Error::MissingFeature { .. }));
        if self.flows_tried >= if lacking { TRIES.0 } else { TRIES.1 } {
            self.flows_left.clear();
        }
    }

    /// What is left of that. Who takes connections again keeps those that it has.
    pub(super) fn flows_to_retry(&self) -> Vec<Op> {
        if self.flows_left.is_empty() {
            return Vec::new();
        }
        let servers = &self.merged.state().virtual_servers;
        let published: Vec<_> =
            self.merged.services().values().flat_map(|service| published(service)).collect();
        let elements = &self.merged.state().elements;
        let takes = |real: &RealServerKey, (addr, port): &(IpAddr, u16)| {
            let target = Target { addr: *addr, protocol: Protocol::Udp, port: *port };
            let own = if addr.is_loopback() {
                Element::Loopback(Family::of(addr), Protocol::Udp, *port)
            } else {
                Element::Published(target)
            };
            let marks = [elements.get(&Element::Vip(target)), elements.get(&own)];
            marks.into_iter().flatten().flatten().any(|mark| {
                let server = servers.get(&VirtualServerKey { family: Family::of(&real.addr), mark: *mark });
                server.and_then(|s| s.reals.get(real)).is_some_and(|config| config.weight > 0)
            })
        };
        let still = |op: &Op| match op {
            Op::CutFlows(flows) if self.overdue.contains(flows) => None,
            Op::CutFlows(flows) => given_up(flows, &published).map(Op::CutFlows),
            Op::ForgetUdp(flows) => {
                let left = |(real, to): (&RealServerKey, &BTreeSet<(IpAddr, u16)>)| {
                    let to: BTreeSet<_> = to.iter().filter(|to| !takes(real, to)).copied().collect();
                    (!to.is_empty()).then_some((*real, to))
                };
                let flows: UdpFlows = flows.iter().filter_map(left).collect();
                (!flows.is_empty()).then_some(Op::ForgetUdp(flows))
            }
            op => Some(op.clone()),
        };
        self.flows_left.iter().filter_map(still).collect()
    }

    /// Connections to a real server of one of our services, by VIPs and published ports.
    fn flows(&self, vs: VirtualServerKey, real: RealServerKey) -> Option<PublishedFlows> {
        let service = self.merged.services().get(self.merged.owner(vs.mark)?)?;
        let mut flows = PublishedFlows { protocol: Protocol::Tcp, real, to: BTreeSet::new() };
        let family = Family::of(&real.addr);
        // By whatever mark: connections go on where they are when a policy changes it. But not where it still takes new ones.
        let goes_on = |mark: Option<Mark>| {
            let by = mark.map(|mark| (VirtualServerKey { family: vs.family, mark }, real));
            by.is_some_and(|by| service.reals.get(&by).is_some_and(|info| info.state == RealState::Ready))
        };
        for port in published(service).into_iter().filter(|port| port.has_real(&real) && !goes_on(port.mark))
        {
            flows.protocol = port.protocol;
            flows.to.extend(port.to.into_iter().filter(|(addr, _)| Family::of(addr) == family));
        }
        for port in &service.ports {
            let leads = |scope| port.marks.get(&scope) == Some(&vs.mark);
            let ingress = self.settings.node.ingress(family);
            let by_vip =
                service.vips.get(family).filter(|_| leads(Scope::Vip)).map(|ip| (*ip, port.spec.port));
            let published =
                ingress.zip(port.published).filter(|_| port.marks.values().any(|mark| *mark == vs.mark));
            for (addr, first) in by_vip.into_iter().chain(published) {
                flows.protocol = port.spec.protocol;
                flows.to.extend(ports_from(first, port.spec.span()).map(|number| (addr, number)));
            }
        }
        (!flows.to.is_empty()).then_some(flows)
    }

    /// When the next drain ends at the latest.
    pub fn next_drain(&self) -> Option<Timestamp> {
        self.drains.values().min().copied()
    }
}
