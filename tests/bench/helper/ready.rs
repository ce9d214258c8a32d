//! Waiting for an agent. Seldom, and without starting programs: on an emulated machine that would take the time that the
//! agent needs.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const AT_MOST: Duration = Duration::from_secs(20 * 60);

/// Until `/readyz` at this address answers 200; an error when the process ends, or after twenty minutes.
pub fn wait(pid: u32, addr: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    while !is_ready(addr).unwrap_or(false) {
        // A process that has ended and was not waited for has no command line any more.
        if std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty() {
            bail!("the agent has ended");
        }
        if begun.elapsed() > AT_MOST {
            bail!("the agent is not ready after {AT_MOST:?}");
        }
        sleep(Duration::from_secs(1));
    }
    Ok(())
}

fn is_ready(addr: SocketAddr) -> Result<bool> {
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().is_some_and(|line| line.contains(" 200 ")))
}
