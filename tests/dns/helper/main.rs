//! DNS as an agent serves it, on a kernel in memory, and what its tests and benchmarks need besides.
//!
//! | command | does |
//! |---|---|
//! | `serve DIR [FLAG…]` | `meshlb agent --source DIR FLAG…` without a kernel: the same source, engine and server |
//! | `manifests DIR COUNT` | writes COUNT services with virtual IPs and five endpoints each |
//! | `names COUNT` | their names and addresses, as a hosts file |
//! | `storm ADDR DIR SERVICES CHANGES QUERIES SECONDS` | so many changes and queries a second: no answer may be wrong, old or missing |
//! | `latency ADDR COUNT QUERIES SECONDS` | asks for the names of COUNT services, so many a second: p50 and p99 in microseconds |
//! | `memory DIR` | MiB that the names of the services in DIR take |
//! | `changes ADDR DIR TIMES` | how long a change takes until it is in the answers: p50 and p99 |

mod ask;
mod latency;
mod manifests;
mod memory;
mod serve;
mod storm;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", dir, ..] => serve::run(dir, &words[2..]),
        ["manifests", dir, count] => manifests::write_all(dir.as_ref(), count.parse()?),
        ["names", count] => {
            (0..count.parse()?).for_each(|n| println!("{} {}", manifests::vip(n), manifests::name(n)));
            Ok(())
        }
        ["storm", addr, dir, services, changes, queries, seconds] => {
            let pace = storm::Pace {
                services: services.parse()?,
                changes: changes.parse()?,
                queries: queries.parse()?,
                seconds: seconds.parse()?,
            };
            storm::run(addr.parse()?, dir.as_ref(), &pace)
        }
        ["latency", addr, count, queries, seconds] => {
            latency::run(addr.parse()?, count.parse()?, queries.parse()?, seconds.parse()?)
        }
        ["memory", dir] => memory::run(dir.as_ref()),
        ["changes", addr, dir, times] => storm::changes(addr.parse()?, dir.as_ref(), times.parse()?),
        _ => bail!("see the top of tests/dns/helper/main.rs"),
    }
}
