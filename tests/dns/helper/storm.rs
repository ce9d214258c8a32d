//! Changes while questions are asked.

use std::{
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use meshlb::source::watch::Timing;

use crate::{ask, manifests};

/// So long after a change that was due to be read nobody is given what was before it any more. Generous: a thousand files are read
/// and applied meanwhile, those before them too, on a machine that is busy with the questions and the changes as well.
const LATEST: Duration = Duration::from_secs(3);
/// Of the changes that are asked for, so many in a hundred have to be made, or the test shows nothing.
const ENOUGH: f64 = 95.0;

/// What is done in a second, and for how long.
pub struct Pace {
    /// Services that there are, at most 1,024.
    pub services: u32,
    /// Services that get another endpoint.
    pub changes: u32,
    /// Questions.
    pub queries: u32,
    /// Seconds.
    pub seconds: u32,
}

fn put(dir: &Path, n: u32, generation: u32) -> Result<()> {
    let text = format!(
        "{}---\n{}",
        manifests::round_robin(n),
        manifests::slice(&format!("s{n:05}"), std::iter::once(manifests::address(n, generation)))
    );
    manifests::write(dir, &format!("s{n:05}.yaml"), &text)
}

/// The generation that is in the answer for service `n` now.
fn ask_once(socket: &UdpSocket, n: u32) -> Result<u32> {
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send(&ask::question(1, &manifests::name(n))?)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    let (_, addresses) = ask::answer(&buffer[..length])?;
    let [address] = addresses[..] else { bail!("{} has {addresses:?}", manifests::name(n)) };
    let (service, generation) = manifests::read(address);
    ensure!(service == n, "{} has the address {address} of another", manifests::name(n));
    Ok(generation)
}

/// Waits until every service answers this generation.
fn settle(at: SocketAddr, services: u32, wanted: impl Fn(u32) -> u32) -> Result<Duration> {
    let (socket, begun) = (ask::open(at)?, Instant::now());
    for n in 0..services {
        while ask_once(&socket, n).ok() != Some(wanted(n)) {
            ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "{} is not answered as written",
                manifests::name(n)
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(begun.elapsed())
}

/// When each generation of a service was written, the first one first.
#[derive(Default)]
struct Written(Mutex<Vec<Instant>>);

impl Written {
    fn put(&self, dir: &Path, n: u32) -> Result<()> {
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        put(dir, n, u32::try_from(written.len())? + 1)?;
        written.push(Instant::now());
        Ok(())
    }

    /// The generation that is there.
    fn last(&self) -> u32 {
        u32::try_from(self.0.lock().unwrap_or_else(PoisonError::into_inner).len()).unwrap_or(u32::MAX)
    }

    /// For how long, at this time, a generation was not the last one any more.
    fn age(&self, generation: u32, at: Instant) -> Duration {
        let written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        written.get(generation as usize).map(|next| at.saturating_duration_since(*next)).unwrap_or_default()
    }
}

/// Every service has one endpoint, whose address tells which service and which of its changes it is. An answer is wrong when
/// it has another service's, none, one that is older than an answer before it, or one that was replaced long ago.
pub fn run(at: SocketAddr, dir: &Path, pace: &Pace) -> Result<()> {
    ensure!(
        pace.services <= 1024 && pace.changes * pace.seconds / pace.services < 4000,
        "more than the addresses can tell"
    );
    let written: Vec<Written> = (0..pace.services).map(|_| Written::default()).collect();
    for (n, written) in (0..).zip(&written) {
        written.put(dir, n)?;
    }
    settle(at, pace.services, |_| 1)?;
    let stop = AtomicBool::new(false);
    let (asked, rate) = thread::scope(|scope| -> Result<(Asked, f64)> {
        let writer = scope.spawn(|| -> Result<f64> {
            let begun = Instant::now();
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let due = (begun.elapsed().as_secs_f64() * f64::from(pace.changes)) as u32;
                while done < due && !stop.load(Ordering::Relaxed) {
                    let n = done % pace.services;
                    written[n as usize].put(dir, n)?;
                    done += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(f64::from(done) / begun.elapsed().as_secs_f64())
        });
        let asked = storm(at, pace, &written);
        stop.store(true, Ordering::Relaxed);
        let rate = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok((asked?, rate))
    })?;
    let last = settle(at, pace.services, |n| written[n as usize].last())?;
    println!(
        "{} questions, half of them for tasks., and {rate:.0} changes a second for {} s: none wrong, none missing; an answer \
         was at most {} changes of its service and {} ms behind what was written; all answers are the last ones {} ms after \
         the last change",
        asked.answered,
        pace.seconds,
        asked.behind,
        asked.oldest.as_millis(),
        last.as_millis()
    );
    ensure!(
        rate >= f64::from(pace.changes) * ENOUGH / 100.0,
        "{rate:.0} changes a second were written, not {}: the machine is too slow for that many",
        pace.changes
    );
    Ok(())
}

/// What became of the questions.
struct Asked {
    answered: u32,
    /// Changes of a service that an answer did not have, at most.
    behind: u32,
    /// Since when it did not have them, at most.
    oldest: Duration,
}

/// Asks in turn, at most 200 questions at a time, every other time round for `tasks.`.
fn storm(at: SocketAddr, pace: &Pace, written: &[Written]) -> Result<Asked> {
    const AT_A_TIME: u32 = 200;
    const TASKS: u16 = 1 << 15;
    // A folder in which changes never pause is read this often.
    let latest = Timing::default().at_most + LATEST;
    let socket = ask::open(at)?;
    let questions: Vec<[Vec<u8>; 2]> = (0..pace.services)
        .map(|n| {
            let (id, name) = (u16::try_from(n)?, manifests::name(n));
            Ok([ask::question(id, &name)?, ask::question(id | TASKS, &format!("tasks.{name}"))?])
        })
        .collect::<Result<_>>()?;
    let begun = Instant::now();
    let mut seen = vec![(0_u32, begun); pace.services as usize];
    let mut buffer = [0; 1500];
    let total = pace.queries * pace.seconds;
    let mut asked = 0_u32;
    let mut out = Asked { answered: 0, behind: 0, oldest: Duration::ZERO };
    while out.answered < total {
        let due = (begun.elapsed().as_secs_f64() * f64::from(pace.queries)) as u32;
        while asked < due.min(total) && asked - out.answered < AT_A_TIME {
            let n = (asked % pace.services) as usize;
            seen[n].1 = Instant::now();
            socket.send(&questions[n][(asked / pace.services % 2) as usize])?;
            asked += 1;
        }
        if asked == out.answered {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        let length = socket
            .recv(&mut buffer)
            .with_context(|| format!("{} questions without an answer", asked - out.answered))?;
        let (id, addresses) = ask::answer(&buffer[..length])?;
        let n = u32::from(id & !TASKS);
        let name = manifests::name(n);
        let [address] = addresses[..] else { bail!("{name} has {addresses:?}") };
        let (service, generation) = manifests::read(address);
        ensure!(service == n, "{name} has the address {address} of another");
        let (before, since) = &mut seen[n as usize];
        ensure!(generation >= *before, "{name} went back from {before} to {generation}");
        *before = generation;
        let written = &written[n as usize];
        let age = written.age(generation, *since);
        ensure!(
            age <= latest,
            "{name} has generation {generation} of {}, {age:?} after it was replaced",
            written.last()
        );
        out.oldest = out.oldest.max(age);
        out.behind = out.behind.max(written.last().saturating_sub(generation));
        out.answered += 1;
    }
    let took = begun.elapsed();
    ensure!(
        took < Duration::from_secs(u64::from(pace.seconds) + 2),
        "{total} questions took {took:?}, not {} s: the machine is too slow for that many",
        pace.seconds
    );
    Ok(out)
}

/// One change after the other, each until it is answered. The folder has whatever else it has.
pub fn changes(at: SocketAddr, dir: &Path, times: u32) -> Result<()> {
    let socket = ask::open(at)?;
    let mut took = Vec::new();
    put(dir, 0, 1)?;
    settle(at, 1, |_| 1)?;
    for generation in 2..times + 2 {
        let begun = Instant::now();
        put(dir, 0, generation)?;
        while ask_once(&socket, 0)? != generation {
            ensure!(begun.elapsed() < Duration::from_secs(20), "change {generation} is not answered");
            thread::sleep(Duration::from_micros(200));
        }
        took.push(begun.elapsed());
        thread::sleep(Duration::from_millis(50));
    }
    took.sort();
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)].as_secs_f64() * 1e3;
    println!("change to answer: p50 {:.1} ms, p99 {:.1} ms, {times} changes", at(50), at(99));
    Ok(())
}
