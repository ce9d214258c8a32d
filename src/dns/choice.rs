//! Which addresses of a name an answer holds, and in what order.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU32, Ordering},
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

    /// All, in random order; a heavier one comes first more often (Efraimidis and Spirakis, "Weighted random sampling
    /// with a reservoir", 2006: the order by `u^(1/w)`).
    pub fn shuffled(&self, random: &mut Random) -> Vec<IpAddr> {
        if self.rotation.is_empty() {
            let mut out: Vec<_> = self.entries.iter().map(|(addr, _)| *addr).collect();
            for i in (1..out.len()).rev() {
                out.swap(i, random.below(i as u64 + 1) as usize);
            }
            return out;
        }
        let key = |weight: u16, random: &mut Random| random.unit().ln() / f64::from(weight);
        let mut keyed: Vec<_> =
            self.entries.iter().map(|(addr, weight)| (key(*weight, random), *addr)).collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
        keyed.into_iter().map(|(_, addr)| addr).collect()
    }

    /// The one whose turn it is.
    pub fn next(&self, turn: &AtomicU32) -> Option<IpAddr> {
        if self.entries.is_empty() {
            return None;
        }
        let n = turn.fetch_add(1, Ordering::Relaxed) as usize;
        let place = match &*self.rotation {
            [] => n % self.entries.len(),
            rotation => rotation[n % rotation.len()] as usize,
        };
        self.entries.get(place).map(|(addr, _)| *addr)
    }
}

/// Places so that each comes as often as it weighs, as evenly spread as can be: the k-th turn of weight w stands at
/// (2k + 1) / 2w of the way.
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
    let mut places: Vec<(f64, u32)> = Vec::new();
    for (i, (_, weight)) in entries.iter().enumerate() {
        let n = turns(*weight);
        places.extend((0..n).map(|k| ((k as f64 + 0.5) / n as f64, i as u32)));
    }
    places.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    places.into_iter().map(|(_, i)| i).collect()
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
        let turn = AtomicU32::new(u32::MAX - 7);
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
    fn a_rotation_has_its_limit() {
        assert!(addresses(&[65535, 65534, 1]).rotation.len() <= LONGEST as usize + 3);
        assert_eq!(addresses(&[1; 5000]).rotation.len(), 0);
        // Spread, not in one go.
        assert_eq!(*addresses(&[2, 4]).rotation, [1, 0, 1]);
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
