//! Installs the netfilter program of one node by hand, to look at what packets meet.
//!
//! `netfilter RENDERER install NODE4 NODE6 < ELEMENTS`, `observe NODE4 NODE6`, `remove`. An element a line:
//! `vip 10.200.0.5,tcp:80 0x100`, `published …`, `loopback 4,tcp:30080 0x100`, `local ADDR`, `endpoint ADDR`,
//! `own ADDR,PROTOCOL:PORT`.

use std::io::Read;

use anyhow::{Context, Result, bail};
use meshlb::{
    dataplane::{Netfilter, netfilter},
    model::{
        ids::{Family, Mark, PerFamily},
        kernel::{Element, Elements, FamilyProgram, Program, Target},
    },
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut renderer: Box<dyn Netfilter> = match words.first() {
        Some(&"nftables") => Box::new(netfilter::Nftables::new()?),
        Some(name) => {
            let variant = name.parse().map_err(anyhow::Error::msg)?;
            Box::new(netfilter::Iptables::new(variant)?)
        }
        None => bail!("netfilter RENDERER install|observe|remove NODE4 NODE6"),
    };
    match words[1..] {
        ["install", node4, node6] => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            renderer.install(&program(node4, node6)?, &elements(&text)?)?;
        }
        ["observe", node4, node6] => println!("{:#?}", renderer.observe(&program(node4, node6)?)?),
        ["remove"] => renderer.remove()?,
        _ => bail!("netfilter RENDERER install|observe|remove NODE4 NODE6"),
    }
    Ok(())
}

fn program(node4: &str, node6: &str) -> Result<Program> {
    let v4 = FamilyProgram {
        range: "10.200.0.0/16".parse()?,
        ingress: "10.200.0.1".parse()?,
        node: node4.parse()?,
    };
    let v6 = FamilyProgram {
        range: "fd00:200::/112".parse()?,
        ingress: "fd00:200::1".parse()?,
        node: node6.parse()?,
    };
    Ok(Program {
        mask: 0x3fff,
        families: PerFamily { v4: Some(v4), v6: Some(v6) },
        masquerade_bridges: Vec::new(),
        uplinks: Vec::new(),
        outside: Vec::new(),
    })
}

fn elements(text: &str) -> Result<Elements> {
    text.lines().filter(|l| !l.trim().is_empty()).map(|l| element(l).with_context(|| l.to_owned())).collect()
}

fn element(line: &str) -> Result<(Element, Option<Mark>)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mark = || -> Result<Option<Mark>> {
        let hex = words.get(2).context("a mark")?.trim_start_matches("0x");
        Ok(Some(Mark(u32::from_str_radix(hex, 16)?)))
    };
    let parts = || -> Result<(&str, &str, &str)> {
        let (addr, rest) = words.get(1).context("a key")?.split_once(',').context("ADDR,PROTOCOL:PORT")?;
        let (protocol, port) = rest.split_once(':').context("PROTOCOL:PORT")?;
        Ok((addr, protocol, port))
    };
    let target = || -> Result<Target> {
        let (addr, protocol, port) = parts()?;
        Ok(Target { addr: addr.parse()?, protocol: protocol.parse()?, port: port.parse()? })
    };
    let addr = || -> Result<std::net::IpAddr> { Ok(words.get(1).context("an address")?.parse()?) };
    Ok(match words[0] {
        "vip" => (Element::Vip(target()?), mark()?),
        "published" => (Element::Published(target()?), mark()?),
        "loopback" => {
            let (family, protocol, port) = parts()?;
            let family = if family == "4" { Family::V4 } else { Family::V6 };
            (Element::Loopback(family, protocol.parse()?, port.parse()?), mark()?)
        }
        "local" => (Element::Local(addr()?), None),
        "endpoint" => (Element::Endpoint(addr()?), None),
        "own" => (Element::Own(target()?), None),
        other => bail!("{other} is no kind of element"),
    })
}
