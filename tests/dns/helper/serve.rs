//! The agent without a kernel.

use std::{collections::BTreeSet, path::Path, sync::mpsc, thread, time::Duration, time::Instant};

use anyhow::Result;
use clap::Parser as _;
use meshlb::{
    allocate::{Allocations, Lock},
    cli::{Cli, dns::Feed},
    compile::service::Drains,
    dataplane::{executor::Dataplane, fake::FakeKernel},
    metrics::Metrics,
    model::{ids::PerFamily, node::NodeFacts},
    reconcile::{
        Drift, Engine, Turn,
        agent::{Agent, Input, Observer, Pace},
    },
    source::{self, SourceMessage},
};

/// Feeds the DNS server as the real agent does.
struct Served(Feed);

impl Observer for Served {
    fn before_apply(&mut self, engine: &Engine) -> Result<(), String> {
        self.0.begin(engine);
        Ok(())
    }

    fn after_turn(&mut self, engine: &Engine, turn: &Turn, since: Option<Instant>) {
        self.0.update(engine, &turn.services, since);
    }

    fn turn_failed(&mut self, error: &str) {
        eprintln!("{error}");
    }

    fn drift(&mut self, _: &str) {}

    fn drifted(&mut self, _: &Drift) {}

    fn heartbeat(&mut self, _: &Engine, _: bool, _: bool) {}
}

/// Until it is killed.
pub fn run(dir: &str, flags: &[&str]) -> Result<()> {
    let fixed = ["meshlb", "agent", "--source", dir, "--node", "n1", "--node-ip", "192.0.2.10"];
    let cli = Cli::try_parse_from(fixed.iter().chain(flags))?;
    let node = [[192, 0, 2, 10].into()];
    let kernel = FakeKernel::default();
    kernel.lock().facts = NodeFacts {
        primary: PerFamily { v4: Some(node[0]), v6: None },
        published_addresses: BTreeSet::from(node),
        all_addresses: BTreeSet::from(node),
        uplinks: BTreeSet::new(),
    };
    let dataplane = Dataplane {
        ipvs: Box::new(kernel.clone()),
        netfilter: Box::new(kernel.clone()),
        host: Box::new(kernel),
    };
    let settings = cli.options.settings()?;
    let (sender, messages) = mpsc::channel();
    let _watch = source::watch::watch(Path::new(dir), settings.node.clone(), sender, None)?;
    let engine = Engine::new(settings, dataplane, Allocations::default(), Lock::default(), Drains::new());
    let feed = Feed::start(&cli.options, &engine, &Metrics::new())?;
    let (sender, inputs) = mpsc::channel();
    thread::spawn(move || {
        for message in messages {
            let input = match message {
                SourceMessage::Events(events, seen) => Input::Events(events, seen),
                SourceMessage::Lock(lock) => Input::Lock(lock),
                SourceMessage::NodeAddresses(ips) => Input::NodeAddresses(ips),
                SourceMessage::Synced => Input::Synced { complete: true },
                SourceMessage::Problems(problems) => {
                    problems.iter().for_each(|problem| eprintln!("{problem}"));
                    continue;
                }
            };
            if sender.send(input).is_err() {
                return;
            }
        }
    });
    let pace = Pace { resync: Duration::from_secs(3600), probe: Duration::from_secs(1) };
    Agent::new(engine, Served(feed), pace).run(&inputs);
    Ok(())
}
