//! One change of a kernel, and how it is told to people.

use std::fmt;

use crate::{
    compile::Merged,
    dataplane::{ElementChange, IpvsChange},
    model::{
        ids::{Family, Mark, ServiceKey},
        kernel::{Program, PublishedFlows, Timeouts, UdpFlows, VipRoute},
    },
};

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Sets a sysctl; `was` is `None` where it could not be read.
    Sysctl {
        /// Path below /proc/sys.
        path: String,
        /// New value.
        value: String,
        /// Value found.
        was: Option<String>,
    },
    /// Sets IPVS's timeouts.
    Timeouts {
        /// New values.
        timeouts: Timeouts,
        /// Values found.
        was: Timeouts,
    },
    /// Changes the IPVS table.
    Ipvs(IpvsChange),
    /// Changes a set or map.
    Element(ElementChange),
    /// Puts the fixed rules in place, with all desired elements.
    Install {
        /// Their parameters.
        program: Box<Program>,
        /// What was missing or different.
        reasons: Vec<String>,
    },
    /// Adds the VIP route or replaces its source.
    PutRoute(VipRoute),
    /// Removes a VIP route.
    DelRoute(Family, ipnet::IpNet),
    /// Forgets UDP flows that our services led to these real servers.
    ForgetUdp(UdpFlows),
    /// Ends connections by published ports to a real server whose drain is over.
    CutFlows(PublishedFlows),
    /// Removes what another renderer left.
    RemoveLeftovers(Vec<String>),
}

/// Position of a change in the order; see the module's documentation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum Phase {
    Sysctls,
    EndpointsIn,
    MarksFreed,
    ServersIn,
    ServersTrimmed,
    RoutesOut,
    MarksIn,
    RoutesIn,
    MarksOut,
    ServersOut,
    FlowsOut,
    EndpointsOut,
    Leftovers,
}

impl Op {
    /// The service that the change is about, where it is about one.
    pub fn owner<'a>(&self, merged: &'a Merged) -> Option<&'a ServiceKey> {
        match self {
            Self::Element(ElementChange::Put(element, Some(Mark::NOWHERE))) => merged.owner_of(element),
            _ => merged.owner(self.mark()?),
        }
    }

    /// The mark that the change is about, where it is about one service.
    pub fn mark(&self) -> Option<Mark> {
        match self {
            Self::Ipvs(
                IpvsChange::AddService(key, _)
                | IpvsChange::SetService(key, _)
                | IpvsChange::DelService(key)
                | IpvsChange::AddReal(key, ..)
                | IpvsChange::SetReal(key, ..)
                | IpvsChange::DelReal(key, _),
            ) => Some(key.mark),
            Self::Element(ElementChange::Put(_, mark)) => *mark,
            _ => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { path, value, was } => {
                let name = path.replace('/', ".");
                write!(f, "~ sysctl {name} = {value}")?;
                was.as_ref().map_or(Ok(()), |was| write!(f, " (was {was})"))
            }
            Self::Timeouts { timeouts: t, was } => write!(
                f,
                "~ ipvs timeouts tcp {} tcpfin {} udp {} (was {} {} {})",
                t.tcp, t.tcp_fin, t.udp, was.tcp, was.tcp_fin, was.udp
            ),
            Self::Ipvs(change) => match change {
                IpvsChange::AddService(k, c) => write!(f, "+ ipvs {k} scheduler {}", c.scheduler),
                IpvsChange::SetService(k, c) => write!(f, "~ ipvs {k} scheduler {}", c.scheduler),
                IpvsChange::DelService(k) => write!(f, "- ipvs {k}"),
                IpvsChange::AddReal(k, r, c) => write!(f, "+ ipvs {k} -> {r} weight {}", c.weight),
                IpvsChange::SetReal(k, r, c) => write!(f, "~ ipvs {k} -> {r} weight {}", c.weight),
                IpvsChange::DelReal(k, r) => write!(f, "- ipvs {k} -> {r}"),
            },
            Self::Element(ElementChange::Put(e, Some(mark))) => write!(f, "+ set {e} mark {mark}"),
            Self::Element(ElementChange::Put(e, None)) => write!(f, "+ set {e}"),
            Self::Element(ElementChange::Del(e)) => write!(f, "- set {e}"),
            Self::Install { reasons, .. } => write!(f, "~ rules: {}", reasons.join("; ")),
            Self::PutRoute(r) => write!(f, "+ route local {} dev lo src {}", r.range, r.source),
            Self::DelRoute(_, range) => write!(f, "- route local {range} dev lo"),
            Self::ForgetUdp(flows) => {
                let names: Vec<_> = flows.keys().map(ToString::to_string).collect();
                write!(f, "- conntrack UDP flows to {}", names.join(", "))
            }
            Self::CutFlows(flows) => {
                let to: Vec<_> =
                    flows.to.iter().map(|(addr, port)| std::net::SocketAddr::new(*addr, *port)).collect();
                let to: Vec<_> = to.iter().map(ToString::to_string).collect();
                write!(f, "- conntrack {} connections by {} to {}", flows.protocol, to.join(", "), flows.real)
            }
            Self::RemoveLeftovers(what) => write!(f, "- leftovers: {}", what.join(", ")),
        }
    }
}
