//! The order of changes never lets a packet reach a wrong place: `meshlb apply` is stopped after each single message by
//! which it, or a program that it starts, changes the kernel. What is sent then is answered by an endpoint that the old or
//! the new state gives that address, or refused. There it is killed, and the next `apply` ends in the new state.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::guard::ask;
use super::restart::is_change;
use super::support::wrapped;
use crate::check;
use crate::client::Probe;
use crate::manifests::Manifests;
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::server::everywhere;
use crate::topology::{Builder, Host, Topology};

const LATE: &str = "HOST-late";

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(240);
    let two = Matrix::once().with_renderers(&[Renderer::IptablesNft, Renderer::Nftables]);
    suite.add_heavy("step::scale", &two, limit, scale);
    suite.add_heavy("step::port_edit", &two, limit, port_edit);
    suite.add_heavy("step::handover", &two, limit, |cx| handover(cx, false));
    suite.add_heavy("step::handover_of_marks", &two, limit, |cx| handover(cx, true));
    suite.add_heavy("step::external_policy", &two, limit, external_policy);
    suite.add_heavy("step::last_endpoint_goes", &two, limit, |cx| walk(cx, &[WEB], &[EMPTY], false));
    suite.add_heavy("step::first_endpoint_comes", &two, limit, |cx| walk(cx, &[EMPTY], &[WEB], false));
    suite.add_heavy("step::renderer_change", &two, limit, renderer_change);
    let all = Matrix::once().with_renderers(&Renderer::ALL);
    suite.add_heavy("step::first_install", &all, limit, first_install);
    suite.add_heavy("step::cleanup", &all, limit, cleanup);
}

/// A service with one port, over TCP and UDP.
#[derive(Clone, Copy)]
struct Service {
    name: &'static str,
    /// The last part of its addresses.
    last: u8,
    port: u16,
    target: u16,
    published: u16,
    pods: &'static [&'static str],
    /// `externalTrafficPolicy: Local`.
    local: bool,
}

const WEB: Service = Service {
    name: "web",
    last: 5,
    port: 80,
    target: 8080,
    published: 30080,
    pods: &["p11", "p21"],
    local: false,
};

const EMPTY: Service = Service { pods: &[], ..WEB };

fn scale(cx: &mut Cx) -> Result<()> {
    walk(cx, &[WEB], &[Service { pods: &["p12", "p22"], ..WEB }], false)
}

fn port_edit(cx: &mut Cx) -> Result<()> {
    walk(cx, &[WEB], &[Service { port: 81, target: 8081, published: 30081, ..WEB }], false)
}

/// One service goes, and another gets its address, its port and its published number. With `marks` nobody remembers which
/// marks were whose, so that the new ones get those of the old ones, which lead elsewhere.
fn handover(cx: &mut Cx, marks: bool) -> Result<()> {
    let one = Service { name: "one", pods: &["p11"], ..WEB };
    let three = Service { name: "three", last: 6, published: 30081, pods: &["p12"], ..WEB };
    let two = Service { name: "two", pods: &["p21"], ..WEB };
    let four = Service { name: "four", last: 7, published: 30082, pods: &["p22"], ..WEB };
    walk(cx, &[one, three], &[two, four], marks)
}

fn external_policy(cx: &mut Cx) -> Result<()> {
    walk(cx, &[WEB], &[Service { local: true, ..WEB }], false)
}

/// A virtual address's port or a published one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Place {
    Vip(u8, u16),
    Published(u16),
}

