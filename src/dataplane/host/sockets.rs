//! Sockets that listen on this node.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use nix::errno::Errno;

use super::netlink::{Conn, Failure, attrs};
use crate::{
    dataplane::{Error, Listener},
    model::ids::{Family, Protocol},
};

/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Lengths of `struct inet_diag_req_v2` and `struct inet_diag_msg` (linux/inet_diag.h).
const REQUEST_LEN: usize = 56;
const ANSWER_LEN: usize = 72;
/// Local port and local address in the latter.
const SPORT: usize = 4;
const SRC: usize = 8;
/// `INET_DIAG_SKV6ONLY`: the socket takes no IPv4. Present for every IPv6 listener.
const INET_DIAG_SKV6ONLY: u16 = 11;
/// `TCP_LISTEN`; and `TCP_CLOSE`, which is what a UDP socket without a peer is in (net/tcp_states.h).
const TCP_LISTEN: u8 = 10;
const TCP_CLOSE: u8 = 7;
/// Tables of the calling thread's network namespace: /proc/net is that of the process.
const PROC_NET: &str = "/proc/thread-self/net";

impl Listener {
    /// Whether it would get a packet for this address and port, were there no socket with a more
    /// specific address.
    ///
    /// An IPv6 socket on `::` that takes IPv4 as well (no `IPV6_V6ONLY`) is two listeners, `::` and
    /// `0.0.0.0`; so families never mix here.
    pub fn takes(&self, addr: IpAddr, protocol: Protocol, port: u16) -> bool {
        let address =
            self.addr == addr || (self.addr.is_unspecified() && Family::of(&self.addr) == Family::of(&addr));
        address && self.protocol == protocol && self.port == port
    }
}

/// Everything that listens, sorted and without duplicates (SO_REUSEPORT).
pub(crate) fn listeners(conn: &mut Conn) -> Result<Vec<Listener>, Error> {
    let mut found = BTreeSet::new();
    for (protocol, state) in [(Protocol::Tcp, TCP_LISTEN), (Protocol::Udp, TCP_CLOSE)] {
        for family in Family::ALL {
            match by_diag(conn, family, protocol, state, &mut found) {
                Ok(()) => {}
                // The module for this protocol (tcp_diag, udp_diag) is not there: read the slow table.
                Err(f) if matches!(f.errno(), Some(Errno::ENOENT | Errno::EPROTONOSUPPORT)) => {
                    by_proc(family, protocol, state, &mut found)?;
                }
                Err(f) => return Err(f.about(format!("read the {protocol} sockets of this node"))),
            }
        }
    }
    let path = format!("{PROC_NET}/sctp/eps");
    found.extend(table(&path)?.lines().skip(1).flat_map(sctp_endpoint));
    Ok(found.into_iter().collect())
}

fn by_diag(
    conn: &mut Conn,
    family: Family,
    protocol: Protocol,
    state: u8,
    found: &mut BTreeSet<Listener>,
) -> Result<(), Failure> {
    let mut request = [0; REQUEST_LEN];
    request[0] = match family {
        Family::V4 => 2,  // AF_INET
        Family::V6 => 10, // AF_INET6
    };
    request[1] = protocol.number();
    request[4..8].copy_from_slice(&(1u32 << state).to_ne_bytes());
    let answers = conn.dump(SOCK_DIAG_BY_FAMILY, &request, |_, body| {
        let addr = match family {
            Family::V4 => IpAddr::from(*body.get(SRC..)?.first_chunk::<4>()?),
            Family::V6 => IpAddr::from(*body.get(SRC..)?.first_chunk::<16>()?),
        };
        let port = u16::from_be_bytes(*body.get(SPORT..)?.first_chunk()?);
        let v6_only = attrs(body.get(ANSWER_LEN..)?)
            .find(|(kind, _)| *kind == INET_DIAG_SKV6ONLY)
            .is_some_and(|(_, value)| value.first() == Some(&1));
        Some((addr, port, v6_only))
    })?;
    for (addr, port, v6_only) in answers {
        add(found, protocol, addr, port, v6_only);
    }
    Ok(())
}

fn add(found: &mut BTreeSet<Listener>, protocol: Protocol, addr: IpAddr, port: u16, v6_only: bool) {
    if port == 0 {
        return;
    }
    // A socket bound to ::ffff:192.0.2.1 is an IPv4 one.
    let addr = addr.to_canonical();
    found.insert(Listener { protocol, addr, port });
    if addr == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !v6_only {
        found.insert(Listener { protocol, addr: Ipv4Addr::UNSPECIFIED.into(), port });
    }
}

