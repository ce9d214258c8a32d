//! From the state a kernel should have and the state it has to an ordered list of changes. Pure.
//!
//! The order is the point. After every single operation, a packet for a VIP or a published port
//! either reaches an endpoint that the old or the new state gives it, or is refused:
//!
//! 1. sysctls;
//! 2. addresses of endpoints (masquerading, hairpin and the guard depend on them);
//! 3. marks that are about to serve somebody else lose their old entries;
//! 4. IPVS services and destinations that are new or take more;
//! 5. destinations that go, of services that an entry is about to lead to for the first time;
//! 6. routes that are gone: without rules that guard them, their addresses would be the host's;
//! 7. the fixed rules, and entries that lead packets to marks;
//! 8. the VIP route, so that no VIP is local before its rules are there;
//! 9. entries that no longer lead anywhere;
//! 10. IPVS services and destinations that go or take no more, then UDP flows that stick to them;
//! 11. addresses of endpoints that are gone, another renderer's leftovers.

mod diff;
mod op;
#[cfg(test)]
mod properties;
pub mod trace;

pub use diff::{Observed, plan, plan_all};
pub use op::{Op, Phase};
