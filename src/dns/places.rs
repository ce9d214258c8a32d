//! Places that clients take: connections, lookups. Each costs the agent a file or more, so there are so many and no more, and
//! nobody gets all of them.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Places, and who has taken them.
#[derive(Debug)]
pub struct Places {
    most: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Default, Debug)]
struct Taken {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
}

impl Places {
    /// So many, and for one client at most `1 / share` of them.
    pub fn new(most: usize, share: usize) -> Arc<Self> {
        Arc::new(Self { most, each: most.div_ceil(share.max(1)), taken: Mutex::default() })
    }

    /// One for this client, until it is dropped.
    pub fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let client = client.to_canonical();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.by_client.get(&client).copied().unwrap_or(0);
        if own >= self.each || taken.all >= self.most {
            return None;
        }
        taken.all += 1;
        taken.by_client.insert(client, own + 1);
        Some(Place { of: self.clone(), client })
    }
}

/// A place that is taken.
#[derive(Debug)]
pub struct Place {
    of: Arc<Places>,
    client: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(n) = taken.by_client.get_mut(&self.client) {
            *n -= 1;
            if *n == 0 {
                taken.by_client.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_all() {
        let places = Places::new(6, 2);
        let [one, two, three] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|ip| ip.parse().unwrap());
        let mut of_one: Vec<_> = std::iter::from_fn(|| places.take(one)).collect();
        assert_eq!(of_one.len(), 3);
        let of_two: Vec<_> = std::iter::from_fn(|| places.take(two)).collect();
        assert_eq!(of_two.len(), 3);
        assert!(places.take(three).is_none());
        assert_eq!(places.taken.lock().unwrap().by_client.len(), 2, "who gets none is not remembered");
        of_one.pop();
        let third = places.take(three);
        assert!(third.is_some() && places.take(one).is_none());
        drop((of_one, of_two, third));
        let taken = places.taken.lock().unwrap();
        assert!(taken.all == 0 && taken.by_client.is_empty());
    }
}
