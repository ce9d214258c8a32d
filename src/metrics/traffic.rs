//! Traffic of services and endpoints, from the kernel's counters.
//!
//! The kernel counts per destination, from 0 when one is added that was away for some minutes and has no connections left, and
//! goes on where it was otherwise. Endpoint series may therefore restart when an endpoint comes back; Prometheus' `rate` and `increase` take
//! that for the reset that it is. A *service's* series can't simply be the sum of its endpoints': the sum falls when an endpoint
//! leaves, and that would look like a reset with all the rest counted again. They add up what each
//! endpoint gained since the last scrape, and so never fall while the program runs. What an endpoint
//! gained between the last scrape and its end is not seen.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use crate::{
    dataplane::Counters,
    model::{
        ids::{Family, Protocol, Scope},
        kernel::RealServerKey,
    },
};

/// Where traffic numbers come from.
pub trait TrafficSource: Send {
    /// The newest numbers. Called once for each scrape, on a thread that may block for a moment; other
    /// scrapes wait meanwhile.
    fn snapshot(&self) -> Arc<Vec<ServiceTraffic>>;
}

/// One IPVS service as people know it: a service's port in one family and scope.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceTraffic {
    /// Namespace of the MeshService.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The port's name, or its number where it has none.
    pub port: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Address family.
    pub family: Family,
    /// Virtual IP or published port; a shared mark counts as `vip`.
    pub scope: Scope,
    /// Its destinations.
    pub endpoints: Vec<EndpointTraffic>,
}

/// One destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointTraffic {
    /// Address and port.
    pub address: RealServerKey,
    /// Pod name or another name of what is behind it; empty where unknown.
    pub target: Arc<str>,
    /// IPVS weight; 0 is draining.
    pub weight: u32,
    /// The kernel's counters since the destination was added.
    pub counters: Counters,
}

/// Label values of a service's series, in the order of [`SERVICE_LABELS`].
type ServiceLabels = [String; 6];
const SERVICE_LABELS: [&str; 6] = ["namespace", "service", "port", "protocol", "family", "scope"];

impl ServiceTraffic {
    fn labels(&self) -> ServiceLabels {
        [
            self.namespace.to_string(),
            self.name.to_string(),
            self.port.to_string(),
            self.protocol.to_string(),
            self.family.to_string(),
            match self.scope {
                Scope::Vip => "vip".into(),
                Scope::Ingress => "ingress".into(),
            },
        ]
    }
}

/// The values that only grow, in one order everywhere.
type Totals = [u64; 5];
/// Their names and help texts; the unit becomes part of the name.
const TOTALS: [(&str, Option<Unit>, &str); 5] = [
    ("connections", None, "Connections scheduled"),
    ("incoming_packets", None, "Packets from clients"),
    ("outgoing_packets", None, "Packets to clients"),
    ("incoming", Some(Unit::Bytes), "Bytes from clients"),
    ("outgoing", Some(Unit::Bytes), "Bytes to clients"),
];

fn totals(c: &Counters) -> Totals {
    [c.connections, c.in_packets, c.out_packets, c.in_bytes, c.out_bytes]
}

/// What is kept between scrapes for one service.
#[derive(Default)]
struct History {
    sum: Totals,
    last: HashMap<RealServerKey, (Totals, Instant)>,
    seen: Option<Instant>,
}

/// A destination that is taken out and added again soon goes on counting where it was: the kernel keeps it for two to three minutes
/// after its last connection (`ip_vs_dest_trash_expire` in `ip_vs_ctl.c`), which may be long.
const REMEMBERED: Duration = Duration::from_secs(30 * 60);

impl History {
    /// Adds what the endpoints gained. A value below the last one has started again from 0.
    fn advance(&mut self, endpoints: &BTreeMap<RealServerKey, &EndpointTraffic>, at: Instant) {
        self.seen = Some(at);
        let recent = |seen: &Instant| at.saturating_duration_since(*seen) < REMEMBERED;
        self.last.retain(|key, (_, seen)| endpoints.contains_key(key) || recent(seen));
        for (key, endpoint) in endpoints {
            let now = totals(&endpoint.counters);
            let last = self.last.insert(*key, (now, at)).map_or_else(Totals::default, |(last, _)| last);
            for i in 0..now.len() {
                let gained = now[i].checked_sub(last[i]).unwrap_or(now[i]);
                self.sum[i] = self.sum[i].wrapping_add(gained);
            }
        }
    }
}