/// Who may answer where: servers with the port that they were reached on.
type Answers = BTreeMap<Place, BTreeSet<(&'static str, u16)>>;

fn answers(services: &[Service]) -> Answers {
    let mut out = Answers::new();
    for s in services {
        // Without endpoints they are nobody's, and so not the node's.
        out.entry(Place::Vip(s.last, s.port)).or_default();
        out.entry(Place::Published(s.published)).or_default();
        for pod in s.pods {
            out.entry(Place::Vip(s.last, s.port)).or_default().insert((pod, s.target));
            if !s.local || pod.starts_with("p1") {
                out.entry(Place::Published(s.published)).or_default().insert((pod, s.target));
            }
        }
    }
    out
}

fn describe(t: &Topology, m: &mut Manifests, services: &[Service]) -> Result<()> {
    m.services.clear();
    m.slices.clear();
    for s in services {
        let vips = [format!("10.200.0.{}", s.last), format!("fd00:200::{:x}", s.last)];
        let service = m.service(s.name).vips(&vips.each_ref().map(String::as_str))?;
        for proto in [Proto::Tcp, Proto::Udp] {
            service.port(proto, s.port, s.target, Some(s.published));
        }
        if s.local {
            service.set("externalTrafficPolicy", json!("Local"));
        }
        let pods: Vec<_> = s.pods.iter().map(|p| t.pod(p)).collect();
        m.endpoints(s.name, &pods);
    }
    m.write()
}

fn spec() -> Builder {
    Topology::builder().nodes(2).pods_per_node(3).ports(&[8080, 8081]).host_ports(&[22, 80, 81, 8080, 8081])
}

/// From a kernel that knows nothing of us: a virtual address is nobody's until its rules are there.
fn first_install(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&spec())?;
    let mut m = cx.manifests()?;
    describe(&t, &mut m, &[WEB])?;
    cx.will_clean(t.node(1));
    let dir = m.dir.to_string_lossy().into_owned();
    let new = answers(&[WEB]);
    let prepare = || cx.cleanup(&t);
    let finish = || {
        cx.apply_on(t.node(1), &m)?;
        let plan = meshlb.run(t.node(1), &["plan", &dir])?;
        ensure!(plan.status == 0, "not in sync: {plan}");
        among(&t, &new, &new, true)
    };
    ends(cx, &t, &["apply", &dir], &new, &prepare, &finish)
}

/// From one renderer to the other: all the time everything is answered as before, and no socket of the node is.
fn renderer_change(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&spec())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    describe(&t, &mut m, &[WEB])?;
    let dir = m.dir.to_string_lossy().into_owned();
    let may = answers(&[WEB]);
    let other = match cx.renderer() {
        Renderer::Nftables => Renderer::IptablesNft,
        _ => Renderer::Nftables,
    };
    let set_out = || -> Result<Stepped> {
        n1.stop_serving(LATE);
        cx.apply_on(n1, &m)?;
        n1.serve_as(LATE, &everywhere(&[WEB.published], false))?;
        Stepped::start_with(cx, &t, &["apply", &dir], Some(other.flag()))
    };
    let ended = |what: &str| -> Result<()> {
        let mut meshlb = cx.meshlb()?.clone();
        meshlb.choice = Some(other.flag());
        meshlb.run(n1, &["apply", &dir])?.ok().with_context(|| what.to_owned())?;
        let plan = meshlb.run(n1, &["plan", &dir])?;
        ensure!(plan.status == 0, "{what}: not in sync: {plan}");
        among(&t, &may, &may, true).with_context(|| what.to_owned())
    };
    let mut changes = Vec::new();
    let mut stepped = set_out()?;
    while let Some(line) = stepped.next_change()? {
        changes.push(line);
        among(&t, &may, &may, true)
            .with_context(|| format!("after {} changes:\n{}", changes.len(), changes.join("\n")))?;
    }
    cx.note(format!("{} changes:\n{}", changes.len(), changes.join("\n")));
    ensure!(changes.len() >= 2, "only {} changes: {changes:#?}", changes.len());
    ended("not killed at all")?;
    for kill_after in [1, changes.len() / 2] {
        let mut stepped = set_out()?;
        for _ in 0..kill_after {
            stepped.next_change()?;
        }
        stepped.kill();
        among(&t, &may, &may, true).with_context(|| format!("killed after {kill_after} changes"))?;
        ended(&format!("killed after {kill_after} changes"))?;
    }
    n1.stop_serving(LATE);
    Ok(())
}

/// To a kernel that knows nothing of us: on the way no socket of the node gets what is for a virtual address, and on published
/// numbers they get what is theirs again.
fn cleanup(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&spec())?;
    let mut m = cx.manifests()?;
    describe(&t, &mut m, &[WEB])?;
    let n1 = t.node(1);
    let mut may = answers(&[WEB]);
    let own = (LATE, WEB.published);
    may.entry(Place::Published(WEB.published)).or_default().insert(own);
    let prepare = || {
        n1.stop_serving(LATE);
        cx.apply_on(n1, &m)?;
        n1.serve_as(LATE, &everywhere(&[WEB.published], false))
    };
    let finish = || {
        cx.cleanup(&t)?;
        check::nothing_left(&t)?;
        let only_own = Answers::from([(Place::Published(WEB.published), BTreeSet::from([own]))]);
        among_or_unreachable(&t, &only_own, &may)
    };
    let result = ends(cx, &t, &["cleanup"], &may, &prepare, &finish);
    n1.stop_serving(LATE);
    result
}

