//! The status of a `MeshService`: written by the controller, read by people.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::values::{IpText, Protocol};

/// What is in force.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Default, Debug)]
#[serde(rename_all = "camelCase")]
pub struct MeshServiceStatus {
    /// Virtual IPs in force, at most one per family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    pub vips: Vec<IpText>,

    /// The ports and what they are published on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port", "protocol"]))]
    pub ports: Vec<PortStatus>,

    /// Endpoint counts.
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
    /// Name of the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub name: Option<String>,
    /// Its protocol.
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

/// Endpoint counts.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Default, Debug)]
pub struct EndpointCounts {
    /// Endpoints that serve.
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// All endpoints.
    #[schemars(range(min = 0))]
    pub total: i32,
}

/// Texts for the columns of `kubectl get`.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Default, Debug)]
pub struct Summary {
    /// Ports as PORT/PROTOCOL.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub ports: String,
    /// Published ports as PORT/PROTOCOL.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub published: String,
    /// READY/TOTAL.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub endpoints: String,
}
