//! Maps and sets with a few entries, of which there are very many: a sorted vector takes a fraction of the memory of a
//! B-tree, whose smallest node has room for eleven.

pub use litemap::LiteMap as SmallMap;

/// A set with a few entries.
pub type SmallSet<T> = SmallMap<T, ()>;
