//! FNV-1a, because a fingerprint outlives the process and std's hashes are not promised to be stable.

/// The state to begin with.
pub(crate) const START: u64 = 0xcbf2_9ce4_8422_2325;

/// The state after these bytes and a separator.
pub(crate) fn bytes(state: u64, bytes: &[u8]) -> u64 {
    let step = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let state = bytes.iter().fold(state, |s, b| step(s, *b));
    bytes.len().to_le_bytes().iter().fold(state, |s, b| step(s, *b))
}

/// Hash of texts.
pub(crate) fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> u64 {
    texts.into_iter().fold(START, |state, text| bytes(state, text.as_bytes()))
}
