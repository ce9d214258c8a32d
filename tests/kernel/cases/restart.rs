//! An agent that comes to a kernel which is as it should be writes nothing; one that can't read its folder deletes
//! nothing; one that can deletes what the folder no longer has.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::dns::{self, answers_with, dig};
use super::support::{
    ADMIN, http, metric, one_node, ready, served, start, unanswered, vip, wait_until, web_on_one_node,
    wrapped,
};
use crate::check;
use crate::client::{Load, Probe};
use crate::manifests::Manifests;
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Node, Topology};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(240);
    suite.add_slow("restart::writes_nothing", &Matrix::pair(), limit, writes_nothing);
    suite.add_slow("restart::unread_folder_deletes_nothing", &Matrix::pair(), limit, unread);
    suite.add("restart::orphan_is_collected", &Matrix::pair(), orphan);
    suite.add("restart::full_disk_stops_nothing", &Matrix::pair(), full_disk);
    suite.add("restart::lock_file_is_followed", &Matrix::once(), lock_file);
}

/// `meshlb` with every message to the kernel and every program that it starts written down by strace.
fn traced(cx: &Cx) -> Result<(Meshlb, PathBuf)> {
    let log = cx.dir.join("strace.log");
    let script = format!(
        "exec strace -D -f --seccomp-bpf -qq -x -s 96 -o {} -e trace=execve,openat,sendto,sendmsg,sendmmsg MESHLB \"$@\"",
        log.display()
    );
    Ok((wrapped(cx, "traced", &script)?, log))
}

/// What of it changes the kernel, and how many messages there are in all.
fn changes(log: &Path) -> Result<(Vec<String>, usize)> {
    let text = fs::read_to_string(log)?;
    let mut messages = 0;
    let mut out = Vec::new();
    for line in text.lines() {
        messages += usize::from(line.contains("nlmsg_type="));
        if is_change(line) {
            out.push(line.to_owned());
        }
    }
    Ok((out, messages))
}

/// Whether a line of strace is a change of the kernel, or the start of a program that makes one.
pub(super) fn is_change(line: &str) -> bool {
    if line.contains("execve(") {
        // Readers.
        let reads = ["-save\"", "\"--version\"", "/meshlb"].iter().any(|r| line.contains(r));
        return !reads;
    }
    if line.contains("openat(") {
        return line.contains("/proc/sys/") && (line.contains("O_WRONLY") || line.contains("O_RDWR"));
    }
    // ip_vs: strace shows the family's number or name, then the body, whose first byte is the command
    // (linux/ip_vs.h).
    let mut types = line.split("nlmsg_type=").skip(1);
    types.any(|message| {
        let kind: String = message.chars().take_while(|c| !", ".contains(*c)).collect();
        let names = [
            "RTM_NEW",
            "RTM_DEL",
            "RTM_SET",
            "IPSET_CMD_CREATE",
            "IPSET_CMD_DESTROY",
            "IPSET_CMD_FLUSH",
            "IPSET_CMD_RENAME",
            "IPSET_CMD_SWAP",
            "IPSET_CMD_ADD",
            "IPSET_CMD_DEL",
            "NFT_MSG_NEW",
            "NFT_MSG_DEL",
            "IPCTNL_MSG_CT_DELETE",
            "IPCTNL_MSG_CT_NEW",
        ];
        if names.iter().any(|n| kind.contains(n)) {
            return true;
        }
        if kind.contains("NFNL")
            || kind.contains("RTM_")
            || kind.contains("nlctrl")
            || kind.contains("NLMSG_")
        {
            return false;
        }
        let body = message.split_once("\"\\x").map(|(_, b)| b.chars().take(2).collect::<String>());
        let command = body.and_then(|b| u8::from_str_radix(&b, 16).ok());
        command.is_some_and(|c| [1, 2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 17].contains(&c))
    })
}

/// What the kernel tells others about changes of rules, addresses and routes.
struct Monitors(Vec<(std::process::Child, PathBuf)>);

impl Monitors {
    fn start(node: &Node, dir: &Path) -> Result<Monitors> {
        let mut out = Vec::new();
        for (name, command) in
            [("nft", &["nft", "monitor"][..]), ("ip", &["ip", "monitor", "route", "address", "rule"])]
        {
            let log = dir.join(format!("{name}.monitor"));
            let _ = fs::remove_file(&log);
            out.push((node.ns.spawn(command, &[], &log)?, log));
        }
        sleep(Duration::from_millis(700));
        Ok(Monitors(out))
    }