/// Steps through a command that begins or ends with nothing of ours in the kernel; then kills it after some of its changes.
fn ends(
    cx: &Cx,
    t: &Topology,
    command: &[&str],
    may: &Answers,
    prepare: &dyn Fn() -> Result<()>,
    finish: &dyn Fn() -> Result<()>,
) -> Result<()> {
    prepare()?;
    let mut changes = Vec::new();
    let mut stepped = Stepped::start(cx, t, command)?;
    while let Some(line) = stepped.next_change()? {
        changes.push(line);
        among_or_unreachable(t, may, may)
            .with_context(|| format!("after {} changes:\n{}", changes.len(), changes.join("\n")))?;
    }
    cx.note(format!("{} changes:\n{}", changes.len(), changes.join("\n")));
    if command.first() == Some(&"apply") {
        singly(&changes)?;
    }
    ensure!(changes.len() > 3, "only {} changes: {changes:#?}", changes.len());
    finish().context("not killed at all")?;
    for kill_after in [1, changes.len() / 2, changes.len() - 1] {
        prepare()?;
        let mut stepped = Stepped::start(cx, t, command)?;
        for _ in 0..kill_after {
            if stepped.next_change()?.is_none() {
                break;
            }
        }
        stepped.kill();
        among_or_unreachable(t, may, may).with_context(|| format!("killed after {kill_after} changes"))?;
        finish().with_context(|| format!("killed after {kill_after} changes, and done again"))?;
    }
    Ok(())
}

/// Goes from one state to the other: once stopping after every change and looking, then killed after some of them.
fn walk(cx: &mut Cx, from: &[Service], to: &[Service], forget: bool) -> Result<()> {
    cx.meshlb()?;
    let t = cx.topology(&spec())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    let (old, new) = (answers(from), answers(to));
    let mut either = old.clone();
    new.iter().for_each(|(place, who)| either.entry(*place).or_default().extend(who));
    let late: Vec<u16> = from.iter().map(|s| s.published).collect();
    // A number that the new state does not publish is the node's own again.
    for port in &late {
        let place = Place::Published(*port);
        if !new.contains_key(&place) {
            either.entry(place).or_default().insert((LATE, *port));
        }
    }
    // In the old state, and on its published numbers there are sockets of the node; off to the new one.
    let set_out = |m: &mut Manifests, look: bool| -> Result<Stepped> {
        describe(&t, m, from)?;
        cx.apply_on(n1, m)?;
        if look {
            among(&t, &old, &either, true).context("the old state")?;
        }
        n1.serve_as(LATE, &everywhere(&late, false))?;
        describe(&t, m, to)?;
        if forget {
            fs::remove_dir_all(n1.state_dir())?;
        }
        Stepped::start(cx, &t, &["apply", &m.dir.to_string_lossy()])
    };
    let begun = Instant::now();
    let mut changes = Vec::new();
    let mut stepped = set_out(&mut m, true)?;
    while let Some(line) = stepped.next_change()? {
        changes.push(line);
        among(&t, &either, &either, false)
            .with_context(|| format!("after {} changes:\n{}", changes.len(), changes.join("\n")))?;
    }
    n1.stop_serving(LATE);
    cx.note(format!("{} changes in {:?}:\n{}", changes.len(), begun.elapsed(), changes.join("\n")));
    singly(&changes)?;
    // One transaction of nft is one change, whatever is in it.
    ensure!(changes.len() >= 2, "only {} changes: {changes:#?}", changes.len());
    among(&t, &new, &either, true).context("not killed at all")?;
    // Killed after every one takes too long for each run: the first, the last and one between.
    let kills: BTreeSet<usize> = (0..3).map(|i| 1 + i * (changes.len() - 1) / 2).collect();
    for kill_after in kills {
        let mut stepped = set_out(&mut m, false)?;
        let mut last = String::new();
        for _ in 0..kill_after {
            // There may be fewer than before: it forgets as many UDP flows as there are.
            let Some(change) = stepped.next_change()? else { break };
            last = change;
        }
        stepped.kill();
        n1.stop_serving(LATE);
        if forget {
            fs::remove_dir_all(n1.state_dir())?;
        }
        let what = format!("killed after {kill_after} changes, the last of them {last}");
        cx.apply_on(n1, &m).with_context(|| what.clone())?;
        let plan = cx.meshlb()?.run(n1, &["plan", &m.dir.to_string_lossy()])?;
        ensure!(plan.status == 0, "{what}, then applied: not in sync: {plan}");
        among(&t, &new, &either, true).with_context(|| format!("{what}, then applied"))?;
    }
    cx.note(format!("with kills in {:?}", begun.elapsed()));
    Ok(())
}

