//! A spec that the controller accepts and this node does not.

/// What of a service is refused here, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// `metadata.generation` of the object whose spec it is: of a later one it says nothing.
    pub generation: i64,
    /// What is wrong with it.
    pub why: String,
}
