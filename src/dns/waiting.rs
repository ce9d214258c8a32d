//! Bytes of answers that wait for their clients to take them: of one connection, of one client, and of all.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Bytes of answers of one connection that wait. Who takes so few of them is asked nothing more for, so that what a connection
/// holds in memory is little, however much it asks.
pub(super) const OF_ONE: usize = 128 << 10;
/// Bytes of answers of all connections that wait. While there are more, no question is taken.
pub(super) const OF_ALL: usize = 32 << 20;
/// The same of all connections of one client, which must not stop those of others.
pub(super) const OF_CLIENT: usize = OF_ALL / 4;

/// What waits for all.
#[derive(Default, Debug)]
pub(super) struct Budget(Mutex<Bytes>);

#[derive(Default, Debug)]
struct Bytes {
    all: usize,
    /// Of clients that have some.
    by_client: HashMap<IpAddr, usize>,
}

impl Budget {
    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of all clients together.
    #[cfg(test)]
    pub(super) fn all(&self) -> usize {
        self.bytes().all
    }
}

/// What waits for one connection.
pub(super) struct Waiting {
    own: AtomicUsize,
    client: IpAddr,
    of: Arc<Budget>,
}

impl Waiting {
    /// Nothing yet, of what waits for this client.
    pub(super) fn new(of: &Arc<Budget>, client: IpAddr) -> Self {
        Self { own: AtomicUsize::new(0), client: client.to_canonical(), of: of.clone() }
    }

    /// Whether more would be too much.
    pub(super) fn is_much(&self) -> bool {
        self.own.load(Ordering::Relaxed) > OF_ONE || self.is_much_elsewhere()
    }

    /// Whether it would be, whatever waits for this connection.
    pub(super) fn is_much_elsewhere(&self) -> bool {
        let bytes = self.of.bytes();
        bytes.all > OF_ALL || bytes.by_client.get(&self.client).is_some_and(|own| *own > OF_CLIENT)
    }

    pub(super) fn add(&self, n: usize) {
        self.own.fetch_add(n, Ordering::Relaxed);
        let mut bytes = self.of.bytes();
        bytes.all += n;
        *bytes.by_client.entry(self.client).or_default() += n;
    }

    pub(super) fn remove(&self, n: usize) {
        self.own.fetch_sub(n, Ordering::Relaxed);
        let mut bytes = self.of.bytes();
        bytes.all = bytes.all.saturating_sub(n);
        if let Some(own) = bytes.by_client.get_mut(&self.client) {
            *own = own.saturating_sub(n);
            if *own == 0 {
                bytes.by_client.remove(&self.client);
            }
        }
    }
}

impl Drop for Waiting {
    /// What was not taken is not waited for.
    fn drop(&mut self) {
        let own = *self.own.get_mut();
        self.remove(own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_connection_has_waiting_ends_with_it() {
        let all = Arc::default();
        let [client, other] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
        let before = Waiting::new(&all, client);
        before.add(7);
        let waiting = Waiting::new(&all, client);
        waiting.add(OF_ONE + 1);
        assert!(waiting.is_much() && !waiting.is_much_elsewhere() && !before.is_much());
        waiting.remove(1);
        assert!(!waiting.is_much() && !Waiting::new(&all, other).is_much());
        drop(waiting);
        assert_eq!(all.all(), 7);
        drop(before);
        assert!(all.all() == 0 && all.bytes().by_client.is_empty());
    }

    #[test]
    fn no_client_has_more_than_its_part() {
        let all = Arc::default();
        let of = |ip: &str| Waiting::new(&all, ip.parse().unwrap());
        let full: Vec<_> = (1..=4).map(|i| of(&format!("10.0.0.{i}"))).collect();
        full[0].add(OF_CLIENT + 1);
        assert!(of("10.0.0.1").is_much() && of("::ffff:10.0.0.1").is_much() && !of("10.0.0.2").is_much());
        for waiting in &full[1..] {
            waiting.add(OF_CLIENT);
        }
        assert!(of("10.0.0.9").is_much() && all.all() == OF_ALL + 1);
        drop(full);
        assert!(!of("10.0.0.1").is_much());
    }
}
