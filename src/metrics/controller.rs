//! What a controller tells Prometheus.

use std::sync::Arc;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use super::{Label, Series, process, write};

/// How a write to the API server ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// It was made.
    Done,
    /// The object had changed, or was gone: it is made again from what it is now.
    Conflict,
    /// It was refused, or there was no answer.
    Error,
}

/// What [`ControllerMetrics::wrote`] counts.
const WRITES: [&str; 4] = ["status", "pool", "headless", "event"];

/// All series of a controller. Clones are handles to the same ones.
#[derive(Clone)]
pub struct ControllerMetrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    leader: Gauge,
    services: Gauge,
    numbers: Family<[Label; 2], Gauge>,
    nodes: Family<[Label; 1], Gauge>,
    writes: Family<[Label; 2], Counter>,
}

impl Default for ControllerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl ControllerMetrics {
    /// All series at zero.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let (leader, services) = (Gauge::default(), Gauge::default());
        let (numbers, nodes) = (Family::default(), Family::default());
        let writes = Family::<[Label; 2], Counter>::default();
        let ours = registry.sub_registry_with_prefix("meshlb");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        ours.register("build", "Version of this program", build);
        ours.register("controller_leader", "1 while this controller leads", leader.clone());
        ours.register(
            "controller_services",
            "MeshServices that are accepted, as the leader sees them; 0 for others",
            services.clone(),
        );
        ours.register(
            "pool_numbers",
            "Virtual IPs and published ports by pool, as the leader sees them; what is free of ports is free in the publish range",
            numbers.clone(),
        );
        ours.register(
            "controller_nodes",
            "Nodes by what their MeshNode says, as the leader sees them",
            nodes.clone(),
        );
        ours.register("controller_writes", "Writes to the API server", writes.clone());
        registry.register_collector(Box::new(process::Process));
        // From the start, so that a rate has something to begin from.
        for of in WRITES {
            for outcome in [Written::Done, Written::Conflict, Written::Error] {
                drop(writes.get_or_create_owned(&[("of", of), ("outcome", label(outcome))]));
            }
        }
        Self(Arc::new(Inner { registry, leader, services, numbers, nodes, writes }))
    }

    /// Whether this one leads. One that does not has nothing to say about the rest.
    pub fn leads(&self, yes: bool) {
        self.0.leader.set(i64::from(yes));
        if !yes {
            self.0.services.set(0);
            self.0.numbers.clear();
            self.0.nodes.clear();
        }
    }

    /// How many MeshServices are served.
    pub fn services(&self, n: usize) {
        self.0.services.set(n as i64);
    }

    /// How many numbers of a pool are in use, and how many are free.
    pub fn pool(&self, pool: &'static str, used: u128, free: u128) {
        for (state, n) in [("used", used), ("free", free)] {
            let n = i64::try_from(n).unwrap_or(i64::MAX);
            self.0.numbers.get_or_create_owned(&[("pool", pool), ("state", state)]).set(n);
        }
    }

    /// How many nodes are in a state: `serving`, `failing` or `held_off`.
    pub fn nodes(&self, state: &'static str, n: usize) {
        self.0.nodes.get_or_create_owned(&[("state", state)]).set(n as i64);
    }

    /// A write of one kind (`status`, `pool`, `headless`, `event`) has ended.
    pub fn wrote(&self, of: &'static str, outcome: Written) {
        self.0.writes.get_or_create_owned(&[("of", of), ("outcome", label(outcome))]).inc();
    }
}

fn label(outcome: Written) -> &'static str {
    match outcome {
        Written::Done => "done",
        Written::Conflict => "conflict",
        Written::Error => "error",
    }
}

impl Series for ControllerMetrics {
    fn render(&self, openmetrics: bool) -> (&'static str, String) {
        write(&self.0.registry, openmetrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_there_from_the_start() {
        let text = ControllerMetrics::new().render(false).1;
        let series = "meshlb_controller_writes_total";
        let mut expected = crate::metrics::tests::documented(series, &["of", "outcome"]);
        let mut found: Vec<&str> = text.lines().filter(|l| l.starts_with(series)).collect();
        expected.sort();
        found.sort_unstable();
        assert_eq!((found.len(), found), (12, expected.iter().map(String::as_str).collect()));
    }

    #[test]
    fn series_have_their_names_and_a_follower_has_few() {
        let metrics = ControllerMetrics::new();
        metrics.leads(true);
        metrics.services(7);
        metrics.pool("ipv4", 7, 65_526);
        metrics.pool("ipv6", 7, u128::MAX);
        metrics.nodes("failing", 1);
        metrics.wrote("status", Written::Conflict);
        let text = metrics.render(false).1;
        for line in [
            "meshlb_controller_leader 1",
            "meshlb_controller_services 7",
            r#"meshlb_pool_numbers{pool="ipv4",state="used"} 7"#,
            r#"meshlb_pool_numbers{pool="ipv4",state="free"} 65526"#,
            r#"meshlb_pool_numbers{pool="ipv6",state="free"} 9223372036854775807"#,
            r#"meshlb_controller_nodes{state="failing"} 1"#,
            r#"meshlb_controller_writes_total{of="status",outcome="conflict"} 1"#,
            r#"meshlb_controller_writes_total{of="status",outcome="done"} 0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in:\n{text}");
        }
        metrics.leads(false);
        let text = metrics.render(false).1;
        assert!(text.contains("meshlb_controller_leader 0") && !text.contains("pool="), "{text}");
    }
}
