//! What a file of manifests says, before it is known what the others say.

use std::sync::Arc;

use super::problem::Problem;
use crate::{
    api,
    model::{endpoints::Slice, ids::ServiceKey, service::Service, snapshot::Event},
};

/// Kind and name of an object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectId {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub key: ServiceKey,
}

impl std::fmt::Display for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.key)
    }
}

/// Kinds of objects that we use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// `meshlb.dev/v1alpha1 MeshService`.
    Service,
    /// `discovery.k8s.io/v1 EndpointSlice`.
    Slice,
}

impl Kind {
    /// Its name in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => api::KIND,
            Self::Slice => "EndpointSlice",
        }
    }

    /// The version of the API that it is read in.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Service => api::API_VERSION,
            Self::Slice => api::SLICE_API_VERSION,
        }
    }
}

/// An object in domain types.
#[derive(Clone, PartialEq, Debug)]
pub enum Object {
    /// A service.
    Service(Arc<Service>),
    /// A slice.
    Slice(Arc<Slice>),
}

impl Object {
    /// The event that brings it in.
    pub fn event(&self) -> Event {
        match self {
            Self::Service(service) => Event::Service(service.clone()),
            Self::Slice(slice) => Event::Slice(slice.clone()),
        }
    }
}

/// What a manifest comes to.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    /// It can be used.
    Good(Object),
    /// It is right, but must not be served: it asks for something that this program can't do yet.
    Withheld,
    /// It is wrong: its last good version stays in force.
    Wrong,
}

/// One object of a file.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// Which object.
    pub id: ObjectId,
    /// Where it starts.
    pub line: u64,
    /// What it comes to.
    pub verdict: Verdict,
}

/// What is in a file.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ParsedFile {
    /// Its objects, in order; none occurs twice.
    pub entries: Vec<Entry>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// Whether some object in it could not even be named, so that an object which is not in `entries` may
    /// still be meant to exist.
    pub incomplete: bool,
}
