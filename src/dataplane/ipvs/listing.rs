//! `/proc/net/ip_vs`: what the kernel lists for people (`ip_vs_info_seq_show` in `net/netfilter/ipvs/ip_vs_ctl.c`).
//!
//! One text of all services and destinations, which costs a sixth of what reading them by netlink does, since that takes a
//! dump for each service. It leaves things out: see [`Listed`]; and services, where other network namespaces have some: `ip_vs_info_seq_next`
//! counts theirs, and `ip_vs_info_array`, by which each page of the text goes on, does not.

use std::{
    io::{self, BufRead},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{super::Listed, Mark, RealServerConfig, RealServerKey, altered};

/// Of the network namespace of the thread that reads it.
pub(super) const PATH: &str = "/proc/thread-self/net/ip_vs";

/// Shows each fwmark service that `keep` accepts.
///
/// # Errors
/// When it can't be read, and [`io::ErrorKind::InvalidData`] with the line that is not as we know them.
pub(super) fn read(
    mut from: impl BufRead,
    keep: &dyn Fn(Mark) -> bool,
    each: &mut dyn FnMut(&Listed<'_>),
) -> io::Result<()> {
    let mut line = Vec::with_capacity(128);
    let mut service: Option<Service> = None;
    let mut reals = Vec::new();
    let mut title = true;
    let mut ended = false;
    while !ended {
        line.clear();
        ended = from.read_until(b'\n', &mut line)? == 0;
        if let Some(real) = line.strip_prefix(b"  -> ") {
            // The title has one too, and so has what is not ours.
            if service.is_some() {
                reals.push(destination(real).ok_or_else(|| unknown(&line))?);
            }
            continue;
        }
        if let Some(service) = service.take() {
            each(&service.listed(&reals));
        }
        reals.clear();
        if let Some(rest) = line.strip_prefix(b"FWM  ") {
            let found = Service::parse(rest).ok_or_else(|| unknown(&line))?;
            service = Some(found).filter(|found| keep(found.mark));
        } else {
            // Services by address, whatever the kernel calls their protocol, are others'.
            title &= !line.starts_with(b"Prot ");
        }
    }
    if title { Err(unknown(b"no title")) } else { Ok(()) }
}

fn unknown(line: &[u8]) -> io::Error {
    let line = String::from_utf8_lossy(line);
    io::Error::new(io::ErrorKind::InvalidData, format!("not a line of an IPVS table: {:?}", line.trim_end()))
}

/// What blanks part, without anything that a table of ten thousand services makes dear.
fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| matches!(byte, b' ' | b'\n')).filter(|word| !word.is_empty())
}

/// Digits of a number, all of them.
fn number(digits: &[u8], base: u32) -> Option<u32> {
    let digit = |sum: u32, byte: &u8| sum.checked_mul(base)?.checked_add(char::from(*byte).to_digit(base)?);
    digits.iter().try_fold(0, digit).filter(|_| !digits.is_empty())
}

/// The first line of a service.
struct Service {
    mark: Mark,
    scheduler: String,
    plain: bool,
}

impl Service {
    /// `00010001 rr`, with `ops` and `persistent TIMEOUT NETMASK` after it where it has that.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = words(line);
        let mark = Mark(number(words.next()?, 16)?);
        let scheduler = std::str::from_utf8(words.next()?).ok()?.to_owned();
        let mut plain = true;
        while let Some(word) = words.next() {
            match word {
                b"ops" => {}
                b"persistent" => {
                    words.nth(1)?;
                }
                _ => return None,
            }
            plain = false;
        }
        Some(Self { mark, scheduler, plain })
    }

    fn listed<'a>(&'a self, reals: &'a [(RealServerKey, RealServerConfig)]) -> Listed<'a> {
        Listed { mark: self.mark, scheduler: &self.scheduler, plain: self.plain, reals }
    }
}

/// `0AF4010B:1F90      Masq    1      0          0`, or `[fd00:…]:1F90` with all digits.
fn destination(line: &[u8]) -> Option<(RealServerKey, RealServerConfig)> {
    commonest(line).or_else(|| any_destination(line))
}

/// One of IPv4 that is masqueraded to, by where everything stands in it: tens of thousands of these lines are most of what there is to read.
fn commonest(line: &[u8]) -> Option<(RealServerKey, RealServerConfig)> {
    let (addr, rest) = line.split_first_chunk::<8>()?;
    let (port, rest) = rest.strip_prefix(b":")?.split_first_chunk::<4>()?;
    let (weight, _) = rest.strip_prefix(b"      Masq    ")?.split_first_chunk::<7>()?;
    let addr = IpAddr::V4(Ipv4Addr::from(hexadecimal(addr)?));
    let port = u16::try_from(hexadecimal(port)?).ok()?;
    let digits = weight.iter().position(|byte| *byte == b' ')?;
    let weight = number(weight.get(..digits)?, 10)?;
    Some((RealServerKey { addr, port }, RealServerConfig { weight }))
}

/// At most eight digits, as the kernel writes them.
fn hexadecimal(digits: &[u8]) -> Option<u32> {
    let mut sum = 0;
    for byte in digits {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'A'..=b'F' => byte - b'A' + 10,
            _ => return None,
        };
        sum = sum << 4 | u32::from(digit);
    }
    Some(sum)
}

