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

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

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
    /// A program that can't be meshlb has its lock.
    #[error(
        "process {pid} of user {uid} holds the lock of this network namespace (the abstract socket @meshlb.dev/instance) and can't be meshlb, \
         which runs as root: end it"
    )]
    Stranger {
        /// The process, as it is numbered here; 0 where it is not.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// The socket could not be made.
    #[error("the lock of this network namespace can't be taken: {0}")]
    Io(#[from] io::Error),
}

/// A connection to whoever holds this network namespace.
fn connect() -> Option<UnixStream> {
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(NAME).ok()?).ok()
}

/// Whether somebody holds this network namespace.
pub fn is_taken() -> bool {
    connect().is_some()
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
                // Anybody who may make sockets here can take the name. Who programs a kernel is root.
                if let Some((pid, uid)) = holder().filter(|(_, uid)| *uid != 0) {
                    return Err(Error::Stranger { pid, uid });
                }
                return Err(Error::Taken(other().unwrap_or_else(|| "it does not say which".into())));
            }
            Err(e) => return Err(e.into()),
        };
        let answering = listener.try_clone()?;
        thread::Builder::new().name("instance".into()).spawn(move || {
            for peer in answering.incoming() {
                // No files left, say: nothing that the next try would not meet too.
                let Ok(mut peer) = peer else {
                    thread::sleep(Duration::from_secs(1));
                    continue;
                };
                let _ = peer.set_write_timeout(Some(Duration::from_secs(1)));
                let _ = peer.write_all(about.as_bytes());
            }
        })?;
        Ok(Self { _listener: listener })
    }
}

/// The process and the user that listen there, as the kernel knows them (unix(7), `SO_PEERCRED`).
fn holder() -> Option<(i32, u32)> {
    let who = getsockopt(&connect()?, PeerCredentials).ok()?;
    Some((who.pid(), who.uid()))
}

/// What the meshlb that holds this network namespace says of itself, if there is one.
pub fn other() -> Option<String> {
    let mut peer = connect()?;
    peer.set_read_timeout(Some(PATIENCE)).ok()?;
    // Anybody can have the name.
    let mut text = [0; MAX_ABOUT];
    let deadline = Instant::now() + PATIENCE;
    let mut length = 0;
    while length < text.len() && Instant::now() < deadline {
        match peer.read(&mut text[length..]) {
            Ok(n) if n > 0 => length += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
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
    fn a_stranger_who_has_the_lock_is_named() {
        use std::{
            io::BufRead as _,
            os::unix::process::CommandExt as _,
            process::{Command, Stdio},
        };
        // Another user needs another process; perl is on every Debian.
        const LISTEN: &str = r#"use Socket; $| = 1; socket(S, AF_UNIX, SOCK_STREAM, 0) and bind(S, pack_sockaddr_un("\0meshlb.dev/instance"))
            and listen(S, 5) or die $!; print "listening\n"; <STDIN>"#;
        let done = thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let mut stranger = Command::new("perl");
            stranger.args(["-e", LISTEN]).uid(65534).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut stranger = stranger.spawn().unwrap();
            let mut line = String::new();
            io::BufReader::new(stranger.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "listening\n");
            let told = Instance::take("pid 2".into()).unwrap_err();
            drop(stranger.stdin.take());
            stranger.wait().unwrap();
            let told = told.to_string();
            assert!(
                told.starts_with(&format!("process {} of user 65534 holds the lock", stranger.id())),
                "{told}"
            );
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
