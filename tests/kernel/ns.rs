//! Network namespaces, entered by threads of this process: no program is started to open a socket or set a sysctl in one.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Every namespace of ours is called this and something more; nothing else is ever deleted.
pub const PREFIX: &str = "mlb-";
/// Those of the connection that is idle while the cases run; they outlive cases that go wrong.
pub const IDLE_PREFIX: &str = "mlbidle-";
const RUN_NETNS: &str = "/run/netns";

/// The longest that a program started in a namespace may take, unless the caller says otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A network namespace with a mount namespace of its own, in which `/sys` shows that network namespace.
pub struct Netns {
    name: String,
    net: File,
    mnt: File,
}

impl Netns {
    /// Makes `mlb-NAME`, visible to `ip netns`, without IPv6 duplicate address detection, and without a limit on ICMP errors
    /// (with it, one in many refused datagrams goes unanswered).
    pub fn create(short: &str) -> Result<Netns> {
        Netns::create_as(format!("{PREFIX}{short}"))
    }

    /// Makes one of any name. [`remove_leftovers`] does not touch it.
    pub fn create_as(name: String) -> Result<Netns> {
        let made = thread::scope(|s| s.spawn(create_here).join());
        let (net, mnt) = made.map_err(|_| anyhow!("the thread that makes {name} panicked"))??;
        let ns = Netns { name, net, mnt };
        ns.publish()?;
        ns.enter(|| {
            for (key, value) in [
                ("net.ipv6.conf.all.accept_dad", "0"),
                ("net.ipv6.conf.default.accept_dad", "0"),
                ("net.ipv4.icmp_ratelimit", "0"),
                ("net.ipv6.icmp.ratelimit", "0"),
                ("net.ipv4.ping_group_range", "0 2147483647"),
            ] {
                sysctl_write(key, value)?;
            }
            Ok(())
        })
        .with_context(|| format!("setting up namespace {}", ns.name))?;
        Ok(ns)
    }

    /// The name that `ip netns` knows.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the namespace visible to `ip netns exec NAME`.
    fn publish(&self) -> Result<()> {
        fs::create_dir_all(RUN_NETNS)?;
        let path = Path::new(RUN_NETNS).join(&self.name);
        File::create(&path)?;
        let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.net));
        mount(Some(from.as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("binding {}", path.display()))
    }

    /// Runs `f` on a thread in this namespace. Sockets that it opens stay here; programs that it starts do so too.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.enter_as(true, f)
    }

    fn enter_as<T: Send>(&self, mounts: bool, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let joined = thread::scope(|s| {
            s.spawn(|| {
                if mounts {
                    unshare(CloneFlags::CLONE_FS)?;
                    setns(&self.mnt, CloneFlags::CLONE_NEWNS)?;
                }
                setns(&self.net, CloneFlags::CLONE_NEWNET)?;
                f()
            })
            .join()
        });
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs a program here and waits for it, at most [`COMMAND_LIMIT`].
    pub fn run(&self, command: &[&str]) -> Result<Output> {
        self.run_with(command, "", COMMAND_LIMIT)
    }

    /// Runs a program here with `input` on its standard input.
    pub fn run_with(&self, command: &[&str], input: &str, limit: Duration) -> Result<Output> {
        self.enter(|| run_here(command, &[], input, limit))
    }

    /// Runs a program here, with additions to its environment.
    pub fn run_env(&self, command: &[&str], env: &[(&str, &str)], input: &str) -> Result<Output> {
        self.enter(|| run_here(command, env, input, COMMAND_LIMIT))
    }

    /// Runs lines of `ip -batch` here; other namespaces can be named in them.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.enter_as(false, || run_here(&["ip", "-batch", "-"], &[], lines, COMMAND_LIMIT)?.ok())
            .map(|_| ())
            .with_context(|| format!("in {}: ip -batch of\n{lines}", self.name))
    }

    /// Starts a program here; its output goes to `log`.
    pub fn spawn(&self, command: &[&str], env: &[(&str, &str)], log: &Path) -> Result<Child> {
        let out = File::options().create(true).append(true).open(log)?;
        let err = out.try_clone()?;
        self.enter(|| {
            let (program, args) = command.split_first().context("an empty command")?;
            Command::new(program)
                .args(args)
                .envs(env.iter().copied())
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(err)
                .spawn()
                .with_context(|| format!("starting {program}"))
        })
    }

    /// Writes a sysctl of this namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.enter(|| sysctl_write(key, value))
    }

    /// Reads a sysctl of this namespace.
    pub fn sysctl_get(&self, key: &str) -> Result<String> {
        self.enter(|| {
            Ok(fs::read_to_string(sysctl_path(key)).with_context(|| key.to_owned())?.trim().to_owned())
        })
    }

    /// Reads a file of `/proc/net` of this namespace. In large pieces: `ip_vs`, when it is read on, leaves out as many
    /// services as other namespaces have.
    pub fn proc_net(&self, file: &str) -> Result<String> {
        self.enter(|| {
            let mut text = String::new();
            let open =
                File::open(format!("/proc/thread-self/net/{file}")).with_context(|| file.to_owned())?;
            std::io::BufReader::with_capacity(1 << 20, open).read_to_string(&mut text)?;
            Ok(text)
        })
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        unpublish(&self.name);
    }
}

