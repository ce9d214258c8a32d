//! Linux bridges with endpoints of this node behind them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::Engine;
use crate::{
    dataplane::{Error, host::plain_link_name},
    model::kernel::{BridgeSubnet, Element},
};

/// Bridges with local endpoints, and how their replies are brought back to us.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Bridges {
    /// Families that need `bridge-nf-call-*`.
    pub(super) sysctls: BTreeSet<&'static str>,
    /// Where the sysctl can't be had: the file is missing, or can't be written.
    pub(super) masquerade: Vec<BridgeSubnet>,
    /// The same, but with names that no rule can hold.
    pub(super) unnamed: BTreeSet<String>,
}

impl Engine {
    /// Looks where the endpoints of this node are, once they are compiled.
    pub(super) fn refresh_bridges(&mut self) -> Result<(), Error> {
        let (first, last) =
            (Element::Local(Ipv4Addr::UNSPECIFIED.into()), Element::Local(Ipv6Addr::from(u128::MAX).into()));
        let local = self
            .merged
            .state()
            .elements
            .range(first..=last)
            .filter_map(|(e, _)| if let Element::Local(addr) = e { Some(*addr) } else { None })
            .collect();
        self.set_bridges(&local)
    }

    /// The same before anything is compiled, from the source alone: the rules depend on it, and the kernel is then
    /// compared with the right ones at the first look.
    pub(super) fn foresee_bridges(&mut self) -> Result<(), Error> {
        let mut local = BTreeSet::new();
        for service in self.snapshot.services().values() {
            for slice in self.snapshot.slices_for(service) {
                let here =
                    slice.endpoints.iter().filter(|e| e.node.as_ref() == Some(&self.settings.node.name));
                local.extend(here.map(|e| e.address));
            }
        }
        self.set_bridges(&local)
    }

    /// Bridges with local endpoints need `bridge-nf-call-*`, or masquerading where that can't be had.
    fn set_bridges(&mut self, local: &BTreeSet<IpAddr>) -> Result<(), Error> {
        let mut bridges = Bridges::default();
        if !local.is_empty() {
            for bridge in self.dataplane.host.bridges_of(local)? {
                let path = match bridge.subnet {
                    IpNet::V4(_) => "net/bridge/bridge-nf-call-iptables",
                    IpNet::V6(_) => "net/bridge/bridge-nf-call-ip6tables",
                };
                if self.dataplane.host.can_have(path, "1")? {
                    bridges.sysctls.insert(path);
                } else if plain_link_name(&bridge.bridge) {
                    bridges.masquerade.push(bridge);
                } else {
                    bridges.unnamed.insert(bridge.bridge);
                }
            }
        }
        if bridges != self.bridges {
            for name in bridges.unnamed.difference(&self.bridges.unnamed) {
                tracing::warn!(
                    "pods on the bridge {name:?} get no answers from endpoints on it: no rule can name it, and \
                     net.bridge.bridge-nf-call-iptables and -ip6tables can't be set to 1; load the module br_netfilter, or \
                     name it with letters, digits and . _ - @ only"
                );
            }
            self.bridges = bridges;
            self.set_base();
            self.trusted = false;
        }
        Ok(())
    }
}
