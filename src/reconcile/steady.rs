//! A wall clock that does not jump.

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};

/// Tells the time as it was when it was made, and what has passed since by a clock that nobody sets. Deadlines that outlive the
/// process are wall time; one that is kept in it must not come at once because somebody has set the clock forward.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    wall: Timestamp,
    since: Instant,
}

impl Steady {
    /// From what the wall clock says now.
    pub fn new() -> Self {
        Self { wall: Timestamp::now(), since: Instant::now() }
    }

    /// What it says.
    pub fn now(&self) -> Timestamp {
        self.when(Instant::now())
    }

    /// By how much the wall clock is ahead of it, or behind.
    pub fn ahead(&self, wall: Timestamp) -> SignedDuration {
        wall.duration_since(self.now())
    }

    fn when(&self, now: Instant) -> Timestamp {
        let passed = SignedDuration::try_from(now.saturating_duration_since(self.since));
        passed.ok().and_then(|passed| self.wall.checked_add(passed).ok()).unwrap_or(Timestamp::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_goes_by_what_has_passed() {
        let (wall, start) = (Timestamp::from_second(1_800_000_000).unwrap(), Instant::now());
        let clock = Steady { wall, since: start };
        assert_eq!(clock.when(start), wall);
        assert_eq!(clock.when(start + Duration::from_millis(1500)).as_millisecond(), 1_800_000_001_500);
    }
}
