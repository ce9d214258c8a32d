//! The Kubernetes face of meshlb: the `MeshNode` and `MeshService` objects, their schemas and rules, and the way from
//! manifests to the domain types of [`crate::model`].
//!
//! ```text
//! JSON value ─► structural (schema) ─► CEL rules ─► v1alpha1::MeshService ─► convert ─► model::Service
//!                    └──── the same as in the CRD: crd() ────┘                node_checks ┘
//! ```

pub mod convert;
pub mod crd;
pub mod error;
pub mod mesh_node;
pub mod node_checks;
mod quick;
mod schemas;
pub mod slice;
pub mod slice_rules;
pub mod status;
pub mod structural;
pub mod v1alpha1;
pub mod validate;
pub mod values;

pub use convert::{granted, granted_of, protocol, readable_status, to_service};
pub use error::{FieldError, Reason};
pub use mesh_node::{MeshNode, MeshNodeStatus};
pub use node_checks::{check_against_node, leave_out_vips};
pub use slice::to_slice;
pub use slice_rules::broken_slice_rules;
pub use v1alpha1::{MeshService, MeshServiceSpec};
pub use validate::{
    is_dns_subdomain, parse_endpoint_slice, parse_mesh_service, parse_served_endpoint_slice,
    prune_endpoint_slice,
};

/// `apiVersion` of our objects.
pub const API_VERSION: &str = "meshlb.dev/v1alpha1";
/// `kind` of a service.
pub const KIND: &str = "MeshService";
/// `apiVersion` of the EndpointSlices that are read.
pub const SLICE_API_VERSION: &str = "discovery.k8s.io/v1";
/// Label of an EndpointSlice that names the service it belongs to.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
