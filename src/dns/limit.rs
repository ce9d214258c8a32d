//! Who may ask, and how fast.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use ipnet::IpNet;

/// Ranges of addresses that belong to no one on the Internet: where pods and nodes mostly are. RFC 1918, RFC 6598, RFC 3927,
/// RFC 4193, RFC 4291, and loopback.
pub const PRIVATE: [&str; 9] = [
    "127.0.0.0/8",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
];

/// Clients that get answers.
#[derive(Debug)]
pub struct Allowed(Vec<IpNet>);

impl Allowed {
    /// Those in one of these ranges.
    pub fn new(ranges: Vec<IpNet>) -> Self {
        Self(ranges)
    }

    /// Whether a client gets answers.
    pub fn contains(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        self.0.iter().any(|range| range.contains(&client))
    }
}

/// Answers by UDP that a client address gets, so that nobody is flooded by forging it. One that asks faster is told to come by
/// TCP, in an answer no longer than its question.
#[derive(Debug)]
pub struct Rate {
    /// Answers a second; 0 is no limit.
    per_second: u32,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    by_client: HashMap<IpAddr, Bucket>,
    swept: Instant,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    seen: Instant,
}

/// A client may save up this many seconds' answers.
const BURST: f64 = 2.0;
/// Clients that have been silent are forgotten this often, and when there are too many.
const SWEEP: Duration = Duration::from_secs(10);
/// Forged addresses must not fill the memory: above this many in one sweep's time, all are forgotten.
const MOST_CLIENTS: usize = 100_000;
/// Whom nobody can be.
const STRANGERS: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

impl Rate {
    /// A limit of so many answers a second; 0 is none.
    pub fn new(per_second: u32) -> Self {
        let buckets = Buckets { by_client: HashMap::new(), swept: Instant::now() };
        Self { per_second, buckets: Mutex::new(buckets) }
    }

    /// Whether one more answer to a client is within the limit. Those that get no answers (not `known`) share one, so that
    /// forged addresses of theirs neither fill the memory nor have others forgotten.
    pub fn take(&self, client: IpAddr, known: bool, now: Instant) -> bool {
        if self.per_second == 0 {
            return true;
        }
        let rate = f64::from(self.per_second);
        let full = rate * BURST;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(buckets.swept) > SWEEP {
            buckets.by_client.retain(|_, b| now.saturating_duration_since(b.seen) < SWEEP);
            buckets.swept = now;
        }
        if buckets.by_client.len() >= MOST_CLIENTS {
            buckets.by_client.clear();
        }
        let client = if known { client.to_canonical() } else { STRANGERS };
        let bucket = buckets.by_client.entry(client).or_insert(Bucket { left: full, seen: now });
        let passed = now.saturating_duration_since(bucket.seen).as_secs_f64();
        bucket.left = (bucket.left + passed * rate).min(full);
        bucket.seen = now;
        let may = bucket.left >= 1.0;
        if may {
            bucket.left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn clients_have_their_own_limits() {
        let rate = Rate::new(10);
        let start = Instant::now();
        let take =
            |client: &str, known, at| (0..100).filter(|_| rate.take(ip(client), known, start + at)).count();
        let got = |client: &str, at: Duration| take(client, true, at);
        assert_eq!(got("10.0.0.1", Duration::ZERO), 20);
        assert_eq!(got("10.0.0.2", Duration::ZERO), 20);
        assert_eq!(got("10.0.0.1", Duration::from_secs(1)), 10);
        assert_eq!(got("10.0.0.1", Duration::from_secs(30)), 20);
        // Pods of one node, which have a /64 together.
        assert_eq!([got("fd00::1", Duration::ZERO), got("fd00::2", Duration::ZERO)], [20, 20]);
        assert_eq!(take("8.8.8.8", false, Duration::ZERO) + take("2001:db8::1", false, Duration::ZERO), 20);
        let free = Rate::new(0);
        assert!((0..1000).all(|_| free.take(ip("10.0.0.1"), true, start)));
    }

    #[test]
    fn private_ranges() {
        let allowed = Allowed::new(PRIVATE.iter().map(|r| r.parse().unwrap()).collect());
        for client in ["10.244.1.11", "::ffff:10.0.0.1", "fd00:244::1", "127.0.0.1", "100.64.1.1"] {
            assert!(allowed.contains(ip(client)), "{client}");
        }
        for client in ["8.8.8.8", "2001:db8::1", "::ffff:8.8.8.8", "172.32.0.1"] {
            assert!(!allowed.contains(ip(client)), "{client}");
        }
    }
}
