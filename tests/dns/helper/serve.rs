//! The agent without a kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Parser as _;
use meshlb::{
    allocate::{Allocations, Lock},
    cli::{self, Cli, agent, dns::Feed},
    compile::service::Drains,
    dataplane::{executor::Dataplane, fake::FakeKernel},
    metrics::Metrics,
    model::{
        ids::{PerFamily, ServiceKey},
        node::NodeFacts,
        refusal::Refusal,
    },
    plan::Op,
    reconcile::{
        Drift, Engine, Turn,
        agent::{Agent, Observer, Pace},
    },
    source::{self, Origin},
};

/// Feeds the DNS server as the real agent does.
struct Served(Feed);

impl Observer for Served {
    fn before_apply(&mut self, engine: &Engine, _: &[Op]) -> Result<(), String> {
        self.0.begin(engine);
        Ok(())
    }

    fn after_turn(&mut self, engine: &Engine, turn: &Turn, since: Option<Instant>) {
        self.0.update(engine, &turn.services, since);
    }

    fn turn_failed(&mut self, engine: &Engine, _: &str) {
        self.0.turn_failed(engine);
    }

    fn drift(&mut self, _: &str) {}

    fn drifted(&mut self, _: &Drift) {}

    fn refused(&mut self, _: BTreeMap<ServiceKey, Refusal>) {}

    fn heartbeat(&mut self, engine: &Engine, _: bool, _: bool) {
        self.0.look(engine);
    }
}

/// Until it is killed.
pub fn run(dir: &str, flags: &[&str]) -> Result<()> {
    let fixed = ["meshlb", "agent", "--source", dir, "--node", "n1", "--node-ip", "192.0.2.10"];
    let parsed = Cli::try_parse_from(fixed.iter().chain(flags))?;
    let node = [[192, 0, 2, 10].into()];
    let kernel = FakeKernel::default();
    kernel.lock().facts = NodeFacts {
        primary: PerFamily { v4: Some(node[0]), v6: None },
        published_addresses: BTreeSet::from(node),
        all_addresses: BTreeSet::from(node),
        uplinks: BTreeSet::new(),
        outside: BTreeSet::new(),
    };
    let dataplane = Dataplane {
        ipvs: Box::new(kernel.clone()),
        netfilter: Box::new(kernel.clone()),
        host: Box::new(kernel),
    };
    cli::log(&parsed.options)?;
    let metrics = Metrics::new();
    let settings = parsed.options.settings()?;
    let (sender, messages) = mpsc::channel();
    let _watch = source::watch::watch(Path::new(dir), settings.node.clone(), sender, None)?;
    let engine = Engine::new(settings, dataplane, Allocations::default(), Lock::default(), Drains::new());
    let feed = Feed::start(
        &parsed.options,
        &Origin::folder(Path::new(dir))?,
        &engine,
        std::iter::empty(),
        &metrics,
    )?;
    let (sender, inputs) = mpsc::channel();
    agent::forward(messages, metrics.clone(), None, sender)?;
    let pace = Pace { resync: Duration::from_secs(3600), probe: Duration::from_secs(1) };
    Agent::new(engine, Served(feed), pace).run(&inputs);
    Ok(())
}