    /// What they have said.
    fn stop(mut self) -> String {
        sleep(Duration::from_millis(300));
        self.0
            .drain(..)
            .map(|(mut child, log)| {
                let _ = child.kill();
                let _ = child.wait();
                let text = fs::read_to_string(log).unwrap_or_default();
                // `ip` on links to other namespaces, when it starts.
                text.lines()
                    .filter(|l| !l.contains("Peer netns"))
                    .map(|l| format!("{l}\n"))
                    .collect::<String>()
            })
            .collect()
    }
}

impl Drop for Monitors {
    fn drop(&mut self) {
        for (child, _) in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts a traced agent, and demands that it writes nothing; it goes on for some probes.
fn idle(cx: &Cx, t: &Topology, m: &Manifests) -> Result<Agent> {
    let n1 = t.node(1);
    let (meshlb, log) = traced(cx)?;
    let before = n1.snapshot()?;
    let _ = fs::remove_file(&log);
    let monitors = Monitors::start(n1, &cx.dir)?;
    let mut agent = start(cx, &meshlb, t, m)?;
    sleep(Duration::from_secs(3));
    let said = monitors.stop();
    let (written, messages) = changes(&log)?;
    cx.note(format!("{messages} messages to the kernel"));
    ensure!(written.is_empty(), "it wrote:\n{}\n{}", written.join("\n"), agent.log_text());
    ensure!(messages > 10, "strace has seen only {messages} messages");
    ensure!(said.trim().is_empty(), "the kernel tells of changes:\n{said}");
    let counted = metric(n1, "meshlb_kernel_writes_total")?;
    ensure!(counted == 0.0, "it says that it has written {counted} times\n{}", agent.log_text());
    check::same(&before, &n1.snapshot()?, "something has changed")?;
    ensure!(agent.alive(), "{}", agent.log_text());
    Ok(agent)
}

fn writes_nothing(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let agent = start(cx, &meshlb, &t, &m)?;
    served(&t, &["p11", "p12"])?;
    agent.kill();
    let load = Load::start(
        &t.pod("p12").ns,
        &Probe { pause: Duration::from_millis(20), ..Probe::new(Proto::Tcp, vip(Family::V4, 80)?) },
        1,
    );
    let mut agent = idle(cx, &t, &m).context("after SIGKILL")?;
    // That this would be seen: a change is in every count.
    let (log, before) = (cx.dir.join("strace.log"), changes(&cx.dir.join("strace.log"))?.0.len());
    m.endpoints("web", &[t.pod("p11")]);
    m.service("more").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("more", &[t.pod("p11")]);
    m.write()?;
    let of_ipvs = |l: &String| !l.contains("IPSET") && !l.contains("execve") && !l.contains("NFNL");
    // The service may be seen, and published, before its endpoints are.
    wait_until("the change is in the kernel", Duration::from_secs(30), || {
        let written = metric(n1, "meshlb_kernel_writes_total")? > 0.0 && metric(n1, "meshlb_services")? > 1.0;
        Ok(written && changes(&log)?.0.iter().any(of_ipvs))
    })
    .with_context(|| changes(&log).map(|(seen, _)| seen.join("\n")).unwrap_or_default())?;
    let (seen, _) = changes(&log)?;
    cx.note(seen.join("\n"));
    let of = |text: &str| seen.iter().filter(|l| l.contains(text)).count();
    ensure!(seen.len() > before, "strace sees no change");
    // IPVS in any case, and the set: by ipset, or by nft.
    ensure!(of("IPSET_CMD_ADD") + of("/nft\"") > 0, "strace sees no change of a set:\n{}", seen.join("\n"));
    m.remove("more");
    m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
    m.write()?;
    wait_until("and back", Duration::from_secs(30), || Ok(metric(n1, "meshlb_services")? < 1.5))?;
    ready(n1, &mut agent)?;
    agent.terminate(Duration::from_secs(5))?;
    // SIGTERM, and what was remembered in the state directory is lost: it is found in the kernel.
    fs::remove_dir_all(n1.state_dir())?;
    let agent = idle(cx, &t, &m).context("without the state directory")?;
    agent.kill();
    let report = load.stop()?;
    cx.note(format!("{} connections meanwhile", report.answered()));
    ensure!(report.errors.is_empty() && report.answered() > 50, "{report:?}");
    served(&t, &["p11", "p12"])
}

/// A folder that is not there, and a file that can't be read.
fn unread(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    let before = n1.snapshot()?;
    let away = cx.dir.join("away");
    fs::rename(&m.dir, &away)?;
    let dir = m.dir.to_string_lossy().into_owned();
    let out = meshlb.run(n1, &["apply", &dir])?;
    super::support::one_line(&out, &[&dir, "does not exist"])?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("does not exist", Duration::from_secs(10))?;
    sleep(Duration::from_secs(2));
    let (status, body) = http(n1, ADMIN, "/readyz")?;
    ensure!(status == 503 && body.contains("not all read"), "/readyz: {status} {body}");
    check::same(&before, &n1.snapshot()?, "without a folder")?;
    served(&t, &["p11", "p12"])?;
    // Nothing is known of any name, and nothing is said: a client asks again.
    let name = "web.default.mesh.internal";
    let asked = |name: &str| dig(t.pod("p12"), "10.200.0.2", &["+time=1", name, "A"]);
    ensure!(asked(name)?.contains("timed out"), "without a folder: {}", asked(name)?);
    agent.kill();
    // An empty folder, as while its file system is not mounted yet.
    fs::create_dir(&m.dir)?;
    let out = meshlb.run(n1, &["apply", &dir])?;
    super::support::one_line(&out, &[&dir, "was replaced by an empty folder"])?;
    check::same(&before, &n1.snapshot()?, "apply with an empty folder")?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("was replaced by an empty folder", Duration::from_secs(10))?;
    sleep(Duration::from_secs(2));
    check::same(&before, &n1.snapshot()?, "with an empty folder")?;
    served(&t, &["p11", "p12"])?;
    ensure!(asked(name)?.contains("timed out"), "with an empty folder: {}", asked(name)?);
    agent.kill();
    // The folder is there, but a file in it leads nowhere: it may be the service.
    std::os::unix::fs::symlink("/nonexistent/web.yaml", m.dir.join("web.yaml"))?;
    let out = meshlb.run(n1, &["apply", &dir])?;
    ensure!(out.status == 1 && out.stderr.contains("web.yaml: does not exist"), "{out}");
    check::same(&before, &n1.snapshot()?, "apply with a file that can't be read")?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    agent.wait_for_log("left as they are", Duration::from_secs(10))?;
    sleep(Duration::from_secs(2));
    let log = agent.log_text();
    ensure!(
        log.lines().filter(|l| l.contains("default/web")).count() == 1,
        "the service is not named once:\n{log}"
    );
    check::same(&before, &n1.snapshot()?, "with a file that can't be read")?;
    served(&t, &["p11", "p12"])?;
    // Whatever is in that file, it is not said to be missing.
    for name in [name, "other.default.mesh.internal", "x.other.mesh.internal"] {
        let status = dns::status(t.pod("p12"), "10.200.0.2", name, "A")?;
        ensure!(status == "SERVFAIL", "with a file that can't be read: {name} {status}");
    }
    for command in ["show", "explain"] {
        let out = meshlb.run(n1, &[command, "web"])?;
        ensure!(
            out.status == 1 && out.stderr.contains("web is in nothing that can be read"),
            "{command}: {out}"
        );
    }
    // All of it is back, the service last and in one step: nothing to do.
    for file in fs::read_dir(&away)? {
        let file = file?;
        let draft = m.dir.join(".draft");
        fs::copy(file.path(), &draft)?;
        if file.file_name() != "web.yaml" {
            fs::rename(&draft, m.dir.join(file.file_name()))?;
        }
    }
    fs::rename(away.join("web.yaml"), m.dir.join("web.yaml"))?;
    ready(n1, &mut agent)?;
    sleep(Duration::from_secs(1));
    check::same(&before, &n1.snapshot()?, "the folder is back")?;
    served(&t, &["p11", "p12"])?;
    answers_with(t.pod("p12"), "10.200.0.2", name, "A", &["10.200.0.5"])?;
    for name in ["other.default.mesh.internal", "x.other.mesh.internal"] {
        ensure!(dns::status(t.pod("p12"), "10.200.0.2", name, "A")? == "NXDOMAIN", "{name}");
    }
    agent.kill();
    // An agent that was started before anything was in its folder knows it as well.
    cx.cleanup(&t)?;
    fs::remove_dir_all(n1.state_dir())?;
    cx.will_clean(n1);
    let late = cx.dir.join("late");
    fs::create_dir(&late)?;
    let mut agent = meshlb.agent(n1, &late)?;
    agent.wait_for_log("source synced", Duration::from_secs(20))?;
    for file in fs::read_dir(&m.dir)? {
        let file = file?;
        if file.file_type()?.is_file() {
            fs::copy(file.path(), late.join(file.file_name()))?;
        }
    }
    wait_until("it is served", Duration::from_secs(20), || Ok(served(&t, &["p11", "p12"]).is_ok()))?;
    let filled = n1.snapshot()?;
    agent.kill();
    fs::rename(&late, cx.dir.join("late-away"))?;
    fs::create_dir(&late)?;
    let mut agent = meshlb.agent(n1, &late)?;
    agent.wait_for_log("was replaced by an empty folder", Duration::from_secs(10))?;
    sleep(Duration::from_secs(2));
    check::same(&filled, &n1.snapshot()?, "with an empty folder in the place of one that was filled later")?;
    served(&t, &["p11", "p12"])
}

/// A service is taken out of the folder while no agent runs.
fn orphan(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.apply(&t, &mut m)?;
    let alone = n1.snapshot()?;
    m.service("orphan").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("orphan", &[t.pod("p11")]);
    m.write()?;
    let agent = start(cx, &meshlb, &t, &m)?;
    let dst: std::net::SocketAddr = "10.200.0.7:81".parse()?;
    check::only(&t.pod("p12").connect(Proto::Tcp, dst, 2)?, "p11")?;
    agent.kill();
    ensure!(alone.diff(&n1.snapshot()?).iter().any(|l| l.contains("10.200.0.7")), "the orphan is not there");
    m.remove("orphan");
    m.write()?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    unanswered(&t, dst)?;
    check::same(&alone, &n1.snapshot()?, "left of the orphan")?;
    served(&t, &["p11", "p12"])?;
    ensure!(agent.alive(), "{}", agent.log_text());
    agent.kill();
    // The same without any memory: what our sets lead to is ours.
    m.service("orphan").vips(&["10.200.0.7", "fd00:200::7"])?.port(Proto::Tcp, 81, 8080, Some(30081));
    m.endpoints("orphan", &[t.pod("p11")]);
    cx.apply(&t, &mut m)?;
    fs::remove_dir_all(n1.state_dir())?;
    m.remove("orphan");
    m.write()?;
    let agent = start(cx, &meshlb, &t, &m)?;
    unanswered(&t, dst)?;
    check::same(&alone, &n1.snapshot()?, "left of the orphan, without the state directory")?;
    served(&t, &["p11", "p12"])?;
    agent.kill();
    Ok(())
}

/// `meshlb.lock` is written, changed and damaged while the agent runs.
fn lock_file(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    m.service("web").port(Proto::Tcp, 80, 8080, None);
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    let mut agent = start(cx, &meshlb, &t, &m)?;
    let lock = m.dir.join("meshlb.lock");
    let answered = |addr: &str| -> Result<bool> {
        let dst: std::net::SocketAddr = addr.parse()?;
        let probe = Probe::new(Proto::Tcp, dst).within(Duration::from_millis(500));
        Ok(t.pod("p12").probe(&probe)?.answered() == 1)
    };
    for n in [33, 34] {
        ensure!(!answered(&format!("10.200.7.{n}:80"))?, "it has that address already");
        let text = format!(
            "version: 1\nservices:\n  default/web:\n    vips: {{v4: 10.200.7.{n}, v6: 'fd00:200::7{n}'}}\n"
        );
        let draft = m.dir.join(".meshlb.lock.tmp");
        fs::write(&draft, text)?;
        fs::rename(&draft, &lock)?;
        for addr in [format!("10.200.7.{n}:80"), format!("[fd00:200::7{n}]:80")] {
            wait_until(&addr, Duration::from_secs(5), || answered(&addr))?;
        }
    }
    ensure!(!answered("10.200.7.33:80")?, "it has its old address too");
    fs::write(&lock, "version: 1\nservices: [\n")?;
    agent.wait_for_log("meshlb.lock is damaged", Duration::from_secs(5))?;
    ensure!(answered("10.200.7.34:80")?, "a damaged lock file has taken the address away");
    // Nor does it keep an agent from starting, or anybody from looking.
    agent.kill();
    let mut agent = start(cx, &meshlb, &t, &m)?;
    ensure!(agent.log_text().contains("meshlb.lock is damaged"), "{}", agent.log_text());
    ensure!(answered("10.200.7.34:80")?, "with a damaged lock file it has another address after a restart");
    let shown = meshlb.run(t.node(1), &["show", "web"])?;
    ensure!(shown.status == 0 && shown.stdout.contains("10.200.7.34"), "{shown}");
    // Without it the address stays.
    fs::remove_file(&lock)?;
    agent.wait_for_log("no longer: ", Duration::from_secs(5))?;
    sleep(Duration::from_secs(1));
    ensure!(answered("10.200.7.34:80")?, "the address went with the lock file");
    // Beside the agent: what it has given, and not what the name's hash gives, is what is written down.
    let dir = m.dir.to_string_lossy().into_owned();
    let before = t.node(1).snapshot()?;
    for command in ["check", "lock"] {
        meshlb.run(t.node(1), &[command, &dir])?.ok()?;
    }
    let written = fs::read_to_string(&lock)?;
    for text in ["10.200.7.34", "fd00:200::734"] {
        ensure!(written.contains(text), "`meshlb lock` has not written {text}:\n{written}");
    }
    // The agent takes it for what it knows.
    sleep(Duration::from_secs(1));
    check::same(&before, &t.node(1).snapshot()?, "`check` or `lock` has changed something")?;
    ensure!(answered("10.200.7.34:80")?, "the address went when it was locked");
    Ok(())
}

/// A state file that can't be written any more is told, and what is dead goes out of service all the same.
fn full_disk(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    m.write()?;
    let dir = n1.state_dir();
    std::fs::create_dir_all(&dir)?;
    // Mounts are the namespace's own, so files of it are made in there too.
    n1.ns
        .enter(|| Ok(mount(Some("meshlb-test"), &dir, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?))?;
    let fill = || {
        let filled = n1.ns.enter(|| {
            let mut full = fs::File::create(dir.join("full"))?;
            let room = |_: &usize| std::io::Write::write_all(&mut full, &[0; 512]).is_ok();
            Ok((0..256).take_while(room).count())
        })?;
        ensure!(filled < 256, "the disk is not full");
        Ok(())
    };
    let result = (|| {
        let mut agent = start(cx, &meshlb, &t, &m)?;
        fill()?;
        let hosts = [t.pod("p11")];
        m.endpoints("web", &hosts);
        m.write()?;
        // It is told before the change is made.
        agent.wait_for_log("can't be written", Duration::from_secs(10))?;
        wait_until("the change", Duration::from_secs(5), || Ok(served(&t, &["p11"]).is_ok()))?;
        wait_until("the metric says so", Duration::from_secs(5), || {
            Ok(metric(n1, "meshlb_problems{of=\"state\"}")? > 0.0)
        })?;
        ready(n1, &mut agent)?;
        // There is room again: it is written with the next change.
        n1.ns.enter(|| Ok(fs::remove_file(dir.join("full"))?))?;
        m.endpoints("web", &[t.pod("p11"), t.pod("p12")]);
        m.write()?;
        agent.wait_for_log("no longer: ", Duration::from_secs(10))?;
        wait_until("the other change", Duration::from_secs(5), || Ok(served(&t, &["p11", "p12"]).is_ok()))?;
        ensure!(agent.terminate(Duration::from_secs(5))? == 0, "the agent ended badly");
        // So does `apply`.
        fill()?;
        m.endpoints("web", &[t.pod("p12")]);
        m.service("other").port(Proto::Tcp, 80, 8080, None);
        m.write()?;
        let out = meshlb.run(n1, &["apply", &m.dir.to_string_lossy()])?;
        ensure!(out.status == 1 && out.stderr.contains("can't be written"), "{out}");
        served(&t, &["p12"])?;
        cx.cleanup(&t)
    })();
    n1.ns.enter(|| Ok(umount2(&dir, MntFlags::MNT_DETACH)?))?;
    result
}
