//! Tests against a real control plane (etcd, kube-apiserver and the controllers): `tests/cluster/run.sh [FILTER…]` starts one
//! for them. Plain `cargo test` only says why it does nothing.

#![forbid(unsafe_code)]

mod cases;
mod island;
mod kubectl;
mod relay;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use kubectl::Cluster;

/// A case: its name and what it does.
pub type Case = (&'static str, fn(&Cluster) -> anyhow::Result<()>);

fn main() -> ExitCode {
    let cases = cases::all();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--list") {
        cases.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let Some(cluster) = Cluster::from_env() else {
        println!("cluster tests: nothing done, since they need a control plane: run tests/cluster/run.sh");
        return ExitCode::SUCCESS;
    };
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen =
        cases.iter().filter(|(name, _)| filters.is_empty() || filters.iter().any(|f| name.contains(*f)));
    let (mut passed, mut failed) = (0, 0);
    let start = Instant::now();
    for (name, case) in chosen {
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| case(&cluster)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked (message above)")));
        let took = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                println!("ok     {took:6.1} s  {name}");
                passed += 1;
            }
            Err(e) => {
                println!("FAILED {took:6.1} s  {name}\n  {}", format!("{e:?}").replace('\n', "\n  "));
                failed += 1;
            }
        }
    }
    println!("cluster tests: {passed} passed, {failed} failed in {:.0} s", start.elapsed().as_secs_f64());
    if failed > 0 || passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
