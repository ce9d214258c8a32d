//! What the program tells Prometheus about itself, and about the traffic that it directs.
//!
//! [`Metrics`] is recorded into from anywhere and rendered by the admin server ([`crate::admin`]).

pub mod controller;
mod dns;
mod exposition;
mod process;
mod traffic;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

pub use dns::DnsMetrics;
pub use traffic::{EndpointTraffic, ServiceTraffic, TrafficSource};

/// Upper bounds in seconds. A change reaches the kernel in milliseconds; a full resync of a large node
/// takes seconds; beyond half a minute something is wrong anyway.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// What [`Metrics::drift`] counts: the kinds of [`crate::reconcile::Drift`].
const DRIFT: [&str; 7] =
    ["rules", "set_element", "ipvs_service", "ipvs_destination", "route", "sysctl", "ipvs_timeouts"];
/// What [`Metrics::writes`] counts.
const BACKENDS: [&str; 3] = ["ipvs", "netfilter", "host"];
/// What [`Metrics::problems`] is about.
const PROBLEMS: [&str; 6] = ["source", "services", "changes", "firewall", "state", "dns"];

/// How a reconcile round ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The kernel is as it should be.
    Success,
    /// Something could not be read or written.
    Failure,
}

/// How much of the kernel a reconcile round looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RoundKind {
    /// Everything was dumped and compared.
    Full,
    /// Only what changed in the desired state.
    Incremental,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
        }
    }
}

impl RoundKind {
    fn label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

type Label = (&'static str, &'static str);
type Timer<const N: usize> = Family<[Label; N], Histogram, fn() -> Histogram>;

fn timer() -> Histogram {
    Histogram::new(SECONDS)
}

/// What the admin server serves.
pub trait Series: Send + Sync {
    /// Everything, in OpenMetrics if `openmetrics` and else in the older text format, with its content type. It may block
    /// for a moment.
    fn render(&self, openmetrics: bool) -> (&'static str, String);
}

fn write(registry: &Registry, openmetrics: bool) -> (&'static str, String) {
    let mut text = String::new();
    // Writing into a String does not fail.
    if encode(&mut text, registry).is_err() {
        tracing::warn!("some metrics could not be written");
    }
    if openmetrics { (exposition::OPENMETRICS, text) } else { (exposition::TEXT, exposition::to_text(&text)) }
}

/// All series of an agent. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    traffic: traffic::Traffic,
    reconciles: Family<[Label; 2], Counter>,
    reconcile_seconds: Timer<1>,
    source_to_kernel: Histogram,
    drift: Family<[Label; 1], Counter>,
    writes: Family<[Label; 1], Counter>,
    problems: Family<[Label; 1], Gauge>,
    services: Gauge,
    programmed_generation: Gauge,
    last_success: Gauge<f64, AtomicU64>,
    in_sync: Gauge,
    dns: DnsMetrics,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All series at zero.
    pub fn new() -> Self {
        let traffic = traffic::Traffic::default();
        let mut inner = Inner {
            registry: Registry::default(),
            traffic: traffic.clone(),
            reconciles: Family::default(),
            reconcile_seconds: Family::new_with_constructor(timer),
            source_to_kernel: timer(),
            drift: Family::default(),
            writes: Family::default(),
            problems: Family::default(),
            services: Gauge::default(),
            programmed_generation: Gauge::default(),
            last_success: Gauge::default(),
            in_sync: Gauge::default(),
            dns: DnsMetrics::default(),
        };
        inner.register();
        inner.begin();
        inner.registry.register_collector(Box::new(traffic));
        inner.registry.register_collector(Box::new(process::Process));
        Self(Arc::new(inner))
    }

    /// One reconcile round.
    pub fn reconcile(&self, outcome: Outcome, kind: RoundKind, duration: Duration) {
        let kind = ("kind", kind.label());
        self.0.reconciles.get_or_create_owned(&[("outcome", outcome.label()), kind]).inc();
        self.0.reconcile_seconds.get_or_create(&[kind]).observe(duration.as_secs_f64());
        if outcome == Outcome::Success {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.0.last_success.set(now.as_secs_f64());
        }
    }

    /// The time from a change at the source (a watch event, a file) to the kernel that serves it.
    pub fn source_to_kernel(&self, duration: Duration) {
        self.0.source_to_kernel.observe(duration.as_secs_f64());
    }

    /// `n` things of a kind (see [`crate::reconcile::Drift`]) were not as we had left them.
    pub fn drift(&self, kind: &'static str, n: u64) {
        self.0.drift.get_or_create_owned(&[("kind", kind)]).inc_by(n);
    }

