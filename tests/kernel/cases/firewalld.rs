//! Beside a real firewalld: what it needs is told, and its reloads are survived.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guard::{BOTH, VIPS, refused, to_nothing, to_service, works};
use super::healing::within;
use super::support::wait_until;
use crate::check;
use crate::ns::{Output, run_here};
use crate::program::Agent;
use crate::runner::{Cx, Matrix, Proto, Renderer, Skip, Suite};
use crate::topology::{Node, Topology};

pub fn register(suite: &mut Suite) {
    let two = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::Nftables]);
    suite.add_heavy("firewalld::reloads", &two, Duration::from_secs(400), reloads);
}

/// firewalld and a bus for it, in a node's namespace and with a configuration of its own.
struct Firewalld<'a> {
    node: &'a Node,
    unpacked: Unpacked,
    bus: String,
    children: Vec<Child>,
}

/// Debian's firewalld and what it needs, unpacked (tests/vm/setup.sh). In the VM this machine's files are under `/host`, for
/// programs that are too much for a copy in memory.
struct Unpacked {
    root: &'static str,
    dir: String,
}

impl Unpacked {
    fn find() -> Result<Unpacked> {
        let dir = std::env::var("MESHLB_FIREWALLD").unwrap_or_default();
        let found = ["/host", "/"]
            .into_iter()
            .find(|root| !dir.is_empty() && Path::new(&format!("{root}{dir}/usr/sbin/firewalld")).exists());
        let root = found.ok_or_else(|| Skip("firewalld is not unpacked (MESHLB_FIREWALLD)".to_owned()))?;
        Ok(Unpacked { root, dir })
    }

    /// Hands over the command that runs a line in its root, with its programs and libraries before the system's.
    fn shell<T>(&self, line: &str, run: impl FnOnce(&[&str]) -> T) -> T {
        let (d, lib) = (&self.dir, format!("lib/{}-linux-gnu", std::env::consts::ARCH));
        let line = format!(
            "export PYTHONPATH={d}/usr/lib/python3/dist-packages GI_TYPELIB_PATH={d}/usr/{lib}/girepository-1.0 \
             LD_LIBRARY_PATH={d}/usr/{lib}:{d}/{lib} PATH={d}/usr/bin:$PATH; {line}"
        );
        run(&["chroot", self.root, "sh", "-ec", &line])
    }
}

