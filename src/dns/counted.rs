//! What hickory's resolver counts (crate `metrics`), as series of ours.

use std::{future::poll_fn, net::SocketAddr, pin::pin, sync::Arc};

use hickory_proto::rr::Name;
use metrics::{
    Counter, CounterFn, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    with_local_recorder,
};

use crate::metrics::DnsMetrics;

/// Takes the resolver's counts of one upstream in. The resolver tells upstreams apart by their addresses alone; here it is known
/// which port is asked, and for which zone.
#[derive(Debug)]
pub struct Counted {
    /// Where they go.
    pub metrics: DnsMetrics,
    /// Who is asked.
    pub upstream: SocketAddr,
    /// For which zone.
    pub zone: Name,
}

impl Counted {
    /// Counts what the resolver does for this future.
    pub async fn count<F: Future>(&self, act: F) -> F::Output {
        let mut act = pin!(act);
        poll_fn(|cx| with_local_recorder(self, || act.as_mut().poll(cx))).await
    }
}

#[derive(Debug)]
struct Count(prometheus_client::metrics::counter::Counter);

impl CounterFn for Count {
    fn increment(&self, value: u64) {
        self.0.inc_by(value);
    }
    fn absolute(&self, _: u64) {}
}

impl Recorder for Counted {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        use hickory_resolver::metrics as names;
        let label = |name: &str| key.labels().find(|l| l.key() == name).map_or("", |l| l.value());
        let counter = match key.name() {
            names::NAME_SERVER_QUERY_RESPONSES => {
                self.metrics.upstream(self.upstream, &self.zone, label("protocol"), label("status"))
            }
            _ => return Counter::noop(),
        };
        Counter::from_arc(Arc::new(Count(counter)))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}
