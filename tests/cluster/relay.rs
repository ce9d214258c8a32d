//! A way to the API server that can fall silent: as a machine that has lost its power, it closes nothing and answers nothing.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

/// Passes connections on to a port of loopback, for as long as the process lives.
pub struct Relay {
    port: u16,
    /// Of the connections that are open.
    silent: Arc<AtomicBool>,
}

impl Relay {
    /// To this port.
    pub fn start(to: u16) -> Result<Relay> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let relay = Relay { port: listener.local_addr()?.port(), silent: Arc::default() };
        let silent = relay.silent.clone();
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // One that comes after the silence is another machine's.
                let mute = if silent.load(Ordering::Relaxed) { Arc::default() } else { silent.clone() };
                let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                for (from, into) in [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())]
                {
                    let (Ok(from), Ok(into), mute) = (from, into, mute.clone()) else { continue };
                    thread::spawn(move || pass(from, into, &mute));
                }
            }
        });
        Ok(relay)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections that are open now carry nothing any more; later ones do.
    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }
}

fn pass(mut from: TcpStream, mut into: TcpStream, mute: &AtomicBool) {
    let mut buffer = [0; 16384];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        while mute.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_secs(1));
        }
        if into.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(std::net::Shutdown::Write);
}
