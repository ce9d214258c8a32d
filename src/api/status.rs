//! The status of a `MeshService`: written by the controller, read by people.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::values::{IpText, Protocol};

/// What is in force, as the controller sees it. Nobody else writes it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Default, Debug)]
#[serde(rename_all = "camelCase")]
pub struct MeshServiceStatus {
    /// Virtual IPs in force, at most one per family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    pub vips: Vec<IpText>,

    /// The ports that are in force, and the port of the nodes that each is published on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port", "protocol"]))]
    pub ports: Vec<PortStatus>,

    /// How many endpoints the service has, and how many of them get connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<EndpointCounts>,

    /// The same for `kubectl get`, whose columns can't list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,

    /// Accepted, Allocated, Programmed and Ready, with reasons and messages to act on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// The metadata.generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// One port of the service.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct PortStatus {
    /// Name of the port, if spec.ports gives it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub name: Option<String>,
    /// Protocol of the port: TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Port that clients of the virtual IP connect to.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// Last port of a range, which begins with `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub end_port: Option<i32>,
    /// Port on the nodes' own addresses, where it is published; of a range the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub published_port: Option<i32>,
}

impl PortStatus {
    /// How many ports it spans: 1 but for a range. Status that nobody can have written is one port.
    pub fn span(&self) -> u16 {
        let more = self.end_port.and_then(|end| end.checked_sub(self.port));
        more.and_then(|more| u16::try_from(more).ok()).map_or(1, |more| more.saturating_add(1))
    }
}

/// How many endpoints the service has, and how many of them get connections.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Default, Debug)]
pub struct EndpointCounts {
    /// Endpoints that get new connections: ready (all are with publishNotReadyAddresses), with one of the service's ports.
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// All endpoints in the service's EndpointSlices. One with an address of each family counts once.
    #[schemars(range(min = 0))]
    pub total: i32,
}

/// Texts for the columns of `kubectl get`.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Default, Debug)]
pub struct Summary {
    /// Ports of the service, separated by commas, such as "80/TCP,53/UDP".
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub ports: String,
    /// Published ports, separated by commas, such as "30080/TCP".
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub published: String,
    /// Ready endpoints and all of them, such as "2/3".
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub endpoints: String,
}
