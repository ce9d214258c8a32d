//! What the cases about a single node and its agent share.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::check;
use crate::client::Probe;
use crate::manifests::Manifests;
use crate::ns::Output;
use crate::program::{Agent, Meshlb};
use crate::runner::{Cx, Family, Proto};
use crate::topology::{Builder, Node, Topology};

/// The usual service's addresses.
pub const VIPS: [&str; 2] = ["10.200.0.5", "fd00:200::5"];
/// Where agents serve their metrics.
pub const ADMIN: &str = "127.0.0.1:9477";

/// One node with two pods, and the outside client.
pub fn one_node() -> Builder {
    Topology::builder().nodes(1)
}

/// An address of the usual service.
pub fn vip(family: Family, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(family.pick(VIPS[0], VIPS[1]).parse()?, port))
}

/// `web`: TCP and UDP port 80, published as 30080, on these pods.
pub fn web(t: &Topology, m: &mut Manifests, pods: &[&str]) -> Result<()> {
    let service = m.service("web").vips(&VIPS)?;
    for proto in [Proto::Tcp, Proto::Udp] {
        service.port(proto, 80, 8080, Some(30080));
    }
    let hosts: Vec<_> = pods.iter().map(|p| t.pod(p)).collect();
    m.endpoints("web", &hosts);
    Ok(())
}

/// One node, and `web` on these of its pods described: not yet written.
pub fn web_on_one_node(cx: &Cx, pods: &[&str]) -> Result<(Arc<Topology>, Manifests)> {
    let t = cx.topology(&one_node())?;
    let mut m = cx.manifests()?;
    web(&t, &mut m, pods)?;
    Ok((t, m))
}

/// `web` is answered by these pods: at its address from a pod, at its published port from outside.
pub fn served(t: &Topology, pods: &[&str]) -> Result<()> {
    let n1 = t.node(1);
    for family in Family::ALL {
        for proto in [Proto::Tcp, Proto::Udp] {
            check::even(&t.pod("p12").connect(proto, vip(family, 80)?, 2 * pods.len())?, pods)?;
            check::among(&t.ext.connect(proto, n1.at(family, 30080), 2)?, pods)?;
        }
    }
    Ok(())
}

/// An answer over HTTP to a program on the node: its status and its body.
pub fn http(node: &Node, address: &str, path: &str) -> Result<(u16, String)> {
    let text = node.ns.enter(|| {
        let mut stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no HTTP status")?;
    Ok((status, body.to_owned()))
}

/// The sum of the agent's series that begin so; an error where there is none.
pub fn metric(node: &Node, series: &str) -> Result<f64> {
    let (status, text) = http(node, ADMIN, "/metrics")?;
    ensure!(status == 200, "/metrics: {status} {text}");
    let value = |l: &str| l.rsplit_once(' ').and_then(|(_, v)| v.parse::<f64>().ok());
    let values: Vec<f64> = text.lines().filter(|l| l.starts_with(series)).filter_map(value).collect();
    ensure!(!values.is_empty(), "no {series} in:\n{text}");
    Ok(values.iter().sum())
}

/// Looks again and again until it is true.
pub fn wait_until(what: &str, within: Duration, mut f: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    while !f()? {
        if start.elapsed() > within {
            bail!("not within {within:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(start.elapsed())
}

/// Tries until it goes well; an error tells what was in the way last.
pub fn wait_until_ok(what: &str, within: Duration, mut f: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut last = None;
    let done = wait_until(what, within, || {
        last = f().err();
        Ok(last.is_none())
    });
    match (done, last) {
        (Err(e), Some(last)) => bail!("{e}: {last:#}"),
        (done, _) => done,
    }
}

/// Waits until the agent says that it is ready.
pub fn ready(node: &Node, agent: &mut Agent) -> Result<()> {
    let mut last = String::new();
    for _ in 0..150 {
        ensure!(agent.alive(), "the agent has ended:\n{}", agent.log_text());
        match http(node, ADMIN, "/readyz") {
            Ok((200, _)) => return Ok(()),
            Ok((_, body)) => last = body,
            Err(e) => last = e.to_string(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("not ready: {last}\n{}", agent.log_text())
}

/// An agent on the first node that is ready.
pub fn start(cx: &Cx, meshlb: &Meshlb, t: &Topology, m: &Manifests) -> Result<Agent> {
    cx.will_clean(t.node(1));
    let mut agent = meshlb.agent(t.node(1), &m.dir)?;
    ready(t.node(1), &mut agent)?;
    Ok(agent)
}

/// `meshlb`, started by a shell script that ends in `MESHLB "$@"`, which is the program.
pub fn wrapped(cx: &Cx, name: &str, script: &str) -> Result<Meshlb> {
    let mut meshlb = cx.meshlb()?.clone();
    let file = cx.dir.join(name);
    let script = script.replace("MESHLB \"$@\"", &format!("{} \"$@\"", meshlb.binary.display()));
    fs::write(&file, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    meshlb.binary = file;
    Ok(meshlb)
}

/// `meshlb` that sees this directory in the place of another.
pub fn covered(cx: &Cx, name: &str, dir: &Path, place: &str) -> Result<Meshlb> {
    let script = format!(
        "exec unshare -m --propagation private sh -ec 'mount --bind {} {place}; exec MESHLB \"$@\"' sh \"$@\"",
        dir.display()
    );
    wrapped(cx, name, &script)
}

/// `meshlb` as in a container: of the programs in `/usr/sbin` it has only these, under these names.
pub fn container(cx: &Cx, name: &str, programs: &[&str]) -> Result<Meshlb> {
    let sbin = cx.dir.join(format!("{name}-sbin"));
    let _ = fs::remove_dir_all(&sbin);
    fs::create_dir_all(&sbin)?;
    for program in programs {
        fs::copy(fs::canonicalize(format!("/usr/sbin/{program}"))?, sbin.join(program))
            .with_context(|| (*program).to_owned())?;
    }
    let mut meshlb = covered(cx, name, &sbin, "/usr/sbin")?;
    meshlb.path = "/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
    Ok(meshlb)
}

/// The lines that a command has said on standard error; not those of an agent's log that are no complaint.
pub fn said(out: &Output) -> Vec<&str> {
    out.stderr.lines().filter(|l| !l.trim().is_empty() && !l.contains(" INFO ")).collect()
}

/// It failed with 1 and said one line, in which all of this stands.
pub fn one_line(out: &Output, texts: &[&str]) -> Result<()> {
    ensure!(out.status == 1, "not status 1: {out}");
    let lines = said(out);
    ensure!(lines.len() == 1, "not one line: {out}");
    for text in texts {
        ensure!(lines[0].contains(text), "the line does not say {text:?}: {out}");
    }
    Ok(())
}

/// One connection attempt that is answered by nobody.
pub fn unanswered(t: &Topology, dst: SocketAddr) -> Result<()> {
    let tally = t.pod("p12").probe(&Probe::new(Proto::Tcp, dst).within(Duration::from_millis(1500)))?;
    ensure!(tally.answered() == 0, "it is answered: {tally}");
    Ok(())
}
