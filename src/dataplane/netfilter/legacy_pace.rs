//! How often a probe may look at iptables-legacy, which nothing tells of changes: each look starts programs.

use std::time::{Duration, Instant};

use super::{rules_iptables::Saved, xtables::Variant};
use crate::{dataplane::Error, model::ids::Family};

/// Where looking is cheap, healing takes no longer than this and a turn.
const INTERVAL: Duration = Duration::from_secs(2);
/// On a host with many rules a look costs more, so it is rarer: never more than a tenth of a core.
const REST: u32 = 10;

/// When the old tables were looked at, and what that cost.
#[derive(Debug, Default)]
pub(super) struct LegacyPace {
    last: Option<Instant>,
    cost: Duration,
}

impl LegacyPace {
    /// Whether another look is due.
    pub(super) fn due(&self) -> bool {
        let interval = INTERVAL.max(self.cost.saturating_mul(REST));
        self.last.is_none_or(|at| at.elapsed() >= interval)
    }

    /// They have just been looked at.
    pub(super) fn looked(&mut self) {
        self.last = Some(Instant::now());
    }

    /// Reads the rules of both families, and remembers what that cost.
    pub(super) fn look(&mut self) -> [(Family, Result<Saved, Error>); 2] {
        let before = children_cpu();
        let found = Family::ALL.map(|family| (family, Variant::Legacy.saved(family)));
        self.cost = children_cpu().saturating_sub(before);
        self.looked();
        found
    }
}

/// CPU time of the programs that we have run so far.
fn children_cpu() -> Duration {
    use nix::sys::{resource, time::TimeVal};
    let Ok(usage) = resource::getrusage(resource::UsageWho::RUSAGE_CHILDREN) else { return Duration::ZERO };
    let time = |t: TimeVal| {
        Duration::new(u64::try_from(t.tv_sec()).unwrap_or(0), 0)
            + Duration::from_micros(u64::try_from(t.tv_usec()).unwrap_or(0))
    };
    time(usage.user_time()) + time(usage.system_time())
}