/// Everything is answered by those who may; with `all`, places that somebody has are, and by nobody but them.
fn among(t: &Topology, may: &Answers, places: &Answers, all: bool) -> Result<()> {
    asked(t, may, places, all, &["ECONNREFUSED", "EPERM"])
}

/// The same where a virtual address may be unknown to the node, which then has no route to it. (UDP is not told of that,
/// and a connection whose error has been read already ends without one.)
fn among_or_unreachable(t: &Topology, may: &Answers, places: &Answers) -> Result<()> {
    let known =
        ["ECONNREFUSED", "EPERM", "ENETUNREACH", "EHOSTUNREACH", "timeout", "no error set after POLLHUP"];
    asked(t, may, places, false, &known)
}

fn asked(t: &Topology, may: &Answers, places: &Answers, all: bool, known: &[&str]) -> Result<()> {
    let n1 = t.node(1);
    let mut jobs: Vec<(&Host, Probe)> = Vec::new();
    let mut of = Vec::new();
    for place in places.keys() {
        for family in Family::ALL {
            for proto in [Proto::Tcp, Proto::Udp] {
                let ways: Vec<(&Host, SocketAddr)> = match *place {
                    Place::Vip(last, port) => {
                        let ip = family.pick(format!("10.200.0.{last}"), format!("fd00:200::{last:x}"));
                        let dst = SocketAddr::new(ip.parse()?, port);
                        vec![(t.pod("p13"), dst), (n1, dst)]
                    }
                    Place::Published(port) => {
                        let (dst, by_lo) = (n1.at(family, port), SocketAddr::new(family.localhost(), port));
                        vec![(&t.ext, dst), (n1, dst), (n1, by_lo)]
                    }
                };
                for (host, dst) in ways {
                    jobs.push((host, Probe::new(proto, dst).within(Duration::from_millis(1500))));
                    of.push(*place);
                }
            }
        }
    }
    for (place, tally) in of.iter().zip(ask(&jobs)?) {
        let may = may.get(place);
        for answer in &tally.answers {
            let who = (answer.server.as_str(), answer.local.port());
            let fine = may.is_some_and(|may| may.iter().any(|m| *m == who));
            ensure!(fine, "{place:?} is answered by {who:?}, not by one of {may:?}: {tally}");
        }
        ensure!(
            tally.errors.keys().all(|e| known.contains(&e.as_str())),
            "{place:?} is not refused: {tally}"
        );
        let somebody = may.is_some_and(|may| !may.is_empty());
        ensure!(!all || !somebody || tally.answered() > 0, "{place:?} is not answered: {tally}");
    }
    Ok(())
}

/// A `meshlb` command that stops after every message that it, or a program that it has started, sends.
struct Stepped {
    apply: Agent,
    log: PathBuf,
    /// Bytes of the log that have been read.
    read: usize,
    /// The processes seen, and of each what it has sent and not been let go on after.
    processes: BTreeMap<i32, Option<String>>,
    /// Beginnings of lines that strace has split.
    split: BTreeMap<i32, String>,
    /// The one that is stopped after a change.
    stopped: Option<i32>,
}

impl Stepped {
    fn start(cx: &Cx, t: &Topology, command: &[&str]) -> Result<Stepped> {
        Stepped::start_with(cx, t, command, None)
    }