    /// `n` more writing commands were sent to a backend (`ipvs`, `netfilter`, `host`).
    pub fn writes(&self, backend: &'static str, n: u64) {
        self.0.writes.get_or_create_owned(&[("backend", backend)]).inc_by(n);
    }

    /// How many things are wrong at present, of one kind: `source`, `services`, `changes`, `firewall`, `state` or `dns`.
    pub fn problems(&self, of: &'static str, n: usize) {
        self.0.problems.get_or_create_owned(&[("of", of)]).set(n as i64);
    }

    /// How many services are programmed at present.
    pub fn services(&self, n: usize) {
        self.0.services.set(n as i64);
    }

    /// How many turns there were.
    pub fn programmed_generation(&self, n: u64) {
        self.0.programmed_generation.set(i64::try_from(n).unwrap_or(i64::MAX));
    }

    /// Whether the kernel is as it should be.
    pub fn in_sync(&self, yes: bool) {
        self.0.in_sync.set(i64::from(yes));
    }

    /// Series of the DNS server.
    pub fn dns(&self) -> &DnsMetrics {
        &self.0.dns
    }

    /// Where traffic series come from; without it there are none.
    pub fn set_traffic_source(&self, source: Box<dyn TrafficSource>) {
        self.0.traffic.set_source(source);
    }
}

impl Series for Metrics {
    /// Asks the traffic source.
    fn render(&self, openmetrics: bool) -> (&'static str, String) {
        write(&self.0.registry, openmetrics)
    }
}

impl Inner {
    /// All that is counted is there from the start, with 0: of a series that begins with 1, `increase()` sees nothing.
    fn begin(&self) {
        for outcome in [Outcome::Success, Outcome::Failure] {
            for kind in [RoundKind::Full, RoundKind::Incremental] {
                let labels = [("outcome", outcome.label()), ("kind", kind.label())];
                drop(self.reconciles.get_or_create_owned(&labels));
            }
        }
        for kind in DRIFT {
            drop(self.drift.get_or_create_owned(&[("kind", kind)]));
        }
        for backend in BACKENDS {
            drop(self.writes.get_or_create_owned(&[("backend", backend)]));
        }
        for of in PROBLEMS {
            drop(self.problems.get_or_create_owned(&[("of", of)]));
        }
        self.dns.begin();
    }

