//! What may be asked of this machine's clock.

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

/// Whether QEMU emulates the processors in software (its TCG names itself in /proc/cpuinfo).
pub fn emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| {
        fs::read_to_string("/proc/cpuinfo")
            .is_ok_and(|text| text.lines().any(|l| l.starts_with("model name") && l.contains("TCG")))
    })
}

/// A time that a healthy machine never needs, for one that is emulated: a program that starts in a few milliseconds elsewhere
/// takes there a tenth of a second, and several when another VM has the processors.
pub fn patience(elsewhere: Duration) -> Duration {
    if emulated() { elsewhere * 3 } else { elsewhere }
}
