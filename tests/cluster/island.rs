//! A network namespace that has nothing but the API server, at the address that it has outside: what an agent there does to
//! its kernel, or removes from it, is nobody's. It is gone with the value.

use std::{
    fs::File,
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::kubectl::Cluster;

/// A program in a namespace of its own.
pub struct Islander {
    child: Child,
    log: PathBuf,
    /// Its folders.
    dir: tempfile::TempDir,
}

impl Islander {
    /// Runs `command`, with `{dir}` in its arguments replaced by a folder of its own.
    pub fn start(cluster: &Cluster, command: &[&str]) -> Result<Islander> {
        let dir = tempfile::tempdir()?;
        let own = dir.path().to_string_lossy().into_owned();
        let command: Vec<String> = command.iter().map(|arg| arg.replace("{dir}", &own)).collect();
        let log = dir.path().join("log");
        let (output, port) = (File::create(&log)?, cluster.port()?);
        let (streams, received) = mpsc::channel::<TcpStream>();
        // Threads are born into the namespace of the one that makes them.
        thread::spawn(move || {
            for stream in received {
                if let Ok(server) = TcpStream::connect(("127.0.0.1", port)) {
                    let _ = relay(stream, server);
                }
            }
        });
        let inside = thread::spawn(move || -> Result<Child> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .context("a network namespace needs root")?;
            ensure!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success(), "ip link");
            let listener = TcpListener::bind(("127.0.0.1", port))?;
            let (program, arguments) = command.split_first().context("no command")?;
            let child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(output)
                .spawn()
                .with_context(|| program.clone())?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    if streams.send(stream).is_err() {
                        return;
                    }
                }
            });
            Ok(child)
        });
        let child = inside.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        Ok(Islander { child, log, dir })
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end; its exit status.
    pub fn ends(&mut self, within: Duration) -> Result<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return status.code().context("ended by a signal");
            }
            if start.elapsed() > within {
                bail!("it still runs after {within:?}:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Islander {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn relay(a: TcpStream, b: TcpStream) -> Result<()> {
    for (mut from, mut to) in [(a.try_clone()?, b.try_clone()?), (b, a)] {
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