    fn register(&mut self) {
        let registry = self.registry.sub_registry_with_prefix("meshlb");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of this program", build);
        registry.register("reconciles", "Reconcile rounds", self.reconciles.clone());
        registry.register_with_unit(
            "reconcile_duration",
            "Duration of reconcile rounds",
            Unit::Seconds,
            self.reconcile_seconds.clone(),
        );
        registry.register_with_unit(
            "source_to_kernel",
            "Time from a change at the source until the kernel serves it",
            Unit::Seconds,
            self.source_to_kernel.clone(),
        );
        registry.register(
            "drift",
            "Kernel objects of ours that someone else had changed or removed",
            self.drift.clone(),
        );
        registry.register("kernel_writes", "Writing commands sent to the kernel", self.writes.clone());
        registry.register("problems", "Things that are wrong on this node at present", self.problems.clone());
        registry.register("services", "Services in the kernel at present", self.services.clone());
        registry.register(
            "programmed_generation",
            "Turns so far; grows with every change that has been programmed",
            self.programmed_generation.clone(),
        );
        registry.register_with_unit(
            "last_success_timestamp",
            "When the last reconcile round succeeded, since the Unix epoch; 0 before the first",
            Unit::Seconds,
            self.last_success.clone(),
        );
        registry.register("in_sync", "1 while the kernel is as it should be", self.in_sync.clone());
        self.dns.register(registry);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    use super::{
        traffic::tests::{endpoint, service},
        *,
    };

    struct Fixed(Arc<Vec<ServiceTraffic>>);

    impl TrafficSource for Fixed {
        fn snapshot(&self) -> Arc<Vec<ServiceTraffic>> {
            self.0.clone()
        }
    }

    /// Metrics with something in every series.
    pub(crate) fn full() -> Metrics {
        let metrics = Metrics::new();
        metrics.reconcile(Outcome::Success, RoundKind::Full, Duration::from_millis(3));
        metrics.reconcile(Outcome::Failure, RoundKind::Incremental, Duration::from_secs(3));
        metrics.source_to_kernel(Duration::from_millis(7));
        metrics.drift("ipvs", 2);
        metrics.writes("netfilter", 5);
        metrics.problems("services", 1);
        metrics.services(3);
        metrics.programmed_generation(12);
        metrics.in_sync(true);
        let endpoints = vec![endpoint("10.244.1.11:8080", 1, 100), endpoint("[fd00::2]:8080", 0, 50)];
        // The second is a duplicate, which must not give a series twice.
        let traffic = vec![service(endpoints.clone()), service(endpoints)];
        metrics.set_traffic_source(Box::new(Fixed(Arc::new(traffic))));
        metrics
    }

    #[test]
    fn series_have_their_names_and_values() {
        let (kind, text) = full().render(false);
        assert!(kind.starts_with("text/plain"));
        let service =
            r#"namespace="default",service="vote",port="http",protocol="TCP",family="IPv4",scope="vip""#;
        for line in [
            r#"meshlb_reconciles_total{outcome="success",kind="full"} 1"#.to_owned(),
            r#"meshlb_reconcile_duration_seconds_bucket{le="0.005",kind="full"} 1"#.to_owned(),
            r#"meshlb_source_to_kernel_seconds_bucket{le="30.0"} 1"#.to_owned(),
            r#"meshlb_drift_total{kind="ipvs"} 2"#.to_owned(),
            r#"meshlb_kernel_writes_total{backend="netfilter"} 5"#.to_owned(),
            format!("meshlb_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
            format!("meshlb_service_connections_total{{{service}}} 150"),
            format!("meshlb_service_incoming_bytes_total{{{service}}} 1500"),
            format!("meshlb_service_endpoints{{{service},state=\"ready\"}} 1"),
            format!("meshlb_service_endpoints{{{service},state=\"draining\"}} 1"),
            format!(
                r#"meshlb_endpoint_connections_total{{{service},endpoint="[fd00::2]:8080",target="pod-50\"x"}} 50"#
            ),
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in:\n{text}");
        }
        for name in
            ["process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_start_time_seconds "]
        {
            assert!(text.lines().any(|l| l.starts_with(name)), "no {name} in:\n{text}");
        }
    }

    /// What docs/metrics.md says of a label with a few values: the series that are to be there from the start, without others
    /// between the braces.
    pub(super) fn documented(series: &str, labels: &[&str]) -> Vec<String> {
        let path = format!("{}/docs/metrics.md", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let row = text.lines().find(|l| l.starts_with(&format!("| `{series}`"))).unwrap().replace("\\|", "/");
        let values = |label: &str| {
            let (_, values) =
                row.split_once(&format!("{label}=")).unwrap_or_else(|| panic!("{label}: {row}"));
            let end = values.find([',', ';', ' ']).unwrap();
            values[..end].split('/').map(str::to_owned).collect::<Vec<_>>()
        };
        let mut out = vec![String::new()];
        for label in labels {
            let values = values(label);
            let with = |start: &String| {
                let comma = if start.is_empty() { "" } else { "," };
                values.iter().map(|v| format!("{start}{comma}{label}=\"{v}\"")).collect::<Vec<_>>()
            };
            out = out.iter().flat_map(with).collect();
        }
        out.into_iter().map(|labels| format!("{series}{{{labels}}} 0")).collect()
    }

    #[test]
    fn what_is_counted_is_there_from_the_start() {
        let text = Metrics::new().render(false).1;
        for (series, labels, count) in [
            ("meshlb_reconciles_total", &["outcome", "kind"][..], 4),
            ("meshlb_drift_total", &["kind"], 7),
            ("meshlb_kernel_writes_total", &["backend"], 3),
            ("meshlb_problems", &["of"], 6),
            ("meshlb_dns_limited_total", &["reason"], 7),
        ] {
            let mut expected = documented(series, labels);
            assert_eq!(expected.len(), count, "{expected:?}");
            let mut found: Vec<&str> =
                text.lines().filter(|l| l.starts_with(&format!("{series}{{"))).collect();
            expected.sort();
            found.sort_unstable();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn openmetrics_ends_with_its_mark() {
        let (kind, text) = full().render(true);
        assert!(kind.starts_with("application/openmetrics-text"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn no_series_comes_twice() {
        let (_, text) = full().render(false);
        let mut series: Vec<_> = text
            .lines()
            .filter(|l| !l.starts_with('#'))
            .filter_map(|l| l.rsplit_once(' '))
            .map(|(s, _)| s)
            .collect();
        let all = series.len();
        series.sort_unstable();
        series.dedup();
        assert_eq!(series.len(), all);
    }

    #[test]
    fn promtool_is_content() {
        let Ok(mut promtool) = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        else {
            eprintln!("skipped: promtool is not installed");
            return;
        };
        let (_, text) = full().render(false);
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    }
}
