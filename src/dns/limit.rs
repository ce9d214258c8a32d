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
#[derive(Default, PartialEq, Eq, Debug)]
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
    all: Buckets,
    /// Of those the ones that are many times larger than their questions, which are what a forger wants.
    amplified: Buckets,
}

/// How many answers clients may still get.
#[derive(Debug)]
struct Buckets {
    per_second: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    by_client: HashMap<IpAddr, Bucket>,
    swept: Instant,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    seen: Instant,
}

/// An answer that is this many times as long as its question, or more, amplifies: twenty endpoints of a service, say.
const AMPLIFIES: usize = 8;
/// Of so many answers that a client may get one may amplify. Who wants more of them has TCP.
const AMPLIFIED: u32 = 20;
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
        Self {
            per_second,
            all: Buckets::new(per_second),
            amplified: Buckets::new(per_second.div_ceil(AMPLIFIED)),
        }
    }

    /// Whether one more answer to a client is within the limit. Those that get no answers (not `known`) share one, so that
    /// forged addresses of theirs neither fill the memory nor have others forgotten.
    pub fn take(&self, client: IpAddr, known: bool, now: Instant) -> bool {
        self.per_second == 0 || self.all.take(if known { client.to_canonical() } else { STRANGERS }, now)
    }

    /// The same of an answer that is this many times as long as its question.
    pub fn take_amplified(&self, client: IpAddr, times: usize, now: Instant) -> bool {
        self.per_second == 0 || times < AMPLIFIES || self.amplified.take(client.to_canonical(), now)
    }
}

impl Buckets {
    fn new(per_second: u32) -> Self {
        let state = State { by_client: HashMap::new(), swept: Instant::now() };
        Self { per_second: per_second.into(), state: Mutex::new(state) }
    }

    fn take(&self, client: IpAddr, now: Instant) -> bool {
        let full = self.per_second * BURST;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.swept) > SWEEP {
            state.by_client.retain(|_, b| now.saturating_duration_since(b.seen) < SWEEP);
            state.swept = now;
        }
        if state.by_client.len() >= MOST_CLIENTS {
            state.by_client.clear();
        }
        let bucket = state.by_client.entry(client).or_insert(Bucket { left: full, seen: now });
        let passed = now.saturating_duration_since(bucket.seen).as_secs_f64();
        bucket.left = (bucket.left + passed * self.per_second).min(full);
        // An answer is charged at the time when its question came, which may be before what was charged last.
        bucket.seen = bucket.seen.max(now);
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
    fn what_came_earlier_and_is_charged_later_earns_nothing() {
        let rate = Rate::new(10);
        let start = Instant::now();
        let got = |at| {
            let at = start + Duration::from_secs(at);
            (0..100).filter(|_| rate.take(ip("10.0.0.1"), true, at)).count()
        };
        assert_eq!([got(10), got(6), got(10), got(11)], [20, 0, 0, 10]);
    }

    #[test]
    fn answers_that_amplify_are_fewer() {
        let rate = Rate::new(100);
        let start = Instant::now();
        let take = |client: &str, times, at: u64| {
            let at = start + Duration::from_secs(at);
            (0..100).filter(|_| rate.take_amplified(ip(client), times, at)).count()
        };
        assert_eq!(take("10.0.0.1", 7, 0), 100);
        assert_eq!((take("10.0.0.1", 8, 0), take("10.0.0.2", 30, 0)), (10, 10));
        assert_eq!(take("10.0.0.1", 30, 1), 5);
        let [few, none] = [1, 0].map(Rate::new);
        assert_eq!((0..100).filter(|_| few.take_amplified(ip("10.0.0.1"), 9, start)).count(), 2);
        assert!((0..100).all(|_| none.take_amplified(ip("10.0.0.1"), 9, start)));
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
