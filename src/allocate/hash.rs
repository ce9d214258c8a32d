//! The hash that automatic values start from. It is part of the contract between nodes: never change it.

/// FNV-1a, 64 bit (draft-eastlake-fnv), of `namespace/name` for a VIP and of `namespace/name/port/PROTOCOL` for
/// a published port, finished with the mixer of MurmurHash3 (`fmix64`), since FNV's low bits alone follow the
/// last characters too closely.
pub fn stable(text: &str) -> u64 {
    let fnv = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mixed = (fnv ^ (fnv >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_changes() {
        assert_eq!(
            [stable(""), stable("default/vote"), stable("default/vote/80/TCP")].map(|h| format!("{h:016x}")),
            ["efd01f60ba992926", "6ba18a53ee9c4037", "1ffcb23a986e47dc"]
        );
    }
}
