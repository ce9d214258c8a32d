//! What hickory's resolver counts (crate `metrics`), as series of ours.

use std::sync::Arc;

use metrics::{Counter, CounterFn, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

use crate::metrics::DnsMetrics;

/// Takes the resolver's counts in. Made the recorder of the thread that resolves.
#[derive(Debug)]
pub struct Counted(pub DnsMetrics);

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
                self.0.upstream(label("addr"), label("protocol"), label("status"))
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