    /// The same with another value of `--renderer`.
    fn start_with(
        cx: &Cx,
        t: &Topology,
        command: &[&str],
        renderer: Option<&'static str>,
    ) -> Result<Stepped> {
        let log = cx.dir.join("step.log");
        let _ = fs::remove_file(&log);
        // No --seccomp-bpf: with it strace 6.1 sends no signals.
        // The order within IPVS matters where packets are led to it; a cleanup has taken away what leads them before.
        let singly = if command.first() == Some(&"apply") { "export MESHLB_IPVS_SINGLY=1" } else { ":" };
        let script = format!(
            "{singly}
             exec strace -D -f -qq -x -s 96 -o {} -e trace=execve,sendto,sendmsg,sendmmsg,setsockopt \
             -e inject=sendto,sendmsg,sendmmsg,setsockopt:signal=SIGSTOP MESHLB \"$@\"",
            log.display()
        );
        let mut meshlb: Meshlb = wrapped(cx, "stepped", &script)?;
        meshlb.choice = renderer;
        let apply = meshlb.start(t.node(1), command, "step-out.log")?;
        let (processes, split) = Default::default();
        Ok(Stepped { apply, log, read: 0, processes, split, stopped: None })
    }

    /// Lets it go on until it has made one more change; `None` if it ends before.
    fn next_change(&mut self) -> Result<Option<String>> {
        if let Some(pid) = self.stopped.take() {
            go_on(pid);
        }
        let end = Instant::now() + Duration::from_secs(40);
        loop {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            while let Some((line, _)) = text.get(self.read..).unwrap_or_default().split_once('\n') {
                self.read += line.len() + 1;
                if let Some(change) = self.take(line)? {
                    return Ok(Some(change));
                }
            }
            if !self.apply.alive() {
                return Ok(None);
            }
            ensure!(Instant::now() < end, "it neither stops nor ends; strace's end:\n{}", tail(&text));
            sleep(Duration::from_millis(2));
        }
    }

    /// A line of strace. If by it a process is stopped that has sent a change, that change; one that has sent something
    /// else is let go on.
    fn take(&mut self, line: &str) -> Result<Option<String>> {
        let Some((pid, rest)) = line.split_once(' ') else { bail!("strace says {line:?}") };
        let pid: i32 = pid.parse().with_context(|| format!("strace says {line:?}"))?;
        let rest = rest.trim_start();
        let sent = self.processes.entry(pid).or_default();
        if rest.ends_with("<unfinished ...>") {
            self.split.insert(pid, rest.to_owned());
        } else if rest.starts_with("<... ") {
            if let Some(begun) = self.split.remove(&pid).filter(|b| is_sent(b)) {
                *sent = Some(begun + rest);
            }
        } else if is_sent(rest) {
            *sent = Some(rest.to_owned());
        } else if rest.starts_with("--- stopped by SIGSTOP")
            && let Some(sent) = sent.take()
        {
            if is_change(&sent) || is_table(&sent) {
                self.stopped = Some(pid);
                return Ok(Some(summary(pid, &sent)));
            }
            go_on(pid);
        }
        Ok(None)
    }

    /// Kills it with all that it has started.
    fn kill(self) {
        for pid in self.processes.keys() {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        self.apply.kill();
        // A child of it that has been killed is gone when it has let go of its lock.
        sleep(Duration::from_millis(20));
    }
}

/// Each change of IPVS was sent alone.
fn singly(changes: &[String]) -> Result<()> {
    let several = changes.iter().find(|line| line.matches("IPVS").count() > 1);
    ensure!(several.is_none(), "several changes at once: {several:?}");
    ensure!(changes.iter().any(|line| line.contains("IPVS")), "none of IPVS: {changes:#?}");
    Ok(())
}

fn is_sent(call: &str) -> bool {
    call.starts_with("send") || call.starts_with("setsockopt")
}

/// A whole table of iptables-legacy: the programs of that flavour hand the kernel one at a time (`IPT_SO_SET_REPLACE`, 64).
fn is_table(call: &str) -> bool {
    call.starts_with("setsockopt") && (call.contains("SO_SET_REPLACE") || call.contains(", 0x40"))
}

/// The kinds of the messages that were sent at once.
fn summary(pid: i32, sent: &str) -> String {
    if is_table(sent) {
        return format!("process {pid}: a table of iptables-legacy");
    }
    let kinds: Vec<&str> = sent
        .split("nlmsg_type=")
        .skip(1)
        .map(|m| m.split(',').next().unwrap_or(m).rsplit("<<8|").next().unwrap_or(m))
        .collect();
    format!("process {pid}: {}", kinds.join(" "))
}

/// Has a process go on. It may have ended with its group.
fn go_on(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
