//! Which addresses of a name an answer holds, and in what order.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

/// Longest rotation. Weights whose sum is larger are scaled down; each endpoint keeps at least one place.
const LONGEST: u64 = 4096;

/// Addresses of one family with their weights.
#[derive(Default, Debug)]
pub struct Addresses {
    /// Those that take new connections, ordered.
    entries: Box<[(IpAddr, u16)]>,
    /// Places in `entries` for answers of one address, in turn; empty where all weights are the same.
    rotation: Box<[u32]>,
}

impl Addresses {
    /// Of these, in their order. Weight 0 takes no new connections and is left out.
    pub fn new(entries: impl IntoIterator<Item = (IpAddr, u16)>) -> Self {
        let entries: Box<[_]> = entries.into_iter().filter(|(_, weight)| *weight > 0).collect();
        let rotation = rotation(&entries).into_boxed_slice();
        Self { entries, rotation }
    }

    /// All of them with their weights.
    pub fn entries(&self) -> &[(IpAddr, u16)] {
        &self.entries
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All, in random order; a heavier one comes first more often.
    pub fn shuffled(&self, random: &mut Random) -> Vec<IpAddr> {
        if self.rotation.is_empty() {
            let mut out: Vec<_> = self.entries.iter().map(|(addr, _)| *addr).collect();
            for i in (1..out.len()).rev() {
                out.swap(i, random.below(i as u64 + 1) as usize);
            }
            return out;
        }
        in_random_order(self.entries.iter().copied(), random)
    }

    /// The one whose turn it is. Each round has everyone as often as it weighs, in an order of its own: a client that asks
    /// several servers at once and takes the first answer (musl does) would otherwise always meet the same ones.
    pub fn next(&self, turn: &Turn) -> Option<IpAddr> {
        let places = if self.rotation.is_empty() { self.entries.len() } else { self.rotation.len() };
        let k = turn.next(u32::try_from(places).ok()?)? as usize;
        let place = if self.rotation.is_empty() { k } else { *self.rotation.get(k)? as usize };
        self.entries.get(place).map(|(addr, _)| *addr)
    }
}

/// These in random order; a heavier one comes first more often (Efraimidis and Spirakis, "Weighted random sampling with a
/// reservoir", 2006: the order by `u^(1/w)`).
pub fn in_random_order<T>(weighed: impl Iterator<Item = (T, u16)>, random: &mut Random) -> Vec<T> {
    let mut keyed: Vec<_> =
        weighed.map(|(what, weight)| (random.unit().ln() / f64::from(weight), what)).collect();
    keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
    keyed.into_iter().map(|(_, what)| what).collect()
}

/// Whose turn it is. No lock and no list: the order of a round is worked out from its number.
#[derive(Debug)]
pub struct Turn {
    taken: AtomicU64,
    secret: u64,
}

impl Default for Turn {
    /// Different on every node.
    fn default() -> Self {
        Self { taken: AtomicU64::new(0), secret: Random::default().number() }
    }
}

impl Turn {
    /// The next place of a round of so many; `None` of none.
    fn next(&self, places: u32) -> Option<u32> {
        let n = self.taken.fetch_add(1, Ordering::Relaxed);
        let round = n.checked_div(u64::from(places))?;
        let key = Random(self.secret.wrapping_add(round)).number();
        Some(permuted((n % u64::from(places)) as u32, places, key))
    }
}

/// Where a permutation of `0..n` that the key chooses has `k`: a Feistel network over the next larger power of four, walked
/// until it is back below `n` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). `k` is below `n`.
fn permuted(k: u32, n: u32, key: u64) -> u32 {
    // In 64 bits, so that no shift is too wide.
    let (mut k, n) = (u64::from(k), u64::from(n));
    let half = (n.max(2) - 1).ilog2() / 2 + 1;
    let mask = (1_u64 << half) - 1;
    loop {
        let (mut left, mut right) = (k >> half, k & mask);
        // Many, since the halves of a short round are a bit each.
        for i in 0..8 {
            let mixed = Random(key ^ (right << 8 | i)).number() & mask;
            (left, right) = (right, left ^ mixed);
        }
        k = left << half | right;
        if k < n {
            return k as u32;
        }
    }
}

/// Places so that each comes as often as it weighs.
fn rotation(entries: &[(IpAddr, u16)]) -> Vec<u32> {
    let Some(first) = entries.first() else { return Vec::new() };
    if entries.iter().all(|(_, weight)| *weight == first.1) {
        return Vec::new();
    }
    let divisor = entries.iter().fold(0, |d, (_, weight)| gcd(d, u64::from(*weight))).max(1);
    let sum: u64 = entries.iter().map(|(_, weight)| u64::from(*weight) / divisor).sum();
    let longest = LONGEST.max(entries.len() as u64);
    let turns = |weight: u16| {
        let weight = u64::from(weight) / divisor;
        if sum <= longest { weight } else { (weight * longest / sum).max(1) }
    };
    let places = (0..).zip(entries);
    places.flat_map(|(i, (_, weight))| std::iter::repeat_n(i, turns(*weight) as usize)).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Random numbers that need not be secret (SplitMix64, Steele and others 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Default for Random {
    /// Different in every process and for every value.
    fn default() -> Self {
        use std::hash::{BuildHasher, Hasher};
        Self(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }
}

impl Random {
    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(n)) >> 64) as u64
    }

    /// One in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.number() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn addresses(weights: &[u16]) -> Addresses {
        let addr = |i: usize| IpAddr::from([10, 0, (i / 256) as u8, (i % 256) as u8]);
        Addresses::new(weights.iter().enumerate().map(|(i, w)| (addr(i), *w)))
    }

