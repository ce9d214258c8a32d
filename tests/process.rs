//! What concerns a whole process: its files, its signals. In a process of its own, one after another.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use meshlb::{
    admin::{AdminServer, Health},
    cli::signals::stop,
    metrics::Metrics,
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{Signal, raise},
};

static ONE: Mutex<()> = Mutex::new(());

/// The first line of what `/livez` answers.
fn live(mut stream: TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn whoever_takes_all_files_keeps_nobody_out() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let any = "127.0.0.1:0".parse().unwrap();
    let server =
        AdminServer::start(any, Arc::new(Metrics::new()), Health::new(Duration::from_secs(60))).unwrap();
    let addr: SocketAddr = server.addr();
    assert_eq!(live(TcpStream::connect(addr).unwrap()).unwrap(), "HTTP/1.1 200 OK");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let spare = File::open("/dev/null").unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 60, hard).unwrap();
    // Connections that are accepted and kept, and files until there is none left.
    let held: Vec<_> = (0..10)
        .map(|_| {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            stream
        })
        .collect();
    let files: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(!files.is_empty());
    // One file for a client: there is none for the server's end of it, unless it lets go of another one.
    drop(spare);
    let client = TcpStream::connect(addr).unwrap();
    let answer = live(client);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert_eq!(answer.unwrap(), "HTTP/1.1 200 OK");
    drop((held, files));
}

/// Whether a program that runs on ends when it gets this.
fn ends(signal: Signal) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stop = stop().unwrap();
        raise(signal).unwrap();
        tokio::time::timeout(Duration::from_secs(1), stop).await.is_ok()
    })
}

#[test]
fn a_terminal_that_goes_away_ends_a_program_as_sigterm_does() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        assert!(ends(signal), "{signal}");
    }
    // As by nohup.
    let this = std::env::current_exe().unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" --ignored --exact started_by_nohup"])
        .arg(this)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the one above runs it in a process that ignores SIGHUP"]
fn started_by_nohup() {
    assert!(!ends(Signal::SIGHUP) && ends(Signal::SIGTERM));
}
