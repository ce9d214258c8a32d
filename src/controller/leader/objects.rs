//! What is kept of the objects that are watched.

use k8s_openapi::api::core::v1::Service as CoreService;
use kube::{core::ObjectMeta, runtime::watcher};
use serde_json::Value;

use crate::{
    api,
    controller::{
        headless,
        mesh::{Core, Meta},
    },
    model::ids::{Protocol, ServiceKey},
};

/// Whether the API server does not have it, or does not let us read it.
pub(super) fn is_absent(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if matches!(status.code, 403 | 404))
}

/// Cluster-wide objects, as listings name them; they are asked for at the end of a list only.
pub(super) fn of_nodes<'a, T>(
    event: &watcher::Event<T>,
    names: impl Iterator<Item = &'a String>,
) -> Vec<ServiceKey> {
    match event {
        watcher::Event::InitDone => names.map(|name| ServiceKey::new("", name.as_str())).collect(),
        _ => Vec::new(),
    }
}

pub(super) fn meta_of(meta: &ObjectMeta) -> Meta {
    let created = meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second());
    Meta {
        uid: meta.uid.clone().unwrap_or_default(),
        resource_version: meta.resource_version.clone().unwrap_or_default(),
        generation: meta.generation,
        created: u64::try_from(created).unwrap_or(0),
    }
}

pub(super) fn core_of(service: &CoreService) -> Core {
    let owner = service
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true) && o.kind == api::KIND && o.api_version == api::API_VERSION);
    let (spec, ours) = (service.spec.as_ref(), owner.is_some());
    let number = |n: i32| u16::try_from(n).ok().filter(|n| *n > 0);
    let ports = spec.iter().flat_map(|s| s.ports.iter().flatten()).filter_map(|port| {
        let protocol: Protocol = port.protocol.as_deref().unwrap_or("TCP").parse().ok()?;
        Some((protocol, number(port.node_port?)?))
    });
    let health = spec.and_then(|s| s.health_check_node_port).and_then(number).map(|n| (Protocol::Tcp, n));
    Core {
        uid: service.metadata.uid.clone().unwrap_or_default(),
        owner: owner.map(|o| o.uid.clone()),
        node_ports: ports.chain(health).collect(),
        external_name: spec.is_some_and(|s| s.type_.as_deref() == Some("ExternalName")),
        spec: if ours {
            headless::part_of(&serde_json::to_value(spec).unwrap_or_default())
        } else {
            Value::Null
        },
    }
}
