//! The pool objects: one ConfigMap a pool, with all numbers that may be in use.
//!
//! A number is entered here before it is written into any status, and taken out only when no status has it. Each write
//! names the version that it replaces, and a new leader begins by writing every pool: what an earlier leader still had in
//! mind is refused from then on.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tracing::warn;

use super::{PATIENCE, numbers::Numbers, timed};
use crate::model::{
    ids::{Family, Protocol},
    node::NodeConfig,
};

/// Which pool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PoolId {
    /// Offsets in the VIP range of a family.
    Vips(Family),
    /// Published ports of a protocol.
    Ports(Protocol),
}

impl PoolId {
    /// All pools that a configuration has.
    pub fn all(config: &NodeConfig) -> Vec<Self> {
        let vips = config.ranges.iter().map(|(family, _)| Self::Vips(family));
        vips.chain(Protocol::ALL.into_iter().map(Self::Ports)).collect()
    }

    /// The name of its object.
    pub fn object(self) -> String {
        match self {
            Self::Vips(family) => format!("meshlb-pool-ipv{}", family.digit()),
            Self::Ports(protocol) => format!("meshlb-pool-{}", protocol.lower()),
        }
    }

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vips(Family::V4) => "ipv4",
            Self::Vips(Family::V6) => "ipv6",
            Self::Ports(protocol) => protocol.lower(),
        }
    }

    /// How many numbers it can give out.
    pub fn size(self, config: &NodeConfig) -> u128 {
        match self {
            Self::Vips(family) => config.ranges.get(family).map_or(0, |range| {
                let bits = u32::from(range.max_prefix_len() - range.prefix_len());
                let all = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
                // Network, ingress and DNS address; in IPv4 the broadcast address too.
                all.saturating_sub(if family == Family::V4 { 4 } else { 3 })
            }),
            Self::Ports(protocol) => {
                let reserved = |port: &u16| config.reserved.iter().any(|r| r.covers(protocol, *port));
                config.publish_range.clone().filter(|port| !reserved(port)).count() as u128
            }
        }
    }

    /// How many of these numbers are of those that it can give out.
    fn inside(self, config: &NodeConfig, numbers: &Numbers) -> u128 {
        let counts = |number: &&u128| match self {
            Self::Vips(_) => true,
            Self::Ports(_) => u16::try_from(**number).is_ok_and(|port| config.publish_range.contains(&port)),
        };
        numbers.0.iter().filter(counts).count() as u128
    }

    /// What its numbers count from.
    fn range(self, config: &NodeConfig) -> String {
        match self {
            Self::Vips(family) => config.ranges.get(family).map(ToString::to_string).unwrap_or_default(),
            Self::Ports(protocol) => format!("ports/{}", protocol.lower()),
        }
    }
}

/// Numbers by pool.
pub type Used = BTreeMap<PoolId, Numbers>;

/// The pool objects as this leader last wrote them.
pub struct Pools {
    api: Api<ConfigMap>,
    config: NodeConfig,
    objects: BTreeMap<PoolId, (ConfigMap, Numbers)>,
}

const NUMBERS: &str = "numbers";
const RANGE: &str = "range";
const LEADER: &str = "meshlb.dev/leader";

impl Pools {
    /// Takes the pools over: reads each and writes it anew in this leader's name.
    ///
    /// # Errors
    /// The API server can't be asked, does not allow it, or somebody else writes them too.
    pub async fn take(
        client: Client,
        namespace: &str,
        config: NodeConfig,
        identity: &str,
    ) -> Result<Self, kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(client, namespace);
        let mut objects = BTreeMap::new();
        for id in PoolId::all(&config) {
            let name = id.object();
            let old = timed(PATIENCE, api.get_opt(&name)).await?;
            let range = id.range(&config);
            let numbers = old.as_ref().map_or_else(Numbers::default, |old| read(old, &range));
            let mut new = object(&name, &range, identity, &numbers);
            let written = match old {
                Some(old) => {
                    new.metadata.resource_version = old.metadata.resource_version;
                    timed(PATIENCE, api.replace(&name, &PostParams::default(), &new)).await?
                }
                None => timed(PATIENCE, api.create(&PostParams::default(), &new)).await?,
            };
            objects.insert(id, (written, numbers));
        }
        Ok(Self { api, config, objects })
    }

    /// The numbers that are entered.
    pub fn used(&self) -> Used {
        self.objects.iter().map(|(id, (_, numbers))| (*id, numbers.clone())).collect()
    }

    /// Makes the objects hold these numbers. One that has changed since is a leader's that came after this one: nothing
    /// may be given out then. Returns how many objects were written.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub async fn write(&mut self, used: &Used) -> Result<usize, kube::Error> {
        let mut writes = 0;
        for (id, (object, had)) in &mut self.objects {
            let none = Numbers::default();
            let numbers = used.get(id).unwrap_or(&none);
            if numbers == had {
                continue;
            }
            let mut new = object.clone();
            let data = new.data.get_or_insert_default();
            data.insert(NUMBERS.to_owned(), numbers.to_string());
            data.insert(RANGE.to_owned(), id.range(&self.config));
            *object = timed(PATIENCE, self.api.replace(&id.object(), &PostParams::default(), &new)).await?;
            had.clone_from(numbers);
            writes += 1;
        }
        Ok(writes)
    }

    /// By pool: its name, how many numbers are entered, and how many more there are to give out. A port that a service asks
    /// for explicitly may be outside the publish range.
    pub fn levels(&self) -> impl Iterator<Item = (&'static str, u128, u128)> {
        self.objects.iter().map(|(id, (_, numbers))| {
            let free = id.size(&self.config).saturating_sub(id.inside(&self.config, numbers));
            (id.name(), numbers.0.len() as u128, free)
        })
    }
}

fn read(object: &ConfigMap, range: &str) -> Numbers {
    let field = |name: &str| object.data.as_ref().and_then(|data| data.get(name)).map_or("", String::as_str);
    if field(RANGE) != range {
        return Numbers::default();
    }
    field(NUMBERS).parse().unwrap_or_else(|e| {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        warn!("ConfigMap {name}: data.{NUMBERS}: {e}; it is made anew from the services' statuses");
        Numbers::default()
    })
}

fn object(name: &str, range: &str, identity: &str, numbers: &Numbers) -> ConfigMap {
    let data = [(RANGE, range.to_owned()), (NUMBERS, numbers.to_string())];
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([("app.kubernetes.io/managed-by".to_owned(), "meshlb".to_owned())].into()),
            annotations: Some([(LEADER.to_owned(), identity.to_owned())].into()),
            ..ObjectMeta::default()
        },
        data: Some(data.map(|(k, v)| (k.to_owned(), v)).into()),
        ..ConfigMap::default()
    }
}
