//! How long answers take at a given rate of questions.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{ask, manifests};

/// Prints p50 and p99 in microseconds, and how many questions got no answer within a second.
pub fn run(at: SocketAddr, count: u32, queries: u32, seconds: u32) -> Result<()> {
    let socket = ask::open(at)?;
    let questions: Vec<Vec<u8>> =
        (0..count).map(|n| ask::question(0, &manifests::name(n))).collect::<Result<_>>()?;
    let total = queries * seconds;
    // Questions that are on their way, by their number.
    let mut sent: Vec<Option<Instant>> = vec![None; 1 << 16];
    let mut took = Vec::with_capacity(total as usize);
    let mut buffer = [0; 1500];
    let begun = Instant::now();
    let mut asked = 0_u32;
    loop {
        let due = ((begun.elapsed().as_secs_f64() * f64::from(queries)) as u32).min(total);
        while asked < due {
            // One in 7919 after the other: neighbours in the list are none in time.
            let mut question = questions[(asked.wrapping_mul(7919) % count) as usize].clone();
            let id = u16::try_from(asked % (1 << 16))?;
            question[..2].copy_from_slice(&id.to_be_bytes());
            sent[usize::from(id)] = Some(Instant::now());
            socket.send(&question)?;
            asked += 1;
        }
        if asked == total
            && (took.len() == total as usize || begun.elapsed() > Duration::from_secs(u64::from(seconds) + 1))
        {
            break;
        }
        socket.set_read_timeout(Some(Duration::from_micros(100)))?;
        while let Ok(length) = socket.recv(&mut buffer) {
            let (id, addresses) = ask::answer(&buffer[..length]).context("an answer")?;
            anyhow::ensure!(!addresses.is_empty(), "an answer without an address");
            if let Some(at) = sent[usize::from(id)].take() {
                took.push(at.elapsed());
            }
            if (begun.elapsed().as_secs_f64() * f64::from(queries)) as u32 > asked {
                break;
            }
        }
    }
    took.sort();
    let part = |share: usize| took.get(took.len() * share / 100).map_or(0, Duration::as_micros);
    println!("{} {} {}", part(50), part(99), total as usize - took.len());
    Ok(())
}
