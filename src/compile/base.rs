//! The part of the kernel state that does not depend on any service.

use std::{collections::BTreeMap, sync::Arc};

use crate::model::{
    ids::{Family, PerFamily},
    kernel::{
        BridgeSubnet, FamilyProgram, Program, Timeouts, VipRoute, VirtualServer, VirtualServerConfig,
        VirtualServerKey,
    },
    node::{NodeConfig, NodeFacts},
};

/// Rules, routes, sysctls and sentinels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Base {
    /// Parameters of the fixed rules.
    pub program: Program,
    /// AnyIP routes.
    pub routes: PerFamily<VipRoute>,
    /// Required sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// IPVS timeouts.
    pub timeouts: Option<Timeouts>,
    /// Services without destinations: while one is there, the kernel keeps IPVS's hooks registered, so
    /// that removing the last real service does not send its connections to the host's sockets.
    pub sentinels: BTreeMap<VirtualServerKey, VirtualServer>,
}

/// Compiles the base. A family is served when it has a range and the node has an address of it.
pub fn compile_base(
    config: &NodeConfig,
    facts: &NodeFacts,
    sysctls: BTreeMap<String, String>,
    masquerade_bridges: Vec<BridgeSubnet>,
    timeouts: Option<Timeouts>,
) -> Base {
    let mut families = PerFamily::default();
    let mut routes = PerFamily::default();
    let mut sentinels = BTreeMap::new();
    for family in Family::ALL {
        let (Some(range), Some(node), Some(ingress)) =
            (config.ranges.get(family), facts.primary.get(family), config.ingress(family))
        else {
            continue;
        };
        families.set(family, Some(FamilyProgram { range: *range, ingress, node: *node }));
        routes.set(family, Some(VipRoute { range: *range, source: *node }));
        sentinels.insert(
            VirtualServerKey { family, mark: config.mask.sentinel() },
            VirtualServer {
                config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
                protocol: None,
                reals: Arc::default(),
            },
        );
    }
    let uplinks = facts.uplinks.iter().cloned().collect();
    let outside = facts.outside.iter().cloned().collect();
    let program = Program { mask: config.mask.bits(), families, masquerade_bridges, uplinks, outside };
    Base { program, routes, sysctls, timeouts, sentinels }
}
