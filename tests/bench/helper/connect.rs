//! Connections, one after another.

use std::{
    io::Read,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// Takes connections and closes them, until it is killed.
pub fn accept(addr: &str) -> Result<()> {
    let listener = TcpListener::bind(addr).with_context(|| addr.to_owned())?;
    for stream in listener.incoming() {
        drop(stream);
    }
    Ok(())
}

/// Connects as often as it can for this long. The server closes first, so that no port here has to rest afterwards.
fn rate(addr: SocketAddr, time: Duration) -> Result<f64> {
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < time {
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))
            .with_context(|| format!("connection {} to {addr}", count + 1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let end =
            stream.read(&mut [0; 1]).with_context(|| format!("the end of connection {count} to {addr}"))?;
        anyhow::ensure!(end == 0, "{addr} said something");
        stream.shutdown(Shutdown::Both).ok();
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

/// Prints a line each time: connections per second to the one and to the other address.
pub fn run(seconds: f64, times: u32, one: SocketAddr, other: SocketAddr) -> Result<()> {
    let time = Duration::from_secs_f64(seconds);
    rate(one, time / 4)?;
    rate(other, time / 4)?;
    for round in 0..times {
        // Who comes first takes turns too.
        let (a, b) = if round % 2 == 0 {
            let a = rate(one, time)?;
            (a, rate(other, time)?)
        } else {
            let b = rate(other, time)?;
            (rate(one, time)?, b)
        };
        println!("{a:.2} {b:.2}");
    }
    Ok(())
}