    fn turns(of: &Addresses, n: usize) -> BTreeMap<IpAddr, usize> {
        let turn = Turn::default();
        let mut out = BTreeMap::new();
        for _ in 0..n {
            *out.entry(of.next(&turn).unwrap()).or_default() += 1;
        }
        out
    }

    #[test]
    fn turns_are_even_and_go_by_weight() {
        let even: Vec<usize> = turns(&addresses(&[1, 1, 1, 1, 1]), 1000).into_values().collect();
        assert!(even.iter().all(|n| (199..=201).contains(n)), "{even:?}");
        let weighted: Vec<usize> = turns(&addresses(&[3, 1]), 1000).into_values().collect();
        assert!(weighted[0].abs_diff(750) <= 2, "{weighted:?}");
        assert_eq!(turns(&addresses(&[1, 0]), 10).len(), 1);
        assert!(addresses(&[0, 0]).is_empty());
    }

    #[test]
    fn who_takes_every_second_turn_meets_all() {
        for n in [2, 4] {
            for secret in 0..5 {
                let (of, turn) = (addresses(&vec![1; n]), Turn { taken: AtomicU64::new(0), secret });
                let mut met: BTreeMap<IpAddr, usize> = BTreeMap::new();
                for _ in 0..1000 {
                    of.next(&turn).unwrap();
                    *met.entry(of.next(&turn).unwrap()).or_default() += 1;
                }
                let even = 1000 / n;
                assert!(met.len() == n && met.values().all(|got| got.abs_diff(even) <= even / 10), "{met:?}");
            }
        }
    }

    #[test]
    fn every_round_is_even_and_in_an_order_of_its_own() {
        for weights in [&[1, 1, 1][..], &[1; 7], &[3, 1, 2], &[1; 300]] {
            let (of, turn) = (addresses(weights), Turn { taken: AtomicU64::new(0), secret: 7 });
            let places = of.rotation.len().max(of.entries.len());
            let mut orders = std::collections::BTreeSet::new();
            for _ in 0..50 {
                let round: Vec<IpAddr> = (0..places).filter_map(|_| of.next(&turn)).collect();
                for (ip, weight) in of.entries() {
                    assert_eq!(round.iter().filter(|got| *got == ip).count(), usize::from(*weight));
                }
                orders.insert(round);
            }
            assert!(orders.len() > 5, "{weights:?}: {}", orders.len());
        }
    }

    /// Every order of four comes as often as any other.
    #[test]
    fn orders_are_even() {
        let mut orders: BTreeMap<Vec<u32>, u32> = BTreeMap::new();
        let mut random = Random(7);
        for _ in 0..24_000 {
            let key = random.number();
            *orders.entry((0..4).map(|k| permuted(k, 4, key)).collect()).or_default() += 1;
        }
        assert!(orders.len() == 24 && orders.values().all(|n| (850..1150).contains(n)), "{orders:?}");
    }

    #[test]
    fn a_rotation_has_its_limit() {
        assert!(addresses(&[65535, 65534, 1]).rotation.len() <= LONGEST as usize + 3);
        assert_eq!(addresses(&[1; 5000]).rotation.len(), 0);
        assert_eq!(*addresses(&[2, 4]).rotation, [0, 1, 1]);
    }

    #[test]
    fn every_one_comes_first_as_often_as_it_weighs() {
        let mut random = Random(7);
        let mut first: BTreeMap<IpAddr, u32> = BTreeMap::new();
        let even = addresses(&[1; 4]);
        for _ in 0..8000 {
            *first.entry(even.shuffled(&mut random)[0]).or_default() += 1;
        }
        assert!(first.values().all(|n| (1800..2200).contains(n)), "{first:?}");
        first.clear();
        let weighted = addresses(&[3, 1]);
        for _ in 0..8000 {
            *first.entry(weighted.shuffled(&mut random)[0]).or_default() += 1;
        }
        assert!((5800..6200).contains(first.values().next().unwrap()), "{first:?}");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_invented(weights in prop::collection::vec(0_u16.., 0..40), seed: u64) {
            let of = addresses(&weights);
            let mut all: Vec<IpAddr> = of.entries().iter().map(|(a, _)| *a).collect();
            let mut shuffled = of.shuffled(&mut Random(seed));
            all.sort();
            shuffled.sort();
            prop_assert_eq!(&all, &shuffled);
            let places = of.rotation.len().max(of.entries.len());
            if places > 0 {
                prop_assert_eq!(turns(&of, places * 2).into_keys().collect::<Vec<_>>(), all);
            }
        }
    }
}
