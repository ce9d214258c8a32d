//! The `MeshNode` object, `meshlb.dev/v1alpha1`: what a node's agent says about its node. It is written when that changes and
//! not when all goes well, so that a cluster at rest writes nothing.

// Each column has a type of its own.
#![allow(clippy::duplicated_attributes)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::values::IpText;

/// `kind` of a node's report.
pub const NODE_KIND: &str = "MeshNode";
/// So many failing services are named, at most: what `failing.services` may hold.
pub const NAMED: usize = 50;
/// So many services are listed whose spec a node does not understand: what `notUnderstood.services` may hold.
pub const REFUSALS: usize = 1000;
/// So many addresses are listed, at most.
pub const ADDRESSES: usize = 32;

/// Why a node does not serve the spec of a service as it is: its agent refuses it, and the controller does not.
pub const NOT_UNDERSTOOD: &str = "NotUnderstood";

/// The condition that says whether the node serves what it should.
pub const SERVING: &str = "Serving";
/// The condition that says whether a node that holds off has removed all that it had programmed.
pub const CLEANED_UP: &str = "CleanedUp";
/// Reason of [`SERVING`] while an uninstallation is under way.
pub const HELD_OFF: &str = "HeldOff";

/// Nothing is asked of a node: the object has a status only.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, PartialEq, Default, Debug)]
#[kube(
    group = "meshlb.dev",
    version = "v1alpha1",
    kind = "MeshNode",
    plural = "meshnodes",
    shortname = "mn",
    category = "meshlb",
    status = "MeshNodeStatus",
    derive = "PartialEq",
    doc = "A MeshNode is what the meshlb agent of one node says about it, under the name of the Node. The agent alone writes it: when something changes, at most every 10 seconds, and never to say that a change went well.",
    printcolumn(
        name = "Serving",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Serving\")].status",
        description = "Whether the node serves what it should."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Serving\")].reason",
        description = "Why, in one word."
    ),
    printcolumn(
        name = "Failing",
        type_ = "integer",
        json_path = ".status.failing.count",
        description = "Services that something of the node keeps from being served as they should be."
    ),
    printcolumn(
        name = "Not-Understood",
        type_ = "integer",
        json_path = ".status.notUnderstood.count",
        description = "Services whose spec the agent does not accept and the controller does.",
        priority = 1
    ),
    printcolumn(
        name = "Renderer",
        type_ = "string",
        json_path = ".status.renderer",
        description = "How netfilter is programmed."
    ),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.version",
        description = "Version of the agent."
    ),
    printcolumn(
        name = "Addresses",
        type_ = "string",
        json_path = ".status.addresses",
        description = "Addresses that published ports answer on.",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Serving\")].message",
        description = "Why, in a sentence.",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct MeshNodeSpec {}

/// What the node's agent says.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Default, Debug)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeStatus {
    /// Version of the agent that wrote this, such as 0.1.0.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub version: String,

    /// How the node's netfilter is programmed: iptables-nft, iptables-legacy or nftables. Absent where the agent could not
    /// find out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub renderer: String,

    /// Addresses of the node that published ports answer on, in order; the first 32 of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub addresses: Vec<IpText>,

    /// Services that this node does not serve as it should, while others are served.
    #[serde(default)]
    pub failing: Failing,

    /// Services whose spec this node's agent does not accept and the controller does, for its version or its flags. Absent
    /// where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_understood: Option<NotUnderstood>,

    /// Serving: whether the kernel is as it should be, but for the failing services; False with the reason
    /// ProgrammingFailed, StartFailed or HeldOff. CleanedUp, only while the node holds off for an uninstallation: whether
    /// all that was ever programmed is gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Services that a node does not serve as it should.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Eq, Default, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Failing {
    /// How many there are for what is wrong on the node: those that are only not understood are in notUnderstood.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub count: i32,

    /// The first 50 of them by namespace and name, and, where there is room, those that are not understood.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["namespace", "name"]))]
    pub services: Vec<FailingService>,
}

/// A service that a node does not serve as it should.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct FailingService {
    /// Namespace of the MeshService.
    #[schemars(length(max = 63))]
    pub namespace: String,
    /// Name of the MeshService.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Why, in one word: PublishedPortHeld, VIPTaken, PublishedPortTaken, VIPUnusable, MarksExhausted, KernelRefused or
    /// NotUnderstood.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why, in a sentence of at most 512 characters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 512))]
    pub message: String,
    /// The metadata.generation that is not understood. Absent where what is wrong is no matter of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
}

/// Services whose spec a node's agent does not accept and the controller does.
#[derive(KubeSchema, Serialize, Deserialize, Clone, PartialEq, Eq, Default, Debug)]
#[serde(rename_all = "camelCase")]
pub struct NotUnderstood {
    /// How many services have a spec that this node's agent does not accept.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub count: i32,

    /// The first 1000 of them by namespace and name. Why is in the agent's log, and of the first ones in failing.services.
    // One owner writes all of it: with keys, every item would be in managedFields too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000), extend("x-kubernetes-list-type" = "atomic"))]
    pub services: Vec<RefusedSpec>,
}

/// A spec that a node's agent does not accept.
#[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, Debug)]
#[serde(rename_all = "camelCase")]
pub struct RefusedSpec {
    /// Namespace of the MeshService.
    #[schemars(length(max = 63))]
    pub namespace: String,
    /// Name of the MeshService.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The metadata.generation of that spec.
    pub generation: i64,
}
