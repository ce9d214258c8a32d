//! CPU time of agents, and what a change costs them.

use std::{
    fs,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::folder;

/// A process that has used no CPU for this long, and waits for no program that it has started, is done.
const QUIET: Duration = Duration::from_millis(120);
/// No change takes longer than this.
const LIMIT: Duration = Duration::from_secs(120);

/// CPU time of all threads of a process in nanoseconds, of `/proc/PID/task/*/schedstat`.
pub fn cpu(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let first = text.split(' ').next().unwrap_or_default();
        sum += first.parse::<u64>().with_context(|| format!("schedstat: {text:?}"))?;
    }
    Ok(sum)
}

/// CPU time of programs that a process has run and that have ended, in ticks of 10 ms.
fn children(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let at = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok()).context("/proc/PID/stat");
    Ok(at(13)? + at(14)?)
}

fn waits_for_program(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks
        .flatten()
        .any(|task| fs::read_to_string(task.path().join("children")).is_ok_and(|t| !t.trim().is_empty()))
}

/// Waits until a process does nothing; its CPU time by then.
pub fn wait_quiet(pid: u32) -> Result<u64> {
    let begin = Instant::now();
    let (mut last, mut since) = (cpu(pid)?, Instant::now());
    while since.elapsed() < QUIET {
        sleep(Duration::from_millis(5));
        let now = cpu(pid)?;
        if now != last || waits_for_program(pid) {
            (last, since) = (now, Instant::now());
        }
        if begin.elapsed() > LIMIT {
            bail!("process {pid} does not come to rest");
        }
    }
    Ok(last)
}

/// An agent and its folder.
pub struct Watched {
    pid: u32,
    dir: PathBuf,
    services: u32,
}

impl Watched {
    pub fn new(pid: u32, dir: &str, services: u32) -> Self {
        Self { pid, dir: dir.into(), services }
    }

    /// Changes an endpoint of a service, just after the agent's look at the kernel, which it takes once a second, so that
    /// none falls into the time measured. CPU time of the agent until it is at rest.
    fn change(&self, round: u32) -> Result<u64> {
        let before = wait_quiet(self.pid)?;
        let begin = Instant::now();
        while cpu(self.pid)? == before {
            sleep(Duration::from_millis(5));
            if begin.elapsed() > LIMIT {
                bail!("process {} takes no look at the kernel", self.pid);
            }
        }
        let before = wait_quiet(self.pid)?;
        // Another service each time; every second round puts back what the one before it took.
        let service = (round / 2).wrapping_mul(7919) % self.services;
        folder::write(&self.dir, service, if round.is_multiple_of(2) { 5 } else { 4 })?;
        let begin = Instant::now();
        while cpu(self.pid)? == before {
            sleep(Duration::from_millis(2));
            if begin.elapsed() > LIMIT {
                bail!("process {} does not see a change", self.pid);
            }
        }
        Ok(wait_quiet(self.pid)? - before)
    }
}

/// Prints a line a round: CPU time of the one and of the other, in nanoseconds. Then, after `children`, the CPU time in
/// nanoseconds of the programs that each has run, for one change.
pub fn run(one: Watched, other: Watched, times: u32) -> Result<()> {
    let before = (children(one.pid)?, children(other.pid)?);
    for round in 0..times {
        println!("{} {}", one.change(round)?, other.change(round)?);
    }
    let each = |after: u64, before: u64| (after - before) * 10_000_000 / u64::from(times.max(1));
    println!("children {} {}", each(children(one.pid)?, before.0), each(children(other.pid)?, before.1));
    Ok(())
}
