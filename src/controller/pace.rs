//! How much may be written at most.

use std::time::Instant;

/// So many at once, and so many a second when those are gone.
#[derive(Debug)]
pub struct Bucket {
    most: f64,
    a_second: f64,
    left: f64,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(most: u32, a_second: u32, now: Instant) -> Self {
        let most = f64::from(most);
        Self { most, a_second: f64::from(a_second), left: most, filled: now }
    }

    /// How many there are now.
    pub fn left(&mut self, now: Instant) -> u32 {
        let more = now.saturating_duration_since(self.filled).as_secs_f64() * self.a_second;
        self.left = (self.left + more).min(self.most);
        self.filled = now;
        // Never negative, and at most `most`.
        self.left as u32
    }

    /// Takes so many, where they are there.
    pub fn take(&mut self, n: u32, now: Instant) -> bool {
        let enough = self.left(now) >= n;
        if enough {
            self.left -= f64::from(n);
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_and_then_a_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(3, 10, start);
        assert!((0..3).all(|_| bucket.take(1, start)));
        assert!(!bucket.take(1, start));
        let later = start + Duration::from_millis(250);
        assert_eq!(bucket.left(later), 2);
        assert!(bucket.take(2, later) && !bucket.take(1, later));
        // Little by little is no less than at once.
        for i in 1..=10 {
            bucket.left(later + Duration::from_millis(10 * i));
        }
        assert!(bucket.take(1, later + Duration::from_millis(101)));
        assert_eq!(bucket.left(later + Duration::from_secs(60)), 3);
    }
}
