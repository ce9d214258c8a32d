//! What a case is run with: renderers, families, protocols.

use std::fmt;
use std::net::IpAddr;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// An address's family.
    pub fn of(ip: IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// As EndpointSlices call it.
    pub fn address_type(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    /// The family's `iptables-restore`.
    pub fn iptables_restore(self) -> &'static str {
        match self {
            Family::V4 => "iptables-restore",
            Family::V6 => "ip6tables-restore",
        }
    }

    /// One of two values.
    pub fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    /// This host itself.
    pub fn localhost(self) -> IpAddr {
        self.pick(IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]))
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pick("v4", "v6"))
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Proto {
    /// All three.
    pub const ALL: [Proto; 3] = [Proto::Tcp, Proto::Udp, Proto::Sctp];

    /// As in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Proto::Tcp => "TCP",
            Proto::Udp => "UDP",
            Proto::Sctp => "SCTP",
        }
    }

    /// As in IP headers.
    pub fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
            Proto::Sctp => 132,
        }
    }

    /// Whether this kernel has it.
    pub fn available(self) -> bool {
        self != Proto::Sctp || crate::server::socket(self, Family::V4.localhost()).is_ok()
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_ascii_lowercase())
    }
}

/// How netfilter is programmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renderer {
    /// `iptables` on nf_tables.
    IptablesNft,
    /// `iptables` of old.
    IptablesLegacy,
    /// `nft`.
    Nftables,
}

impl Renderer {
    /// All three.
    pub const ALL: [Renderer; 3] = [Renderer::IptablesNft, Renderer::IptablesLegacy, Renderer::Nftables];

    /// The value of `--renderer`.
    pub fn flag(self) -> &'static str {
        match self {
            Renderer::IptablesNft => "iptables-nft",
            Renderer::IptablesLegacy => "iptables-legacy",
            Renderer::Nftables => "nftables",
        }
    }
}

impl fmt::Display for Renderer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Renderer::IptablesNft => "iptables-nft",
            Renderer::IptablesLegacy => "iptables-legacy",
            Renderer::Nftables => "nftables",
        })
    }
}

/// What a case is run with; a dimension that is not in its matrix has the first value.
#[derive(Debug, Clone, Copy)]
pub struct Params {
    /// How netfilter is programmed.
    pub renderer: Renderer,
    /// The addresses' family.
    pub family: Family,
    /// The protocol.
    pub proto: Proto,
}

/// The values that a case is run with, each with each.
#[derive(Debug, Clone, Default)]
pub struct Matrix {
    renderers: Vec<Renderer>,
    pair: bool,
    families: Vec<Family>,
    protos: Vec<Proto>,
}

impl Matrix {
    /// Once, with iptables-nft, IPv4 and TCP.
    pub fn once() -> Matrix {
        Matrix::default()
    }

    /// With nftables and with one of the two flavours of iptables: for cases about what `meshlb` does, not about how the
    /// kernel takes its rules. Both flavours are programmed by the same code, with other binaries, so that such a case finds
    /// with the second one what it has found with the first; the whole run takes long enough. Which one it is the case's
    /// name decides, the same one in each run, and about half of the cases have either.
    pub fn pair() -> Matrix {
        Matrix { pair: true, ..Matrix::default() }
    }

    /// With every renderer: for cases about rules and packets.
    pub fn renderers() -> Matrix {
        Matrix::once().with_renderers(&Renderer::ALL)
    }

    /// With these renderers.
    pub fn with_renderers(mut self, renderers: &[Renderer]) -> Matrix {
        self.renderers = renderers.to_vec();
        self
    }

    /// With both families.
    pub fn families(mut self) -> Matrix {
        self.families = Family::ALL.to_vec();
        self
    }

    /// With these protocols.
    pub fn protos(mut self, protos: &[Proto]) -> Matrix {
        self.protos = protos.to_vec();
        self
    }

    /// The flavour of iptables for a case of this name: by whether the sum of its letters is odd.
    pub fn flavour(name: &str) -> Renderer {
        Matrix::flavour_in_turn(name, 0)
    }

    /// The same, and the other one in the next turn.
    pub fn flavour_in_turn(name: &str, turn: usize) -> Renderer {
        let sum: usize = name.bytes().map(usize::from).sum();
        if (sum + turn % 2).is_multiple_of(2) { Renderer::IptablesNft } else { Renderer::IptablesLegacy }
    }

    /// The suffix of its name and the parameters of each case.
    pub fn expand(&self, name: &str) -> Vec<(String, Params)> {
        fn values<T: Copy + fmt::Display>(list: &[T], default: T) -> Vec<(T, Option<String>)> {
            match list {
                [] => vec![(default, None)],
                list => list.iter().map(|v| (*v, Some(v.to_string()))).collect(),
            }
        }
        let pair = [Matrix::flavour(name), Renderer::Nftables];
        let renderers = if self.pair { &pair[..] } else { &self.renderers };
        let mut out = Vec::new();
        for (renderer, a) in values(renderers, Renderer::IptablesNft) {
            for (family, b) in values(&self.families, Family::V4) {
                for (proto, c) in values(&self.protos, Proto::Tcp) {
                    let words: Vec<String> = [&a, &b, &c].into_iter().flatten().cloned().collect();
                    let suffix =
                        if words.is_empty() { String::new() } else { format!("[{}]", words.join(",")) };
                    out.push((suffix, Params { renderer, family, proto }));
                }
            }
        }
        out
    }
}
