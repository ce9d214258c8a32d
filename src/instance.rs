//! One meshlb programs a network namespace at a time.
//!
//! The lock is an abstract Unix socket: such names live in the network namespace itself, so that two
//! agents meet exactly where they would disturb each other, whatever their --run-dir, mount namespace
//! or container. The kernel lets go of it when the process ends, however it ends.

use std::{
    io::{self, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    thread,
    time::{Duration, Instant},
};

const NAME: &[u8] = b"meshlb.dev/instance";
/// So many bytes of what the other one says of itself are read.
const MAX_ABOUT: usize = 1024;
/// And for so long it is listened to.
const PATIENCE: Duration = Duration::from_secs(1);

/// Holds the network namespace.
#[derive(Debug)]
pub struct Instance {
    _listener: UnixListener,
}

/// Why the network namespace could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another meshlb has it.
    #[error("another meshlb programs this network namespace: {0}")]
    Taken(String),
    /// The socket could not be made.
    #[error("the lock of this network namespace can't be taken: {0}")]
    Io(#[from] io::Error),
}

impl Instance {
    /// Takes the network namespace. `about` is what others are told: one line, e.g. pid, folder, ranges.
    ///
    /// # Errors
    /// [`Error::Taken`] with the other's line.
    pub fn take(about: String) -> Result<Self, Error> {
        let address = SocketAddr::from_abstract_name(NAME)?;
        let listener = match UnixListener::bind_addr(&address) {
            Ok(listener) => listener,
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                return Err(Error::Taken(other().unwrap_or_else(|| "it does not say which".into())));
            }
            Err(e) => return Err(e.into()),
        };
        let answering = listener.try_clone()?;
        thread::Builder::new().name("instance".into()).spawn(move || {
            for mut peer in answering.incoming().flatten() {
                let _ = peer.set_write_timeout(Some(Duration::from_secs(1)));
                let _ = peer.write_all(about.as_bytes());
            }
        })?;
        Ok(Self { _listener: listener })
    }
}

/// What the meshlb that holds this network namespace says of itself, if there is one.
pub fn other() -> Option<String> {
    let address = SocketAddr::from_abstract_name(NAME).ok()?;
    let mut peer = UnixStream::connect_addr(&address).ok()?;
    peer.set_read_timeout(Some(PATIENCE)).ok()?;
    // Anybody can have the name.
    let mut text = [0; MAX_ABOUT];
    let deadline = Instant::now() + PATIENCE;
    let mut length = 0;
    while length < text.len() && Instant::now() < deadline {
        match peer.read(&mut text[length..]) {
            Ok(n) if n > 0 => length += n,
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&text[..length]).escape_debug().to_string();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_told_about_the_first() {
        // A network namespace of its own keeps this test from meeting a real agent; without the right to
        // make one there is nothing to show here.
        let done = thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let _first = Instance::take("pid 1, folder /a".into()).unwrap();
            match Instance::take("pid 2".into()) {
                Err(Error::Taken(about)) => assert_eq!(about, "pid 1, folder /a"),
                other => panic!("{other:?}"),
            }
        });
        done.join().unwrap();
    }

    #[test]
    fn who_never_ends_to_speak_is_cut_off() {
        let done = thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(NAME).unwrap()).unwrap();
            thread::spawn(move || {
                for mut peer in listener.incoming().flatten() {
                    while peer.write_all(&[b'x'; 4096]).is_ok() {}
                }
            });
            let about = other().unwrap();
            assert!(about.len() <= 1024, "{}", about.len());
            assert!(matches!(Instance::take("pid 2".into()), Err(Error::Taken(_))));
        });
        done.join().unwrap();
    }
}