#[derive(Default)]
struct State {
    source: Option<Box<dyn TrafficSource>>,
    histories: HashMap<ServiceLabels, History>,
}

/// Writes the traffic series at each scrape.
#[derive(Clone, Default)]
pub(super) struct Traffic(Arc<Mutex<State>>);

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Traffic")
    }
}

impl Traffic {
    pub(super) fn set_source(&self, source: Box<dyn TrafficSource>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).source = Some(source);
    }
}

/// One service, ready to be written: one row for each label set, since a series that comes twice makes
/// Prometheus refuse the whole scrape.
struct Row<'a> {
    labels: ServiceLabels,
    sum: Totals,
    endpoints: BTreeMap<RealServerKey, &'a EndpointTraffic>,
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(snapshot) = state.source.as_ref().map(|s| s.snapshot()) else { return Ok(()) };
        let mut services: BTreeMap<ServiceLabels, BTreeMap<RealServerKey, &EndpointTraffic>> =
            BTreeMap::new();
        for service in snapshot.iter() {
            let endpoints = services.entry(service.labels()).or_default();
            endpoints.extend(service.endpoints.iter().map(|e| (e.address, e)));
        }
        let now = Instant::now();
        // One that could not be read for once goes on where it was.
        let recent = |history: &History| history.seen.is_some_and(|at| now.duration_since(at) < REMEMBERED);
        state.histories.retain(|labels, history| services.contains_key(labels) || recent(history));
        let rows: Vec<Row<'_>> = services
            .into_iter()
            .map(|(labels, endpoints)| {
                let history = state.histories.entry(labels.clone()).or_default();
                history.advance(&endpoints, now);
                Row { labels, sum: history.sum, endpoints }
            })
            .collect();
        drop(state);
        write_totals(&mut encoder, &rows)?;
        write_gauges(&mut encoder, &rows)
    }
}

fn write_totals(encoder: &mut DescriptorEncoder<'_>, rows: &[Row<'_>]) -> fmt::Result {
    for (i, (name, unit, help)) in TOTALS.iter().enumerate() {
        let full = format!("meshlb_service_{name}");
        let help_text = format!("{help}, all endpoints together.");
        let mut metric = encoder.encode_descriptor(&full, &help_text, unit.as_ref(), MetricType::Counter)?;
        for row in rows {
            counter(&mut metric, &row.service_labels(), row.sum[i])?;
        }
        let full = format!("meshlb_endpoint_{name}");
        let help_text = format!("{help}, since the endpoint was last added.");
        let mut metric = encoder.encode_descriptor(&full, &help_text, unit.as_ref(), MetricType::Counter)?;
        for row in rows {
            for (key, endpoint) in &row.endpoints {
                let address = key.to_string();
                counter(
                    &mut metric,
                    &row.endpoint_labels(&address, &endpoint.target),
                    totals(&endpoint.counters)[i],
                )?;
            }
        }
    }
    Ok(())
}

/// An endpoint's value that goes up and down.
type EndpointGauge = fn(&EndpointTraffic) -> u32;
const ENDPOINT_GAUGES: [(&str, &str, EndpointGauge); 3] = [
    ("meshlb_endpoint_active_connections", "Established connections.", |e| e.counters.active),
    (
        "meshlb_endpoint_inactive_connections",
        "Connections that are closing, and UDP flows without recent packets.",
        |e| e.counters.inactive,
    ),
    ("meshlb_endpoint_weight", "IPVS weight; 0 takes no new connections.", |e| e.weight),
];

/// The same for a service: the sum of its endpoints.
const SERVICE_GAUGES: [(&str, &str, EndpointGauge); 2] = [
    ("meshlb_service_active_connections", "Established connections.", |e| e.counters.active),
    (
        "meshlb_service_inactive_connections",
        "Connections that are closing, and UDP flows without recent packets.",
        |e| e.counters.inactive,
    ),
];