fn unpublish(name: &str) {
    let path = Path::new(RUN_NETNS).join(name);
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// On the calling thread, which is to end: new namespaces, and what holds them.
fn create_here() -> Result<(File, File)> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("making namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making / private")?;
    // A copy of the bind mount of another namespace would keep that one alive.
    for name in with_prefix(PREFIX).into_iter().chain(with_prefix(IDLE_PREFIX)) {
        let _ = umount2(&Path::new(RUN_NETNS).join(name), MntFlags::MNT_DETACH);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), "/sys", Some("sysfs"), flags, none).context("mounting /sys")?;
    Ok((File::open("/proc/thread-self/ns/net")?, File::open("/proc/thread-self/ns/mnt")?))
}

/// The names of the namespaces with a prefix.
fn with_prefix(prefix: &str) -> Vec<String> {
    let Ok(dir) = fs::read_dir(RUN_NETNS) else { return Vec::new() };
    dir.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
}

/// Removes what an earlier run that crashed, or a case that overran its time, has left: namespaces with our prefix and
/// the programs in them.
pub fn remove_leftovers() {
    remove(PREFIX);
}

/// Removes namespaces with a prefix, and the programs in them.
pub fn remove(prefix: &str) {
    use std::os::unix::fs::MetadataExt;
    let names = with_prefix(prefix);
    let inodes: Vec<u64> = names
        .iter()
        .filter_map(|n| fs::metadata(Path::new(RUN_NETNS).join(n)).ok())
        .map(|m| m.ino())
        .collect();
    if let Ok(proc) = fs::read_dir("/proc") {
        for entry in proc.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let Ok(meta) = fs::metadata(entry.path().join("ns/net")) else { continue };
            if inodes.contains(&meta.ino()) {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
    for name in names {
        unpublish(&name);
    }
}

fn sysctl_path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key.replace('.', "/"))
}

fn sysctl_write(key: &str, value: &str) -> Result<()> {
    fs::write(sysctl_path(key), value).with_context(|| format!("sysctl {key}={value}"))
}

/// What a program said and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line.
    pub command: String,
    /// The exit status; 128 and more for a signal.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Output {
    /// An error unless the program ended with 0.
    pub fn ok(self) -> Result<Output> {
        if self.status == 0 { Ok(self) } else { bail!("{self}") }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with {}\n{}{}", self.command, self.status, self.stdout, self.stderr)
    }
}

/// Runs a program in the namespace of the calling thread.
pub fn run_here(command: &[&str], env: &[(&str, &str)], input: &str, limit: Duration) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;
    let (program, args) = command.split_first().context("an empty command")?;
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(args)
        .envs(env.iter().copied())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (ended, watch) = mpsc::channel::<()>();
    let (status, out, err, overrun) = thread::scope(|s| -> Result<_> {
        if !input.is_empty()
            && let Some(mut pipe) = stdin.take()
        {
            s.spawn(move || pipe.write_all(input.as_bytes()));
        }
        drop(stdin);
        let err = s.spawn(move || read_all(stderr.as_mut()));
        let watchdog = s.spawn(move || {
            let late = watch.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if late {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            late
        });
        let out = read_all(stdout.as_mut());
        let status = child.wait()?;
        drop(ended);
        Ok((status, out, err.join().unwrap_or_default(), watchdog.join().unwrap_or(false)))
    })?;
    let output = Output {
        command: command.join(" "),
        status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        stdout: out,
        stderr: err,
        took: start.elapsed(),
    };
    if overrun {
        bail!("stopped after {limit:?}: {output}");
    }
    Ok(output)
}

fn read_all(pipe: Option<&mut impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