fn any_destination(line: &[u8]) -> Option<(RealServerKey, RealServerConfig)> {
    let mut words = words(line);
    let (addr, port) = match words.next()? {
        [b'[', rest @ ..] => {
            let (addr, port) = rest.split_at_checked(rest.iter().position(|byte| *byte == b']')?)?;
            let addr: Ipv6Addr = std::str::from_utf8(addr).ok()?.parse().ok()?;
            (IpAddr::V6(addr), port.strip_prefix(b"]:")?)
        }
        word => {
            let (addr, port) = word.split_at_checked(8)?;
            (IpAddr::V4(Ipv4Addr::from(number(addr, 16)?)), port.strip_prefix(b":")?)
        }
    };
    let port = u16::try_from(number(port, 16)?).ok()?;
    // `ip_vs_fwd_name`, which has `Masq` for what it doesn't know; an endpoint on the host itself becomes `Local`.
    let forwarding = words.next()?;
    // Signed, in the kernel, which refuses one below 0. The connections that follow change all the time.
    let weight = number(words.next()?, 10)?;
    let config = match forwarding {
        b"Masq" | b"Local" => RealServerConfig { weight },
        b"Tunnel" | b"Route" => altered(),
        _ => return None,
    };
    Some((RealServerKey { addr, port }, config))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// From Debian's kernel 6.1, made by `ipvsadm`: flags, forwarding methods, and services by address between them.
    const TABLE: &str = include_str!("testdata/ip_vs.txt");

    fn all(text: &str, keep: &dyn Fn(Mark) -> bool) -> io::Result<Vec<String>> {
        let mut out = Vec::new();
        read(text.as_bytes(), keep, &mut |listed| {
            let mut line = format!("{:#x} {}", listed.mark.0, listed.scheduler);
            if !listed.plain {
                line += " with flags";
            }
            for (real, config) in listed.reals {
                let _ = write!(line, " {real}={}", config.weight as i32);
            }
            out.push(line);
        })?;
        out.sort();
        Ok(out)
    }

    #[test]
    fn reads_what_a_kernel_lists() {
        assert_eq!(
            all(TABLE, &|_| true).unwrap(),
            [
                "0x10001 rr 10.244.1.12:8080=0 10.244.1.11:8080=1",
                "0x10001 rr [fd00:244:1::11]:8080=1",
                "0x10002 sh with flags",
                "0x10003 wlc with flags 10.244.1.11:0=65535",
                "0x10004 mh 10.244.1.14:80=-1 127.0.0.1:80=1 10.244.1.13:80=-1",
            ]
        );
        let others = format!("{TABLE}IP_47  0A600001:0000 rr \n  -> who:knows\nFWM  0001000A rr \n");
        assert_eq!(all(&others, &|mark| mark.0 == 0x1000a).unwrap(), ["0x1000a rr"]);
        assert_eq!(all(TABLE, &|mark| mark.0 == 0x10002).unwrap(), ["0x10002 sh with flags"]);
        assert_eq!(all(TABLE, &|_| false).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_empty_table_has_its_title() {
        let title: String = TABLE.split_inclusive('\n').take(3).collect();
        assert_eq!(all(&title, &|_| true).unwrap(), Vec::<String>::new());
        all("", &|_| true).unwrap_err();
    }

    #[test]
    fn a_line_of_another_kind_is_an_error() {
        for wrong in ["FWM  00010001", "FWM  1000x rr", "FWM  00010001 rr sticky"] {
            let error = all(&format!("{TABLE}{wrong}\n"), &|_| true).unwrap_err();
            assert!(error.to_string().contains(wrong), "{error}");
        }
        let service = format!("{TABLE}FWM  00010009 rr\n");
        for wrong in
            ["0A60:0050 1 0 0", "0A600001:0050 Magic 1 0 0", "0A600001:0050 Masq", "[fd00::1:0050 Masq 1 0 0"]
        {
            all(&format!("{service}  -> {wrong}\n"), &|_| true).unwrap_err();
        }
    }

    #[test]
    fn both_ways_to_read_a_destination_say_the_same() {
        for (line, quick) in [
            ("0AF4010B:1F90      Masq    1      0          0         \n", true),
            ("0AF4010B:1F90      Masq    65535  12         3         \n", true),
            ("FFFFFFFF:FFFF      Masq    0      0          0         \n", true),
            ("0AF4010B:1F90      Masq    1234567 0          0         \n", false),
            ("0AF4010B:1F90      Masq    -1     0          0         \n", false),
            ("0AF4010B:1F90      Local   1      0          0         \n", false),
            ("0af4010b:1F90      Masq    1      0          0         \n", false),
            ("0AF4010B:1F90 Masq 1 0 0\n", false),
            (
                "[fd00:0244:0001:0000:0000:0000:0000:0011]:1F90      Masq    1      0          0         \n",
                false,
            ),
        ] {
            let got = commonest(line.as_bytes());
            assert_eq!(got.is_some(), quick, "{line}");
            assert!(got.is_none() || got == any_destination(line.as_bytes()), "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), lines in prop::collection::vec(
            prop_oneof!["  -> [0-9A-F:\\[\\]]{0,20} (Masq|Local|Route|) *-?[0-9]{0,12} 0 0", "FWM  [0-9A-F]{0,9} [a-z ]{0,20}", "(TCP|UDP|SCTP)  .{0,20}"], 0..20)
        ) {
            let _ = read(&bytes[..], &|_| true, &mut |_| {});
            let _ = all(&format!("{TABLE}{}", lines.join("\n")), &|_| true);
        }
    }
}
