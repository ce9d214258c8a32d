//! Maps and sets with a few entries, of which there are very many: a sorted vector takes a fraction of the memory of a
//! B-tree, whose smallest node has room for eleven.

pub use litemap::LiteMap as SmallMap;

/// A map of these, which are ordered by their keys and have no key twice; with no more room than they need.
pub fn from_sorted<K: Ord, V>(entries: impl ExactSizeIterator<Item = (K, V)>) -> SmallMap<K, V> {
    SmallMap::from_sorted_store_unchecked(entries.collect())
}

/// An ordered set that most often has one value: that one takes no memory besides the set itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SmallSet<T>(Values<T>);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Values<T> {
    One(T),
    /// None, or several in order.
    Other(Vec<T>),
}

impl<T> Default for SmallSet<T> {
    fn default() -> Self {
        Self(Values::Other(Vec::new()))
    }
}

impl<T: Ord> SmallSet<T> {
    fn values(&self) -> &[T] {
        match &self.0 {
            Values::One(value) => std::slice::from_ref(value),
            Values::Other(values) => values,
        }
    }

    /// Its values, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.values().iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values().is_empty()
    }

    /// The least one.
    pub fn first(&self) -> Option<&T> {
        self.values().first()
    }

    /// Adds one; false where it was there.
    pub fn insert(&mut self, value: T) -> bool {
        let Err(place) = self.values().binary_search(&value) else { return false };
        let mut values = self.take();
        values.insert(place, value);
        self.put(values);
        true
    }

    /// Takes one out; false where it was not there.
    pub fn remove<Q: Ord + ?Sized>(&mut self, value: &Q) -> bool
    where
        T: std::borrow::Borrow<Q>,
    {
        let Ok(place) = self.values().binary_search_by(|v| v.borrow().cmp(value)) else { return false };
        let mut values = self.take();
        values.remove(place);
        self.put(values);
        true
    }

    fn take(&mut self) -> Vec<T> {
        match std::mem::take(self).0 {
            Values::One(value) => vec![value],
            Values::Other(values) => values,
        }
    }

    fn put(&mut self, mut values: Vec<T>) {
        self.0 = match values.pop() {
            Some(value) if values.is_empty() => Values::One(value),
            Some(last) => {
                values.push(last);
                Values::Other(values)
            }
            None => Values::Other(values),
        };
    }
}

impl<'a, T: Ord> IntoIterator for &'a SmallSet<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(changes in prop::collection::vec((any::<bool>(), 0u8..4), 0..20)) {
            let (mut small, mut set) = (SmallSet::default(), BTreeSet::new());
            for (add, value) in changes {
                if add {
                    prop_assert_eq!(small.insert(value), set.insert(value));
                } else {
                    prop_assert_eq!(small.remove(&value), set.remove(&value));
                }
                prop_assert!(small.iter().eq(&set));
                prop_assert_eq!((small.len(), small.is_empty(), small.first()), (set.len(), set.is_empty(), set.first()));
            }
        }
    }
}
