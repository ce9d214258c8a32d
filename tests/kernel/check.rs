//! What cases claim about a [`Tally`] and a [`Snapshot`]. An error says what was seen.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Result, bail, ensure};

use crate::client::Tally;
use crate::snapshot::Snapshot;
use crate::topology::Topology;

/// Every one was answered.
pub fn answered(tally: &Tally) -> Result<()> {
    ensure!(tally.failed() == 0 && tally.answered() == tally.probe.n, "not all were answered: {tally}");
    Ok(())
}

/// Every one was answered, by these servers alone, each the same number of times (give or take one where the number does
/// not divide).
pub fn even<S: AsRef<str>>(tally: &Tally, servers: &[S]) -> Result<()> {
    answered(tally)?;
    let share = tally.probe.n / servers.len().max(1);
    let rest = usize::from(!tally.probe.n.is_multiple_of(servers.len().max(1)));
    for server in servers {
        let n = tally.servers.get(server.as_ref()).copied().unwrap_or(0);
        ensure!((share..=share + rest).contains(&n), "{} had {n}, not {share}: {tally}", server.as_ref());
    }
    among(tally, servers)
}

/// Every one was answered, by some of these servers.
pub fn among<S: AsRef<str>>(tally: &Tally, servers: &[S]) -> Result<()> {
    answered(tally)?;
    match tally.servers.keys().find(|s| servers.iter().all(|x| x.as_ref() != **s)) {
        Some(other) => bail!("{other} answered, which must not: {tally}"),
        None => Ok(()),
    }
}

/// Every one was answered, by this server.
pub fn only(tally: &Tally, server: &str) -> Result<()> {
    among(tally, &[server])
}

/// Every one was refused, and at once. (A node's own UDP socket is told EPERM by the kernel.)
pub fn refused(tally: &Tally) -> Result<()> {
    let known = ["ECONNREFUSED", "EPERM"];
    ensure!(
        tally.answered() == 0 && tally.errors.keys().all(|e| known.contains(&e.as_str())),
        "not refused: {tally}"
    );
    ensure!(tally.slowest.as_millis() < 900, "refused, but not at once: {tally}");
    Ok(())
}

/// No answer and no refusal.
pub fn dropped(tally: &Tally) -> Result<()> {
    ensure!(
        tally.answered() == 0 && tally.errors.keys().all(|e| e == "timeout"),
        "neither an answer nor a refusal was expected: {tally}"
    );
    Ok(())
}

/// The servers saw these client addresses and no others.
pub fn seen_as(tally: &Tally, addrs: &[IpAddr]) -> Result<()> {
    let seen: BTreeSet<_> = tally.peers.iter().map(|(_, ip)| *ip).collect();
    let want: BTreeSet<_> = addrs.iter().copied().collect();
    ensure!(seen == want, "the servers saw {seen:?}, not {want:?}: {tally}");
    Ok(())
}

/// A server saw this client address.
pub fn server_saw(tally: &Tally, server: &str, addr: IpAddr) -> Result<()> {
    let seen: Vec<_> = tally.peers.iter().filter(|(s, _)| s == server).map(|(_, ip)| *ip).collect();
    ensure!(seen == [addr], "{server} saw {seen:?}, not {addr}: {tally}");
    Ok(())
}

/// Nothing is different.
pub fn same(before: &Snapshot, after: &Snapshot, what: &str) -> Result<()> {
    let diff = before.diff(after);
    ensure!(diff.is_empty(), "{what}:\n{}", diff.join("\n"));
    Ok(())
}

/// What is not ours is as it was.
pub fn foreign_unchanged(before: &Snapshot, after: &Snapshot) -> Result<()> {
    same(&before.foreign(), &after.foreign(), "foreign state has changed")
}

/// Every node's kernel is as it was before any program ran.
pub fn nothing_left(topology: &Topology) -> Result<()> {
    for ((node, before), after) in topology.nodes.iter().zip(&topology.baseline).zip(topology.snapshots()?) {
        same(before, &after, &format!("left on {}", node.name))?;
    }
    Ok(())
}