fn write_gauges(encoder: &mut DescriptorEncoder<'_>, rows: &[Row<'_>]) -> fmt::Result {
    for (name, help, value) in ENDPOINT_GAUGES {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for row in rows {
            for (key, endpoint) in &row.endpoints {
                let address = key.to_string();
                let labels = row.endpoint_labels(&address, &endpoint.target);
                gauge(&mut metric, &labels, &value(endpoint))?;
            }
        }
    }
    for (name, help, value) in SERVICE_GAUGES {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for row in rows {
            let sum: u64 = row.endpoints.values().map(|e| u64::from(value(e))).sum();
            gauge(&mut metric, &row.service_labels(), &sum)?;
        }
    }
    let help = "Endpoints in the kernel; draining ones take no new connections.";
    let mut metric = encoder.encode_descriptor("meshlb_service_endpoints", help, None, MetricType::Gauge)?;
    for row in rows {
        let draining = row.endpoints.values().filter(|e| e.weight == 0).count();
        for (state, count) in [("ready", row.endpoints.len() - draining), ("draining", draining)] {
            let mut labels = row.service_labels();
            labels.push(("state", state));
            gauge(&mut metric, &labels, &(count as u64))?;
        }
    }
    Ok(())
}

type Labels<'a> = Vec<(&'static str, &'a str)>;

impl Row<'_> {
    fn service_labels(&self) -> Labels<'_> {
        SERVICE_LABELS.into_iter().zip(self.labels.iter().map(String::as_str)).collect()
    }

    fn endpoint_labels<'a>(&'a self, address: &'a str, target: &'a str) -> Labels<'a> {
        let mut labels = self.service_labels();
        labels.extend([("endpoint", address), ("target", target)]);
        labels
    }
}

fn counter(metric: &mut MetricEncoder<'_>, labels: &Labels<'_>, value: u64) -> fmt::Result {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn gauge(metric: &mut MetricEncoder<'_>, labels: &Labels<'_>, value: &impl EncodeGaugeValue) -> fmt::Result {
    metric.encode_family(labels)?.encode_gauge(value)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn endpoint(address: &str, weight: u32, connections: u64) -> EndpointTraffic {
        let socket: std::net::SocketAddr = address.parse().unwrap();
        EndpointTraffic {
            address: RealServerKey { addr: socket.ip(), port: socket.port() },
            target: format!("pod-{connections}\"x").into(),
            weight,
            counters: Counters { connections, in_bytes: 10 * connections, active: 1, ..Counters::default() },
        }
    }

    pub(crate) fn service(endpoints: Vec<EndpointTraffic>) -> ServiceTraffic {
        ServiceTraffic {
            namespace: "default".into(),
            name: "vote".into(),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            scope: Scope::Vip,
            endpoints,
        }
    }

    fn advance(history: &mut History, endpoints: &[EndpointTraffic]) -> u64 {
        advance_at(history, endpoints, Instant::now())
    }

    fn advance_at(history: &mut History, endpoints: &[EndpointTraffic], at: Instant) -> u64 {
        history.advance(&endpoints.iter().map(|e| (e.address, e)).collect(), at);
        history.sum[0]
    }

    #[test]
    fn an_endpoint_that_comes_back_soon_is_not_counted_twice() {
        let (mut history, address, start) = (History::default(), "10.244.1.11:8080", Instant::now());
        let mut count = |endpoints: &[EndpointTraffic], seconds| {
            advance_at(&mut history, endpoints, start + Duration::from_secs(seconds))
        };
        assert_eq!(count(&[endpoint(address, 1, 1000)], 0), 1000);
        // Nobody has looked for long.
        assert_eq!(count(&[endpoint(address, 1, 1000)], 7200), 1000);
        assert_eq!(count(&[], 7230), 1000);
        // The kernel has kept its counters.
        assert_eq!(count(&[endpoint(address, 1, 1001)], 7260), 1001);
        // After that time it has not.
        assert_eq!(count(&[], 10_000), 1001);
        assert_eq!(count(&[endpoint(address, 1, 1500)], 10_001), 2501);
    }

    #[test]
    fn a_services_total_never_falls() {
        let mut history = History::default();
        let (a, b) = ("10.244.1.11:8080", "10.244.2.12:8080");
        assert_eq!(advance(&mut history, &[endpoint(a, 1, 100), endpoint(b, 1, 50)]), 150);
        assert_eq!(advance(&mut history, &[endpoint(a, 1, 100), endpoint(b, 1, 50)]), 150);
        assert_eq!(advance(&mut history, &[endpoint(a, 1, 110)]), 160, "one has left");
        assert_eq!(advance(&mut history, &[endpoint(a, 1, 7)]), 167, "one was added anew");
        assert_eq!(advance(&mut history, &[endpoint(a, 1, 7), endpoint(b, 1, 2)]), 169);
        assert_eq!(advance(&mut history, &[]), 169);
    }
}
