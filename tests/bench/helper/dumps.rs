//! The dumps alone: what has to be read before anything can be compared.

use std::time::Instant;

use anyhow::{Result, anyhow};
use meshlb::{
    dataplane::{Ipvs, Netfilter, ipvs::KernelIpvs, netfilter},
    model::{
        ids::PerFamily,
        kernel::{FamilyProgram, Program},
    },
};

/// Prints nanoseconds for the IPVS dump and for the sets and rules, a line each time.
pub fn run(renderer: &str, node: &str, times: u32) -> Result<()> {
    let family = FamilyProgram {
        range: "10.200.0.0/16".parse()?,
        ingress: "10.200.0.1".parse()?,
        node: node.parse()?,
    };
    let program = Program {
        mask: 0x3fff,
        families: PerFamily { v4: Some(family), v6: None },
        masquerade_bridges: Vec::new(),
        uplinks: Vec::new(),
        outside: Vec::new(),
    };
    for _ in 0..times {
        let mut ipvs = KernelIpvs::open()?;
        let mut rules: Box<dyn Netfilter> = match renderer {
            "nftables" => Box::new(netfilter::Nftables::new()?),
            name => Box::new(netfilter::Iptables::new(name.parse().map_err(|e| anyhow!("{e}"))?)?),
        };
        let start = Instant::now();
        let servers = ipvs.dump(&|_| true)?;
        let middle = Instant::now();
        let found = rules.observe(&program)?;
        let end = Instant::now();
        let reals: usize = servers.values().map(|s| s.reals.len()).sum();
        println!("{} {}", (middle - start).as_nanos(), (end - middle).as_nanos());
        eprintln!("{} services, {reals} destinations, {} elements", servers.len(), found.elements.len());
    }
    Ok(())
}