impl<'a> Firewalld<'a> {
    fn start(node: &'a Node) -> Result<Firewalld<'a>> {
        let unpacked = Unpacked::find()?;
        // Both roots have the same /run.
        let dir = Path::new("/run").join(format!("meshlb-kernel-firewalld-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (socket, config, defaults) = (path("bus"), path("etc"), path("lib"));
        let bus = format!("unix:path={socket}");
        let from = &unpacked.dir;
        // It reads all of its definitions at each reload, and firewall-cmd waits a minute for that and no longer: those that
        // no zone uses are left out, since an emulated machine takes more than that for all.
        let copy = format!(
            "cp -r {from}/etc/firewalld {config}; mkdir -p {defaults}/services {defaults}/icmptypes; cd {from}/usr/lib/firewalld
             cp -r helpers ipsets policies zones {defaults}
             cd services; cp ssh.xml mdns.xml samba-client.xml netbios-ns.xml dhcpv6-client.xml {defaults}/services; cd ..
             cp icmptypes/redirect.xml icmptypes/router-advertisement.xml icmptypes/neighbour-*.xml {defaults}/icmptypes"
        );
        unpacked.shell(&copy, |command| node.run(command))?.ok()?;
        let mut children = Vec::new();
        let mut start = |line: &str, env: &[(&str, &str)], log: &str| -> Result<()> {
            let spawn = |command: &[&str]| node.ns.spawn(command, env, &dir.join(log));
            children.push(unpacked.shell(&format!("exec {line}"), spawn)?);
            Ok(())
        };
        start(
            &format!(
                "dbus-daemon --config-file={from}/usr/share/dbus-1/session.conf --address={bus} --nofork --nopidfile --nosyslog"
            ),
            &[],
            "dbus.log",
        )?;
        let end = Instant::now() + Duration::from_secs(20);
        while !Path::new(&socket).exists() {
            ensure!(Instant::now() < end, "no bus: {}", fs::read_to_string(dir.join("dbus.log"))?);
            sleep(Duration::from_millis(50));
        }
        start(
            &format!(
                "/usr/bin/python3 {from}/usr/sbin/firewalld --nofork --nopid --system-config {config} --default-config {defaults}"
            ),
            &[("DBUS_SYSTEM_BUS_ADDRESS", bus.as_str())],
            "firewalld.log",
        )?;
        let firewalld = Firewalld { node, unpacked, bus, children };
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let state = firewalld.sh("firewall-cmd --state")?;
            if state.status == 0 {
                return Ok(firewalld);
            }
            if Instant::now() > end {
                bail!("firewalld does not run: {state}\n{}", fs::read_to_string(dir.join("firewalld.log"))?);
            }
            sleep(Duration::from_millis(200));
        }
    }

    /// A command that speaks to it.
    fn sh(&self, command: &str) -> Result<Output> {
        let env = [("DBUS_SYSTEM_BUS_ADDRESS", self.bus.as_str())];
        // It is written in Python, and the machine may be an emulated one.
        let limit = Duration::from_secs(150);
        self.unpacked.shell(command, |line| self.node.ns.enter(|| run_here(line, &env, "", limit)))
    }
}

impl Drop for Firewalld<'_> {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            // Terminated, it takes its table with it.
            let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).ok();
            let end = Instant::now() + Duration::from_secs(10);
            while child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < end {
                sleep(Duration::from_millis(50));
            }
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn reloads(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&Topology::builder())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    works(&t, &BOTH).context("before firewalld")?;
    let firewalld = Firewalld::start(n1)?;
    // It does reject what no zone allows.
    let (from, probe) = &to_service(&t, &[Proto::Tcp])?[0];
    let closed = from.probe(&probe.clone().within(Duration::from_secs(1)))?;
    ensure!(closed.answered() == 0, "firewalld lets packets for a VIP pass by itself: {closed}");
    let mut agent = meshlb.agent(n1, &m.dir)?;
    let told = |agent: &Agent| -> Vec<String> {
        let command = |l: &str| {
            Some(format!("firewall-cmd --permanent{}", l.split_once(": firewall-cmd --permanent")?.1))
        };
        agent.log_text().lines().filter_map(command).collect()
    };
    // One for each family, at its first look at other firewalls, which comes after the sync.
    wait_until("two commands are in its log", Duration::from_secs(20), || Ok(told(&agent).len() == 2))?;
    for command in &told(&agent) {
        cx.note(command);
        firewalld.sh(command)?.ok()?;
    }
    works(&t, &BOTH).context("with the rules that the log asks for")?;
    // firewall-cmd takes ten seconds in an emulated machine.
    let ways: &[&str] =
        if cx.renderer() == Renderer::Nftables { &["--reload", "--complete-reload"] } else { &["--reload"] };
    for how in ways {
        firewalld.sh(&format!("firewall-cmd {how}"))?.ok()?;
        let took = works_soon(&t).context(*how)?;
        cx.note(format!("{how}: everything works {:.1} s later", took.as_secs_f32()));
        refused(&to_nothing(&t)?).context(*how)?;
        let plan = meshlb.run(n1, &["plan"])?;
        ensure!(plan.status == 0, "{how}: {plan}");
    }
    drop(firewalld);
    // Its end takes rules of others along, too.
    works_soon(&t).context("firewalld has ended")?;
    ensure!(agent.alive(), "the agent has ended:\n{}", agent.log_text());
    let tally = t.ext.connect(Proto::Tcp, n1.at(cx.family(), 30080), 6)?;
    check::even(&tally, &t.pod_names())
}

/// Until everything works again: within the time that healing may take.
fn works_soon(t: &Topology) -> Result<Duration> {
    let allowed = within();
    let start = Instant::now();
    loop {
        let result = works(t, &BOTH);
        let took = start.elapsed();
        match result {
            Ok(()) => return Ok(took),
            Err(e) if took > allowed => return Err(e.context(format!("after {took:?}, of {allowed:?}"))),
            Err(_) => sleep(Duration::from_millis(50)),
        }
    }
}
