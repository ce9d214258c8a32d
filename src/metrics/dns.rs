//! Series of the DNS server.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hickory_proto::rr::Name;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{Label, Timer};
use crate::model::ids::Family as IpFamily;

/// Upper bounds in seconds: an answer of our own takes microseconds, a forwarded one as long as the upstream.
const SECONDS: [f64; 13] =
    [0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.025, 0.1, 0.25, 1.0, 2.5, 5.0];

/// Labels with one value that is not known beforehand.
type Text<const N: usize> = [(&'static str, String); N];

/// Why [`DnsMetrics::limited`] counts.
const REASONS: [&str; 7] = ["rate", "client", "connections", "forwards", "early", "noise", "send"];

/// What counts one answer.
#[derive(Clone, Debug)]
struct Answered {
    number: Counter,
    seconds: Histogram,
}

/// All series of the DNS server. Clones are handles to the same ones.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    queries: Family<[Label; 3], Counter>,
    seconds: Timer<1>,
    /// Of these for the commonest answers, by family and transport, as soon as there was one: looking them up by their labels
    /// takes as long as the answer.
    common: Arc<[OnceLock<Answered>; 4]>,
    dropped: Family<[Label; 1], Counter>,
    /// Lookups that were answered from the cache of forwarded names.
    pub cache_hits: Counter,
    /// Lookups that were not.
    pub cache_misses: Counter,
    /// Answers in that cache.
    pub cache_entries: Gauge,
    upstream: Family<Text<4>, Counter>,
    upstream_up: Family<Text<2>, Gauge>,
    listening: Family<Text<2>, Gauge>,
    /// Names of services and aliases.
    pub names: Gauge,
    /// From seeing a change to answering it.
    change_seconds: Histogram,
}

fn timer() -> Histogram {
    Histogram::new(SECONDS)
}

/// Labels of an upstream: it may be asked for several zones.
fn asked(upstream: SocketAddr, zone: &Name) -> Text<2> {
    [("upstream", upstream.to_string()), ("zone", zone.to_ascii())]
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self {
            queries: Family::default(),
            seconds: Family::new_with_constructor(timer),
            common: Arc::default(),
            dropped: Family::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            cache_entries: Gauge::default(),
            upstream: Family::default(),
            upstream_up: Family::default(),
            listening: Family::default(),
            names: Gauge::default(),
            change_seconds: super::timer(),
        }
    }
}

impl Answered {
    fn count(&self, took: Duration) {
        self.number.inc();
        self.seconds.observe(took.as_secs_f64());
    }
}

impl DnsMetrics {
    /// One answer. `from` says who gave it: `mesh`, `forward` or `refused`.
    pub fn answered(
        &self,
        kind: &'static str,
        code: &'static str,
        transport: &'static str,
        from: &'static str,
        took: Duration,
    ) {
        self.answered_series(kind, code, transport, from).count(took);
    }

    fn answered_series(
        &self,
        kind: &'static str,
        code: &'static str,
        transport: &'static str,
        from: &'static str,
    ) -> Answered {
        let labels = [("type", kind), ("rcode", code), ("transport", transport)];
        let seconds = self.seconds.get_or_create(&[("from", from)]).clone();
        Answered { number: self.queries.get_or_create_owned(&labels), seconds }
    }

    /// An answer of ours with addresses.
    pub fn answered_address(&self, family: IpFamily, transport: &'static str, took: Duration) {
        let (kind, place) = match family {
            IpFamily::V4 => ("A", 0),
            IpFamily::V6 => ("AAAA", 2),
        };
        let place = place + usize::from(transport == "tcp");
        let series = || self.answered_series(kind, "NOERROR", transport, "mesh");
        match self.common.get(place) {
            Some(common) => common.get_or_init(series).count(took),
            None => series().count(took),
        }
    }

    /// A query without the answer that it asked for: `rate` (told to come by TCP), `client` (not allowed),
    /// `connections`, `forwards` (too many at once), `early` (the source has not been read), `noise`; or an answer that could
    /// not be sent at once, `send`.
    pub fn limited(&self, why: &'static str) {
        self.dropped.get_or_create_owned(&[("reason", why)]).inc();
    }

    /// The counter of an upstream's answers of one kind to questions about names in a zone.
    pub fn upstream(&self, upstream: SocketAddr, zone: &Name, protocol: &str, status: &str) -> Counter {
        let [upstream, zone] = asked(upstream, zone);
        self.upstream.get_or_create_owned(&[
            upstream,
            zone,
            ("protocol", protocol.to_owned()),
            ("status", status.to_owned()),
        ])
    }

    /// Whether an upstream answers that is asked for a zone.
    pub fn upstream_up(&self, upstream: SocketAddr, zone: &Name, up: bool) {
        self.upstream_up.get_or_create_owned(&asked(upstream, zone)).set(i64::from(up));
    }

    /// Whether an address is served.
    pub fn listening(&self, address: &str, transport: &str, yes: bool) {
        let labels = [("address", address.to_owned()), ("transport", transport.to_owned())];
        self.listening.get_or_create_owned(&labels).set(i64::from(yes));
    }

    /// An address is none of this node's to serve.
    pub fn not_listening(&self, address: &str) {
        for transport in ["udp", "tcp"] {
            self.listening.remove(&[("address", address.to_owned()), ("transport", transport.to_owned())]);
        }
    }

    /// A change is answered this long after it was seen.
    pub fn changed(&self, took: Duration) {
        self.change_seconds.observe(took.as_secs_f64());
    }

    /// What is counted is there from the start.
    pub(super) fn begin(&self) {
        for reason in REASONS {
            drop(self.dropped.get_or_create_owned(&[("reason", reason)]));
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("dns");
        registry.register("queries", "Queries answered", self.queries.clone());
        registry.register_with_unit(
            "answer_duration",
            "Time from reading a query to its answer",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register(
            "limited",
            "Queries that were not answered as asked, by reason",
            self.dropped.clone(),
        );
        registry.register("cache_hits", "Forwarded lookups answered from the cache", self.cache_hits.clone());
        registry.register(
            "cache_misses",
            "Forwarded lookups that the cache had no answer to",
            self.cache_misses.clone(),
        );
        registry.register("cache_entries", "Answers in the cache", self.cache_entries.clone());
        registry.register("upstream_answers", "Answers of upstreams, by status", self.upstream.clone());
        registry.register("upstream_up", "1 while an upstream answers", self.upstream_up.clone());
        registry.register("listening", "1 while an address is served", self.listening.clone());
        registry.register("names", "Names of services and aliases", self.names.clone());
        registry.register_with_unit(
            "change",
            "Time from a change at the source until it is answered",
            Unit::Seconds,
            self.change_seconds.clone(),
        );
    }
}