fn by_proc(
    family: Family,
    protocol: Protocol,
    state: u8,
    found: &mut BTreeSet<Listener>,
) -> Result<(), Error> {
    let suffix = if family == Family::V6 { "6" } else { "" };
    let text = table(&format!("{PROC_NET}/{}{suffix}", protocol.lower()))?;
    for (addr, port) in text.lines().skip(1).filter_map(|line| proc_socket(line, state)) {
        // This table doesn't tell; taking IPv4 too is the default.
        add(found, protocol, addr, port, false);
    }
    Ok(())
}

/// A missing table is an empty one: the protocol's module is not loaded, so nobody listens.
fn table(path: &str) -> Result<String, Error> {
    match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|e| Error::Failed { object: format!("read {path}"), reason: e.to_string() }),
    }
}

/// `  0: 0100007F:1F90 00000000:0000 0A …`: address words in the machine's byte order, then the port.
fn proc_socket(line: &str, state: u8) -> Option<(IpAddr, u16)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _peer, st) = (fields.next()?, fields.next()?, fields.next()?);
    if u8::from_str_radix(st, 16).ok()? != state {
        return None;
    }
    let (addr, port) = local.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for word in addr.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let addr = match bytes.len() {
        4 => IpAddr::from(*bytes.first_chunk::<4>()?),
        16 => IpAddr::from(*bytes.first_chunk::<16>()?),
        _ => return None,
    };
    Some((addr, u16::from_str_radix(port, 16).ok()?))
}

/// `ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS…` (net/sctp/proc.c); SST 10 is listening.
fn sctp_endpoint(line: &str) -> Vec<Listener> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let (Some(&"10"), Some(port), Some(addrs)) = (fields.get(3), fields.get(5), fields.get(8..)) else {
        return Vec::new();
    };
    let port = port.parse().unwrap_or(0);
    let mut found = BTreeSet::new();
    for addr in addrs.iter().filter_map(|a| a.parse().ok()) {
        add(&mut found, Protocol::Sctp, addr, port, false);
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(protocol: Protocol, addr: &str, port: u16) -> Listener {
        Listener { protocol, addr: addr.parse().unwrap(), port }
    }

    #[test]
    fn wildcards_take_their_own_family() {
        let any6 = listener(Protocol::Tcp, "::", 80);
        assert!(any6.takes("fd00::1".parse().unwrap(), Protocol::Tcp, 80));
        assert!(!any6.takes("192.0.2.1".parse().unwrap(), Protocol::Tcp, 80));
        let any4 = listener(Protocol::Tcp, "0.0.0.0", 80);
        assert!(any4.takes("192.0.2.1".parse().unwrap(), Protocol::Tcp, 80));
        assert!(!any4.takes("192.0.2.1".parse().unwrap(), Protocol::Udp, 80));
        assert!(!any4.takes("192.0.2.1".parse().unwrap(), Protocol::Tcp, 81));
        let one = listener(Protocol::Udp, "192.0.2.1", 53);
        assert!(one.takes("192.0.2.1".parse().unwrap(), Protocol::Udp, 53));
        assert!(!one.takes("192.0.2.2".parse().unwrap(), Protocol::Udp, 53));
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn proc_tables_are_read() {
        let v4 = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0";
        assert_eq!(proc_socket(v4, TCP_LISTEN), Some(("127.0.0.1".parse().unwrap(), 8080)));
        assert_eq!(proc_socket(v4, TCP_CLOSE), None);
        let v6 = "   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A";
        assert_eq!(proc_socket(v6, TCP_LISTEN), Some(("::1".parse().unwrap(), 80)));
        assert_eq!(proc_socket("rubbish", TCP_LISTEN), None);
        assert_eq!(proc_socket("0: 0102030405:02 03:04 0A", TCP_LISTEN), None);
    }

    #[test]
    fn sctp_endpoints_that_listen_are_read() {
        let line =
            " 0000000012345678 0000000087654321 2   10  29     9999      0 12345 192.168.50.1 fd00:50::1 ";
        assert_eq!(
            sctp_endpoint(line),
            [listener(Protocol::Sctp, "192.168.50.1", 9999), listener(Protocol::Sctp, "fd00:50::1", 9999)]
        );
        assert_eq!(sctp_endpoint(" 0 0 2   7  29  9999 0 12345 192.168.50.1"), []);
        assert_eq!(sctp_endpoint(""), []);
        let any = sctp_endpoint("1 2 0 10 29 9999 0 1 ::");
        assert_eq!(any.len(), 2, "{any:?}");
    }
}
