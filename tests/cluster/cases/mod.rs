//! The cases, by subject.

use crate::Case;

mod controller;
mod crd;
mod families;
mod nodes;
mod requests;
mod services;
mod source;

/// All of them, in the order they run.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(crd::CASES);
    cases.extend(source::CASES);
    cases.extend(controller::CASES);
    cases.extend(services::CASES);
    cases.extend(families::CASES);
    cases.extend(nodes::CASES);
    cases.extend(requests::CASES);
    cases
}
