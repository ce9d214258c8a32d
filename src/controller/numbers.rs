//! The numbers of one pool that are given out, as its object keeps them: ranges in a line of text, for people too.

use std::{collections::BTreeSet, fmt, str::FromStr};

/// A set of numbers: offsets in a VIP range, or ports.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Numbers(pub BTreeSet<u128>);

impl fmt::Display for Numbers {
    /// `5,17-19`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if(|n| Some(*n) == last.checked_add(1)) {
                last = next;
            }
            if first == last {
                write!(f, "{comma}{first}")?
            } else {
                write!(f, "{comma}{first}-{last}")?
            }
            comma = ",";
        }
        Ok(())
    }
}

impl FromStr for Numbers {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |part: &str| format!("{part:?} is not a number or a range of numbers");
        let mut out = BTreeSet::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |t: &str| t.trim().parse::<u128>().map_err(|_| bad(part));
            let (first, last) = (number(first)?, number(last)?);
            // A pool has at most 2^32 numbers that are given out by chance; no range of taken ones comes near this.
            if last < first || last - first > 1 << 20 {
                return Err(bad(part));
            }
            out.extend(first..=last);
        }
        Ok(Self(out))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_short() {
        let numbers = Numbers([1, 2, 3, 9, 11, 12].into());
        assert_eq!(numbers.to_string(), "1-3,9,11-12");
        assert_eq!(Numbers::default().to_string(), "");
    }

    #[test]
    fn what_is_not_a_set_is_refused() {
        for text in ["x", "3-", "-3", "5-3", "1,,x", "0-99999999999"] {
            assert!(text.parse::<Numbers>().is_err(), "{text}");
        }
        assert_eq!(" 1 , 3 - 4 ,".parse::<Numbers>().unwrap(), Numbers([1, 3, 4].into()));
    }

    proptest! {
        #[test]
        fn text_and_back(numbers: BTreeSet<u16>) {
            let numbers = Numbers(numbers.into_iter().map(u128::from).collect());
            prop_assert_eq!(numbers.to_string().parse::<Numbers>().unwrap(), numbers);
        }
    }
}
