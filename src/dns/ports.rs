//! Ports of clients: each question to an upstream takes one, and so does everything else on the node that asks others.

use std::path::Path;

use super::pool::MOST;

/// Where `/proc/sys` is not to be read: as many as Linux has by default (32768 to 60999).
pub const DEFAULT: usize = 28_232;
/// Lookups that there may be at once, however few files there may be.
const FEWEST: usize = 64;
/// And however few ports.
const FEWEST_BY_PORTS: usize = 4;
/// Of so many ports lookups may take one: the rest is for the node's other connections.
const SHARE: usize = 4;

/// How many there are on the node (`net.ipv4.ip_local_port_range`, which is IPv6's too).
pub fn of_clients(proc_sys: &Path) -> usize {
    let text = std::fs::read_to_string(proc_sys.join("net/ipv4/ip_local_port_range"));
    text.ok().and_then(|text| count(&text)).unwrap_or(DEFAULT)
}

fn count(range: &str) -> Option<usize> {
    let mut ends = range.split_whitespace().map(|end| end.parse::<usize>().ok());
    let (first, last) = (ends.next()??, ends.next()??);
    Some(last.checked_sub(first)? + 1)
}

/// How many names may be looked up at once by who may have so many files and ports. A lookup is up to [`MOST`] sockets, and one
/// by TCP after each of them; of four files one is left, for connections and for the rest of the agent.
pub(super) fn lookups(files: usize, ports: usize) -> usize {
    (files / 16).max(FEWEST).min((ports / SHARE / MOST).max(FEWEST_BY_PORTS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_clients_are_counted() {
        assert_eq!(count("32768\t60999\n"), Some(DEFAULT));
        assert_eq!((count("7 7"), count("9 7"), count("7"), count("")), (Some(1), None, None, None));
        assert_eq!(of_clients(Path::new("/nowhere")), DEFAULT);
        assert!(of_clients(Path::new("/proc/sys")) > 0);
    }

    #[test]
    fn lookups_leave_most_ports_to_others() {
        for (files, ports, want) in [
            (65_536, DEFAULT, 2352),
            (65_536, 65_000, 4096),
            (8192, DEFAULT, 512),
            (65_536, 12_000, 1000),
            (1024, DEFAULT, 64),
            (65_536, 100, 8),
            (65_536, 10, 4),
        ] {
            assert_eq!(lookups(files, ports), want, "{files} {ports}");
        }
        assert!(lookups(65_536, DEFAULT) * MOST <= DEFAULT / SHARE);
    }
}
