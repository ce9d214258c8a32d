//! One real connection that is idle for sixteen minutes, while the other cases run.
//!
//! IPVS forgets an idle TCP connection after 900 seconds unless told otherwise; we tell it (`--ipvs-timeouts`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::ns::{IDLE_PREFIX, Netns};
use crate::runner::{Cx, Matrix, Skip, Suite};

/// Longer than the kernel's own timeout.
const IDLE: Duration = Duration::from_secs(16 * 60);

/// The first half, before the cases that take long.
pub fn begin(suite: &mut Suite) {
    suite.add("idle::begins", &Matrix::once(), start);
    suite.grouped("idle");
}

/// The second half, after them.
pub fn end(suite: &mut Suite) {
    suite.add_slow("idle::sixteen_minutes_later", &Matrix::once(), IDLE + Duration::from_secs(60), finish);
    suite.grouped("idle");
}

/// A node with one pod and one client, apart from everybody else's.
struct Idle {
    node: Netns,
    client: Netns,
    pod: Netns,
    connections: Vec<(&'static str, TcpStream)>,
    since: Instant,
    state: tempfile::TempDir,
}

static RUNNING: Mutex<Option<Idle>> = Mutex::new(None);
static BEGUN: AtomicBool = AtomicBool::new(false);

const NODE: &str = "10.210.0.1";
const VIP: &str = "10.211.0.5";
const MANIFESTS: &str = r#"
apiVersion: meshlb.dev/v1alpha1
kind: MeshService
metadata: {name: idle, namespace: default}
spec:
  vips: [10.211.0.5]
  ports: [{port: 80, targetPort: 8080, publish: {port: 30080}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: idle, namespace: default, labels: {kubernetes.io/service-name: idle}}
addressType: IPv4
ports: [{port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.210.1.2], conditions: {ready: true}, nodeName: idle}]
"#;

fn start(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let [node, client, pod] =
        ["node", "client", "pod"].map(|n| Netns::create_as(format!("{IDLE_PREFIX}{n}")));
    let (node, client, pod) = (node?, client?, pod?);
    for (peer, link, ours, theirs) in
        [(&client, "c", NODE, "10.210.0.2"), (&pod, "p", "10.210.1.1", "10.210.1.2")]
    {
        let lines = format!(
            "link add {link} type veth peer name eth0 netns {}\naddr add {ours}/24 dev {link}\nlink set {link} up\nlink set lo up\n",
            peer.name()
        );
        node.ip(&lines)?;
        peer.ip(&format!(
            "addr add {theirs}/24 dev eth0\nlink set eth0 up\nlink set lo up\nroute add default via {ours}\n"
        ))?;
    }
    let listener = pod.enter(|| Ok(TcpListener::bind("0.0.0.0:8080")?))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    let state = tempfile::tempdir()?;
    let path = |name: &str| state.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(path("services"))?;
    std::fs::write(path("services/idle.yaml"), MANIFESTS)?;
    let command: Vec<String> = [
        meshlb.binary.to_string_lossy().into_owned(),
        "apply".to_owned(),
        path("services"),
        "--node=idle".to_owned(),
        format!("--node-ip={NODE}"),
        "--vip-cidr=10.211.0.0/24".to_owned(),
        format!("--renderer={}", meshlb.renderer.flag()),
        format!("--state-dir={}", path("state")),
        format!("--run-dir={}", path("run")),
    ]
    .into();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    node.run_env(&command, &[("PATH", &meshlb.path)], "")?.ok()?;
    let mut connections = Vec::new();
    for (what, to) in [("by VIP", format!("{VIP}:80")), ("by published port", format!("{NODE}:30080"))] {
        let stream = client.enter(|| Ok(TcpStream::connect_timeout(&to.parse()?, Duration::from_secs(5))?));
        let stream = stream.with_context(|| what.to_owned())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        exchange(&stream).with_context(|| what.to_owned())?;
        connections.push((what, stream));
    }
    // The one by VIP is in the kernel's table with more than the 900 seconds that it has by itself.
    let table = node.run(&["ipvsadm", "-Lnc"])?.ok()?.stdout;
    cx.note(&table);
    let minutes = |line: &str| line.split_whitespace().nth(1)?.split(':').next()?.parse::<u64>().ok();
    let left = table.lines().filter(|l| l.contains("ESTABLISHED")).filter_map(minutes).max();
    ensure!(left > Some(16), "it will not last that long:\n{table}");
    let idle = Idle { node, client, pod, connections, since: Instant::now(), state };
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(idle);
    BEGUN.store(true, Ordering::Relaxed);
    Ok(())
}

fn echo(stream: TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        (&stream).write_all(line.as_bytes())?;
        line.clear();
    }
    Ok(())
}

fn exchange(stream: &TcpStream) -> Result<()> {
    let mut stream = stream;
    stream.write_all(b"still there?\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line == "still there?\n", "the answer is {line:?}");
    Ok(())
}

fn finish(cx: &mut Cx) -> Result<()> {
    let idle = RUNNING.lock().unwrap_or_else(PoisonError::into_inner).take();
    if idle.is_none() && BEGUN.load(Ordering::Relaxed) {
        bail!("it has failed, and there is no second connection that is as old");
    }
    let idle = idle.ok_or_else(|| Skip("idle::begins has not run, or failed".to_owned()))?;
    let left = IDLE.saturating_sub(idle.since.elapsed());
    cx.note(format!("waiting for {left:?} more"));
    sleep(left);
    for (what, stream) in &idle.connections {
        exchange(stream).with_context(|| format!("{what}, after {:?}", idle.since.elapsed()))?;
    }
    cx.note(format!("idle for {:?}", idle.since.elapsed()));
    drop((idle.node, idle.client, idle.pod, idle.state));
    Ok(())
}
