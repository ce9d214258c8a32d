//! Compiling and comparing alone, without a kernel: how the time grows with the number of services.

use std::{
    collections::{BTreeSet, HashMap},
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use jiff::Timestamp;
use meshlb::{
    allocate::{Allocations, Allocator, Lock, allocate},
    compile::{Assigned, Inputs, Merged, base::compile_base, compile_service, merge::Touched},
    dataplane::ProgramState,
    model::{
        ids::PerFamily,
        kernel::Timeouts,
        node::{MarkMask, NodeConfig, NodeFacts},
        snapshot::Snapshot,
    },
    plan::{Observed, plan, plan_all},
    source::files::parse_text,
};

#[path = "../tests/bench/helper/manifests.rs"]
mod manifests;

/// Services, what they were given, and the node.
struct World {
    config: NodeConfig,
    facts: NodeFacts,
    snapshot: Snapshot,
    allocator: Allocator,
}

fn world(count: u32) -> World {
    let config = NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: "10.200.0.0/16".parse().ok(), v6: None },
        publish_range: 30_000..=32_767,
        reserved: Vec::new(),
        mask: MarkMask::default(),
        zone: None,
    };
    let node = IpAddr::V4(Ipv4Addr::new(192, 168, 50, 1));
    let facts = NodeFacts {
        primary: PerFamily { v4: Some(node), v6: None },
        published_addresses: BTreeSet::from([node]),
        all_addresses: BTreeSet::from([node]),
        uplinks: BTreeSet::new(),
        outside: BTreeSet::new(),
    };
    let mut snapshot = Snapshot::default();
    let mut dirty = BTreeSet::new();
    for service in 0..count {
        let parsed = parse_text("bench.yaml".as_ref(), &manifests::text(service, 4), Some(&config));
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        for entry in parsed.entries {
            if let meshlb::source::object::Verdict::Good(object) = entry.verdict {
                snapshot.apply(object.event(), &mut dirty);
            }
        }
    }
    let allocator =
        allocate(snapshot.services(), &config, Allocations::default(), Lock::default(), BTreeSet::new());
    World { config, facts, snapshot, allocator }
}

// By its name tests/bench/plan.sh counts its instructions.
#[inline(never)]
fn compile(world: &World) -> Merged {
    let mut merged = Merged::default();
    let mut touched = Touched::default();
    let inputs = Inputs {
        config: &world.config,
        facts: &world.facts,
        present: &HashMap::new(),
        kept: &Default::default(),
        drains: &std::collections::BTreeMap::new(),
        blocked: &|_, _| false,
        now: Timestamp::UNIX_EPOCH,
    };
    merged.set_base(compile_base(&world.config, &world.facts, Default::default(), Vec::new(), None));
    for (key, service) in world.snapshot.services() {
        let Some(allocation) = world.allocator.get(key) else { continue };
        let assigned = Assigned {
            vips: allocation.vips,
            published: allocation.published.clone(),
            marks: allocation.marks.clone(),
        };
        let compiled = compile_service(service, &world.snapshot.slices_for(service), &assigned, &inputs);
        merged.replace(key, Some(Arc::new(compiled)), &mut touched);
    }
    merged
}

/// A kernel that has this already, or nothing.
fn kernel(merged: &Merged, full: bool) -> Observed {
    let state = merged.state();
    Observed {
        virtual_servers: if full { state.virtual_servers.clone() } else { HashMap::new() },
        foreign_marks: BTreeSet::new(),
        led_to: BTreeSet::new(),
        elements: if full { state.elements.clone() } else { Default::default() },
        program: if full { ProgramState::Installed } else { ProgramState::Absent },
        leftovers: Vec::new(),
        routes: if full { state.routes } else { PerFamily::default() },
        sysctls: state.sysctls.clone(),
        timeouts: Timeouts::default(),
    }
}

fn growth(c: &mut Criterion) {
    let mut group = c.benchmark_group("growth");
    group.sample_size(20);
    for count in [10, 1_000, 10_000] {
        group.throughput(Throughput::Elements(u64::from(count)));
        let world = world(count);
        group.bench_function(BenchmarkId::new("compile", count), |b| b.iter(|| black_box(compile(&world))));
        let merged = compile(&world);
        let empty = kernel(&merged, false);
        group.bench_function(BenchmarkId::new("plan-all-new", count), |b| {
            b.iter(|| black_box(plan_all(merged.state(), &empty)));
        });
        let same = kernel(&merged, true);
        assert!(plan_all(merged.state(), &same).is_empty());
        group.bench_function(BenchmarkId::new("plan-all-same", count), |b| {
            b.iter(|| black_box(plan_all(merged.state(), &same)));
        });
        // One service: this must not grow at all.
        let mut touched = Touched::default();
        if let Some((_, service)) = merged.services().first_key_value() {
            touched.virtual_servers.extend(service.virtual_servers.keys());
            touched.elements.extend(service.elements.keys().chain(&service.shared));
        }
        group.bench_function(BenchmarkId::new("plan-one", count), |b| {
            b.iter(|| black_box(plan(merged.state(), merged.state(), &touched)));
        });
    }
    group.finish();
}

criterion_group!(benches, growth);
criterion_main!(benches);
