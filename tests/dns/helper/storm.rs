//! Changes while questions are asked.

use std::{
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{ask, manifests};

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

/// Every service has one endpoint, whose address tells which service and which of its changes it is. An answer is wrong when
/// it has another service's, none, or one that is older than an answer before it.
pub fn run(at: SocketAddr, dir: &Path, pace: &Pace) -> Result<()> {
    ensure!(
        pace.services <= 1024 && pace.changes * pace.seconds / pace.services < 4000,
        "more than the addresses can tell"
    );
    let written: Vec<AtomicU32> = (0..pace.services).map(|_| AtomicU32::new(1)).collect();
    for n in 0..pace.services {
        put(dir, n, 1)?;
    }
    settle(at, pace.services, |_| 1)?;
    let stop = AtomicBool::new(false);
    let (changed, stale) = (AtomicU32::new(0), AtomicU64::new(0));
    let answered = thread::scope(|scope| -> Result<u32> {
        let writer = scope.spawn(|| -> Result<()> {
            let begun = Instant::now();
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let due = (begun.elapsed().as_secs_f64() * f64::from(pace.changes)) as u32;
                while done < due {
                    let n = done % pace.services;
                    let next = written[n as usize].load(Ordering::Relaxed) + 1;
                    put(dir, n, next)?;
                    written[n as usize].store(next, Ordering::Relaxed);
                    done += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
            changed.store(done, Ordering::Relaxed);
            Ok(())
        });
        let asked = storm(at, pace, &written, &stale);
        stop.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        asked
    })?;
    let last = settle(at, pace.services, |n| written[n as usize].load(Ordering::Relaxed))?;
    println!(
        "{answered} questions and {} changes in {} s: none wrong, none missing; an answer was at most {} changes of its \
         service behind what was written; all answers are the last ones {} ms after the last change",
        changed.load(Ordering::Relaxed),
        pace.seconds,
        stale.load(Ordering::Relaxed),
        last.as_millis()
    );
    Ok(())
}

/// Asks in turn, at most 200 questions at a time; how many were answered.
fn storm(at: SocketAddr, pace: &Pace, written: &[AtomicU32], stale: &AtomicU64) -> Result<u32> {
    const AT_A_TIME: u32 = 200;
    let socket = ask::open(at)?;
    let questions: Vec<Vec<u8>> = (0..pace.services)
        .map(|n| ask::question(u16::try_from(n)?, &manifests::name(n)))
        .collect::<Result<_>>()?;
    let mut seen = vec![0_u32; pace.services as usize];
    let mut buffer = [0; 1500];
    let (begun, total) = (Instant::now(), pace.queries * pace.seconds);
    let (mut asked, mut answered) = (0_u32, 0_u32);
    while answered < total {
        let due = (begun.elapsed().as_secs_f64() * f64::from(pace.queries)) as u32;
        while asked < due.min(total) && asked - answered < AT_A_TIME {
            socket.send(&questions[(asked % pace.services) as usize])?;
            asked += 1;
        }
        if asked == answered {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        let length = socket
            .recv(&mut buffer)
            .with_context(|| format!("{} questions without an answer", asked - answered))?;
        let (id, addresses) = ask::answer(&buffer[..length])?;
        let n = u32::from(id);
        let [address] = addresses[..] else { bail!("{} has {addresses:?}", manifests::name(n)) };
        let (service, generation) = manifests::read(address);
        ensure!(service == n, "{} has the address {address} of another", manifests::name(n));
        let before = &mut seen[n as usize];
        ensure!(generation >= *before, "{} went back from {before} to {generation}", manifests::name(n));
        *before = generation;
        stale.fetch_max(
            u64::from(written[n as usize].load(Ordering::Relaxed).saturating_sub(generation)),
            Ordering::Relaxed,
        );
        answered += 1;
    }
    let took = begun.elapsed();
    ensure!(
        took < Duration::from_secs(u64::from(pace.seconds) + 2),
        "{total} questions took {took:?}, not {} s: the machine is too slow for that many",
        pace.seconds
    );
    Ok(answered)
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
