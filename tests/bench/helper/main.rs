//! What the shell scripts of `make bench` can't do fast or exactly enough.
//!
//! | command | does |
//! |---|---|
//! | `manifests DIR COUNT` | writes COUNT services with five endpoints each, one file a service |
//! | `changes PID DIR COUNT PID DIR COUNT TIMES` | changes one endpoint in each folder in turn; CPU time of the two agents for each change |
//! | `quiet PID` | waits until a process does nothing |
//! | `cpu PID` | CPU time of a process so far, in nanoseconds |
//! | `ready PID ADDR` | waits until the agent there says that the kernel is as it should be |
//! | `dumps RENDERER NODE TIMES` | reads the kernel as a comparison has to, and nothing else |
//! | `accept ADDR` | takes connections and closes them |
//! | `connect SECONDS TIMES ADDR ADDR` | connections per second to each address, in turn |

mod changes;
mod connect;
mod dumps;
mod folder;
mod manifests;
mod ready;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["manifests", dir, count] => folder::write_all(dir.as_ref(), count.parse()?),
        ["changes", a, dir_a, count_a, b, dir_b, count_b, times] => {
            let one = changes::Watched::new(a.parse()?, dir_a, count_a.parse()?);
            let other = changes::Watched::new(b.parse()?, dir_b, count_b.parse()?);
            changes::run(one, other, times.parse()?)
        }
        ["quiet", pid] => changes::wait_quiet(pid.parse()?).map(drop),
        ["cpu", pid] => {
            println!("{}", changes::cpu(pid.parse()?)?);
            Ok(())
        }
        ["ready", pid, addr] => ready::wait(pid.parse()?, addr.parse()?),
        ["dumps", renderer, node, times] => dumps::run(renderer, node, times.parse()?),
        ["accept", addr] => connect::accept(addr),
        ["connect", seconds, times, one, other] => {
            connect::run(seconds.parse()?, times.parse()?, one.parse()?, other.parse()?)
        }
        _ => bail!("see the top of tests/bench/helper/main.rs"),
    }
}
