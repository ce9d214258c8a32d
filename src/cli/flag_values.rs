//! Values of flags that are more than their type says.

use std::net::{IpAddr, Ipv4Addr};

use crate::model::node::ReservedPorts;

/// Ports that can't be published, or the word that there are none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reserved(pub Option<ReservedPorts>);

/// An address that can be a node's own.
pub fn parse_node_ip(s: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = s.parse().map_err(|_| "an IP address is wanted".to_owned())?;
    let mapped = matches!(ip, IpAddr::V6(a) if a.to_ipv4_mapped().is_some());
    let what = if ip.is_unspecified() {
        "unspecified"
    } else if ip.is_loopback() {
        "a loopback address"
    } else if ip.is_multicast() {
        "a multicast address"
    } else if ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        "the broadcast address"
    } else if mapped {
        "an IPv4 address in IPv6 notation"
    } else {
        return Ok(ip);
    };
    Err(format!("it is {what}; an address is wanted by which other machines reach this node"))
}

/// A name as nodes and DNS zones have it.
pub fn parse_dns_name(s: &str) -> Result<String, String> {
    if crate::api::is_dns_subdomain(s) {
        return Ok(s.to_owned());
    }
    Err("a DNS name is wanted: labels of lower-case letters, digits and '-', with '.' between them".into())
}

/// `22`, `2379-2380`, `4789/udp`; `none` and nothing at all are none.
pub fn parse_reserved(s: &str) -> Result<Reserved, String> {
    if matches!(s, "none" | "") { Ok(Reserved(None)) } else { s.parse().map(|ports| Reserved(Some(ports))) }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _, Parser as _};

    use crate::cli::Cli;

    #[test]
    fn nothing_reserved_can_be_said() {
        for flags in
            [&["--publish-reserved", "none"][..], &["--publish-reserved="], &["--publish-reserved", ""]]
        {
            let line = ["meshlb", "--node", "n1"].iter().chain(flags).chain(&["show"]);
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.options.settings().unwrap().node.reserved, vec![], "{flags:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("meshlb.yaml");
        for text in ["publish-reserved: []", "publish-reserved: none", "publish-reserved: ''"] {
            std::fs::write(&file, text).unwrap();
            let command = crate::cli::options::with_config_file(Cli::command(), &file).unwrap();
            let matches = command.try_get_matches_from(["meshlb", "--node", "n1", "show"]).unwrap();
            let cli = Cli::from_arg_matches(&matches).unwrap();
            assert_eq!(cli.options.settings().unwrap().node.reserved, vec![], "{text}");
        }
    }
}
