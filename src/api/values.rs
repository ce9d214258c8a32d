//! What fields of a `MeshService` can hold: names out of a list, and texts of a form.

use kube::core::Rule;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! text {
    ($($(#[$meta:meta])* $name:ident { $($schema:tt)* })*) => {$(
        $(#[$meta])*
        #[derive(Serialize, Deserialize, JsonSchema, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[serde(transparent)]
        #[schemars(inline, extend($($schema)*))]
        pub struct $name(pub String);

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    )*};
}

text! {
    /// An IPv4 or IPv6 address.
    IpText { "maxLength" = 45 }
    /// A network in CIDR notation.
    CidrText { "maxLength" = 49 }
    /// The value of a label.
    LabelValue { "maxLength" = 63, "pattern" = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$" }
    /// A DNS label.
    DnsLabel { "maxLength" = 63, "pattern" = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" }
}

/// The rule on keys of labels, which a schema has no word for: a name of at most 63 characters, after a DNS name of at most 253
/// and `/` where there is one (`IsQualifiedName` in Kubernetes' `apimachinery/pkg/util/validation`).
pub(super) fn label_keys() -> Rule {
    Rule::new(
        "self.all(k, k.matches('^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$') && k.indexOf('/') <= 253)",
    )
    .message(
        "holds a key that no label has: letters, digits, '-', '_' and '.', at most 63, with a letter or digit at both ends; before them, if anything, a DNS name of at most 253 characters and '/'",
    )
}

/// An IPVS weight.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Weight(#[schemars(range(min = 0, max = 65535))] pub i32);

macro_rules! names {
    ($($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal : $doc:literal),+ $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug)]
        #[schemars(inline)]
        pub enum $name {
            $(#[doc = $doc] #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// As manifests write it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }
    )*};
}

names! {
    /// How clients find the endpoints.
    Mode { Vip = "VIP": "A virtual IP.", Dnsrr = "DNSRR": "DNS round robin." }
    /// An address family.
    IpFamily { V4 = "IPv4": "IPv4.", V6 = "IPv6": "IPv6." }
    /// One family or both.
    IpFamilyPolicy {
        SingleStack = "SingleStack": "One.",
        PreferDualStack = "PreferDualStack": "Both if there are ranges.",
        RequireDualStack = "RequireDualStack": "Both or none.",
    }
    /// Transport protocol.
    Protocol { Tcp = "TCP": "TCP.", Udp = "UDP": "UDP.", Sctp = "SCTP": "SCTP." }
    /// Which nodes answer a published port.
    PublishMode { Ingress = "Ingress": "Every node.", Host = "Host": "Nodes with an endpoint." }
    /// How packets reach an endpoint.
    Forwarding {
        Masquerade = "Masquerade": "Network address translation.",
        Tunnel = "Tunnel": "IP in IP.",
        DirectRoute = "DirectRoute": "The link-layer address is rewritten.",
    }
    /// Whether the connections of a client stay together.
    SessionAffinity { None = "None": "No.", ClientIp = "ClientIP": "By the client's address." }
    /// Which endpoints serve.
    TrafficPolicy { Cluster = "Cluster": "All.", Local = "Local": "Those on the same node." }
    /// How names answer.
    DnsAnswer { Shuffle = "Shuffle": "All addresses.", Single = "Single": "One address." }
    /// IPVS scheduler: rr (round robin, the default), wrr, lc (fewest connections), wlc, lblc, lblcr, dh
    /// (by destination), sh (by source), sed, nq, mh (Maglev hash by source), fo (fail over by weight) or
    /// ovf (overflow). With sessionAffinity ClientIP the default is mh.
    Scheduler {
        Rr = "rr": "Round robin.", Wrr = "wrr": "Weighted round robin.", Lc = "lc": "Least connections.",
        Wlc = "wlc": "Weighted least connections.", Lblc = "lblc": "Locality-based least connections.",
        Lblcr = "lblcr": "The same with replication.", Dh = "dh": "Destination hashing.",
        Sh = "sh": "Source hashing.", Sed = "sed": "Shortest expected delay.", Nq = "nq": "Never queue.",
        Mh = "mh": "Maglev hashing.", Fo = "fo": "Weighted fail over.", Ovf = "ovf": "Weighted overflow.",
    }
    /// Flag of a scheduler.
    SchedulerFlag {
        ShFallback = "sh-fallback": "sh: skip endpoints of weight 0.",
        ShPort = "sh-port": "sh: hash the port too.",
        MhFallback = "mh-fallback": "mh: skip endpoints of weight 0.",
        MhPort = "mh-port": "mh: hash the port too.",
    }
}

/// Preference for near endpoints.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, PartialEq, Eq, Default, Debug)]
#[schemars(inline)]
pub enum TrafficDistribution {
    /// No preference.
    #[default]
    #[serde(rename = "")]
    None,
    /// The zone of the client's node.
    PreferSameZone,
    /// The client's node.
    PreferSameNode,
}
