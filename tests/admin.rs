//! The admin server of a process that has no files left. In a process of its own: the limit is the process's.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use meshlb::{
    admin::{AdminServer, Health},
    metrics::Metrics,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn live(addr: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn whoever_takes_all_files_does_not_end_it() {
    let any = "127.0.0.1:0".parse().unwrap();
    let health = Health::new(Duration::from_secs(60));
    let server = AdminServer::start(any, Arc::new(Metrics::new()), health).unwrap();
    let addr = server.addr();
    assert_eq!(live(addr).unwrap(), "HTTP/1.1 200 OK");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 60, hard).unwrap();
    // Both ends are in this process: the last of these is not accepted.
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect(addr) {
        held.push(stream);
        assert!(held.len() < 100, "there is no limit");
    }
    // It has tried for a while.
    thread::sleep(Duration::from_millis(500));
    drop(held);
    let begun = Instant::now();
    loop {
        match live(addr) {
            Ok(status) if status == "HTTP/1.1 200 OK" => return,
            other => assert!(begun.elapsed() < Duration::from_secs(20), "{other:?}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}
