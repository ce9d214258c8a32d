//! What programs a node: `meshlb`, or the hand-made [`crate::reference`].

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::manifests::Manifests;
use crate::ns::{self, Netns, Output};
use crate::runner::Renderer;
use crate::topology::{Node, VIP_CIDRS};

/// Brings a node's kernel in line with a folder, and takes everything out again.
pub trait Program: Send + Sync {
    /// One reconcile. The folder has been written.
    fn apply(&self, node: &Node, manifests: &Manifests) -> Result<()>;
    /// Removes everything.
    fn cleanup(&self, node: &Node) -> Result<()>;
}

/// The `meshlb` to test.
pub fn binary() -> PathBuf {
    std::env::var_os("MESHLB_BIN").map_or_else(|| env!("CARGO_BIN_EXE_meshlb").into(), PathBuf::from)
}

/// Whether that binary can program a node yet.
pub fn has_apply() -> bool {
    let binary = binary();
    let help =
        ns::run_here(&[&binary.to_string_lossy(), "apply", "--help"], &[], "", Duration::from_secs(20));
    help.is_ok_and(|out| out.status == 0 && out.stdout.contains("--renderer"))
}

/// `PATH` with a folder before it in which `iptables` and the rest are of one flavour, whatever this machine prefers.
pub fn flavoured_path(work: &Path, renderer: Renderer) -> Result<String> {
    let multi = match renderer {
        Renderer::IptablesLegacy => "xtables-legacy-multi",
        Renderer::IptablesNft | Renderer::Nftables => "xtables-nft-multi",
    };
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/bin:/bin";
    let dir = work.join(multi);
    if !dir.exists() {
        let real = path.split(':').map(|d| Path::new(d).join(multi)).find(|p| p.exists());
        let real = real.with_context(|| format!("no {multi} on this machine"))?;
        fs::create_dir_all(&dir)?;
        for name in ["iptables", "ip6tables"] {
            for suffix in ["", "-save", "-restore"] {
                symlink(&real, dir.join(format!("{name}{suffix}")))?;
            }
        }
    }
    Ok(format!("{}:{path}", dir.display()))
}

/// `meshlb` with the flags that tests give it.
#[derive(Debug, Clone)]
pub struct Meshlb {
    /// The value of `--renderer`.
    pub renderer: Renderer,
    /// The program.
    pub binary: PathBuf,
    /// `PATH`, with the right iptables first.
    pub path: String,
    /// More flags for every command.
    pub flags: Vec<String>,
    /// Another value of `--renderer`.
    pub choice: Option<&'static str>,
}

impl Meshlb {
    /// The one to test, with a renderer.
    pub fn new(work: &Path, renderer: Renderer) -> Result<Meshlb> {
        let path = flavoured_path(work, renderer)?;
        Ok(Meshlb { renderer, binary: binary(), path, flags: Vec::new(), choice: None })
    }

    /// With one more flag; `--NAME=VALUE` takes the place of one that tests give otherwise, and `--NAME=` leaves that one out.
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// The words of a command on a node.
    pub fn command(&self, node: &Node, args: &[&str]) -> Vec<String> {
        let mut command = vec![self.binary.to_string_lossy().into_owned()];
        command.extend(args.iter().map(|&a| a.to_owned()));
        for (flag, value) in [
            ("--node", node.name.clone()),
            ("--node-ip", format!("{},{}", node.v4, node.v6)),
            ("--vip-cidr", VIP_CIDRS.join(",")),
            ("--renderer", self.choice.unwrap_or(self.renderer.flag()).to_owned()),
            ("--state-dir", node.state_dir().to_string_lossy().into_owned()),
            ("--run-dir", node.run_dir().to_string_lossy().into_owned()),
        ] {
            let given = format!("{flag}=");
            if self.flags.iter().all(|f| !f.starts_with(&given)) {
                command.extend([flag.to_owned(), value]);
            }
        }
        command.extend(self.flags.iter().filter(|f| !f.ends_with('=')).cloned());
        command
    }

    /// Runs a `meshlb` command on a node: `run(node, &["show", "-o", "json"])`.
    pub fn run(&self, node: &Node, args: &[&str]) -> Result<Output> {
        fs::create_dir_all(&node.dir)?;
        let command = self.command(node, args);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        node.ns.run_env(&command, &[("PATH", &self.path)], "")
    }

    /// Starts a `meshlb` command on a node, as [`Meshlb::run`] does, and goes on; its output goes to a file of the node's.
    pub fn start(&self, node: &Node, args: &[&str], log: &str) -> Result<Agent> {
        fs::create_dir_all(&node.dir)?;
        let command = self.command(node, args);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        Agent::spawn(&node.ns, &command, &[("PATH", &self.path)], node.dir.join(log))
    }

    /// Starts `meshlb agent --source DIR` on a node. It is killed when the value is dropped; its log is shown when the case
    /// fails.
    pub fn agent(&self, node: &Node, dir: &Path) -> Result<Agent> {
        self.start(node, &["agent", "--source", &dir.to_string_lossy()], "agent.log")
    }
}

impl Program for Meshlb {
    fn apply(&self, node: &Node, manifests: &Manifests) -> Result<()> {
        self.run(node, &["apply", &manifests.dir.to_string_lossy()])?.ok().map(|_| ())
    }

    fn cleanup(&self, node: &Node) -> Result<()> {
        self.run(node, &["cleanup"])?.ok().map(|_| ())
    }
}

/// A running agent.
pub struct Agent {
    child: Child,
    /// Its output.
    pub log: PathBuf,
    /// How much of that is of those before it.
    before: usize,
}

impl Agent {
    /// Starts it by a command of the caller's.
    pub fn spawn(ns: &Netns, command: &[&str], env: &[(&str, &str)], log: PathBuf) -> Result<Agent> {
        let before = fs::metadata(&log).map_or(0, |m| usize::try_from(m.len()).unwrap_or(0));
        Ok(Agent { child: ns.spawn(command, env, &log)?, log, before })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `SIGTERM`, and its exit status within so long.
    pub fn terminate(mut self, within: Duration) -> Result<i32> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let end = Instant::now() + within;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code().unwrap_or(-1));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("the agent does not end within {within:?} of SIGTERM; its log:\n{}", self.log_text());
    }

    /// `SIGKILL`.
    pub fn kill(self) {}

    /// Whether it is still there.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        let all = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(all.get(self.before..).unwrap_or_default()).into_owned()
    }

    /// Waits until its log has this text.
    pub fn wait_for_log(&mut self, text: &str, within: Duration) -> Result<()> {
        let end = Instant::now() + within;
        while !self.log_text().contains(text) {
            if !self.alive() {
                bail!("the agent has ended; its log:\n{}", self.log_text());
            }
            if Instant::now() > end {
                bail!("no {text:?} in the agent's log after {within:?}:\n{}", self.log_text());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
