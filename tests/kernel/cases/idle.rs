//! Real connections that are idle for sixteen minutes, while the other cases run.
//!
//! IPVS forgets an idle TCP connection after 900 seconds unless told otherwise; we tell it (`--ipvs-timeouts`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::ns::{IDLE_PREFIX, Netns};
use crate::program::Meshlb;
use crate::runner::{Cx, Matrix, Renderer, Skip, Suite};

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
    connections: Vec<(String, TcpStream)>,
    since: Instant,
    state: tempfile::TempDir,
}

static RUNNING: Mutex<Vec<Idle>> = Mutex::new(Vec::new());
static BEGUN: AtomicBool = AtomicBool::new(false);

/// Addresses of a family: the node's towards the client and the pod, theirs, and the service's.
struct Plan {
    name: &'static str,
    node: &'static str,
    client: &'static str,
    gateway: &'static str,
    pod: &'static str,
    prefix: u8,
    vip: &'static str,
    range: &'static str,
}

const PLANS: [Plan; 2] = [
    Plan {
        name: "IPv4",
        node: "10.210.0.1",
        client: "10.210.0.2",
        gateway: "10.210.1.1",
        pod: "10.210.1.2",
        prefix: 24,
        vip: "10.211.0.5",
        range: "10.211.0.0/24",
    },
    Plan {
        name: "IPv6",
        node: "fd00:210::1",
        client: "fd00:210::2",
        gateway: "fd00:210:1::1",
        pod: "fd00:210:1::2",
        prefix: 64,
        vip: "fd00:211::5",
        range: "fd00:211::/112",
    },
];

impl Plan {
    fn manifests(&self) -> String {
        let Self { name, vip, pod, .. } = self;
        format!(
            "apiVersion: meshlb.dev/v1alpha1
kind: MeshService
metadata: {{name: idle, namespace: default}}
spec:
  vips: ['{vip}']
  ipFamilies: [{name}]
  ports: [{{port: 80, targetPort: 8080, publish: {{port: 30080}}}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: idle, namespace: default, labels: {{kubernetes.io/service-name: idle}}}}
addressType: {name}
ports: [{{port: 8080, protocol: TCP}}]
endpoints: [{{addresses: ['{pod}'], conditions: {{ready: true}}, nodeName: idle}}]
"
        )
    }
}

/// Both families by each renderer.
fn start(cx: &mut Cx) -> Result<()> {
    let mut running = Vec::new();
    for renderer in Renderer::ALL {
        let meshlb = cx.meshlb_by(renderer)?;
        for plan in &PLANS {
            running.push(one(cx, &meshlb, plan).with_context(|| format!("{} by {renderer:?}", plan.name))?);
        }
    }
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = running;
    BEGUN.store(true, Ordering::Relaxed);
    Ok(())
}

fn one(cx: &mut Cx, meshlb: &Meshlb, plan: &Plan) -> Result<Idle> {
    let renderer = meshlb.renderer.flag();
    let spaces = ["node", "client", "pod"]
        .map(|n| Netns::create_as(format!("{IDLE_PREFIX}{n}-{}-{renderer}", plan.name)));
    let [node, client, pod] = spaces;
    let (node, client, pod) = (node?, client?, pod?);
    let prefix = plan.prefix;
    let nodad = if plan.name == "IPv6" { " nodad" } else { "" };
    for (peer, link, ours, theirs) in
        [(&client, "c", plan.node, plan.client), (&pod, "p", plan.gateway, plan.pod)]
    {
        node.ip(&format!(
            "link add {link} type veth peer name eth0 netns {}\nlink set {link} up\nlink set lo up\naddr add {ours}/{prefix} dev {link}{nodad}\n",
            peer.name()
        ))?;
        peer.ip(&format!(
            "link set eth0 up\nlink set lo up\naddr add {theirs}/{prefix} dev eth0{nodad}\nroute add default via {ours}\n"
        ))?;
    }
    let listener = pod.enter(|| Ok(TcpListener::bind("[::]:8080")?))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    let state = tempfile::tempdir()?;
    let path = |name: &str| state.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(path("services"))?;
    std::fs::write(path("services/idle.yaml"), plan.manifests())?;
    let command: Vec<String> = [
        meshlb.binary.to_string_lossy().into_owned(),
        "apply".to_owned(),
        path("services"),
        "--node=idle".to_owned(),
        format!("--node-ip={}", plan.node),
        format!("--vip-cidr={}", plan.range),
        format!("--renderer={renderer}"),
        format!("--state-dir={}", path("state")),
        format!("--run-dir={}", path("run")),
    ]
    .into();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    node.run_env(&command, &[("PATH", &meshlb.path)], "")?.ok()?;
    let mut connections = Vec::new();
    for (what, ip, port) in [("by VIP", plan.vip, 80), ("by published port", plan.node, 30080)] {
        let what = format!("{} {what}, {renderer}", plan.name);
        let to = SocketAddr::new(ip.parse()?, port);
        let stream = client.enter(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))?));
        let stream = stream.with_context(|| what.clone())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        exchange(&stream).with_context(|| what.clone())?;
        connections.push((what, stream));
    }
    // The one by VIP is in the kernel's table with more than the 900 seconds that it has by itself.
    let table = node.run(&["ipvsadm", "-Lnc"])?.ok()?.stdout;
    cx.note(&table);
    let minutes = |line: &str| line.split_whitespace().nth(1)?.split(':').next()?.parse::<u64>().ok();
    let left = table.lines().filter(|l| l.contains("ESTABLISHED")).filter_map(minutes).max();
    ensure!(left > Some(16), "it will not last that long:\n{table}");
    Ok(Idle { node, client, pod, connections, since: Instant::now(), state })
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
    let running = std::mem::take(&mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner));
    if running.is_empty() && BEGUN.load(Ordering::Relaxed) {
        bail!("it has failed, and there are no second connections that are as old");
    }
    if running.is_empty() {
        return Err(Skip("idle::begins has not run, or failed".to_owned()).into());
    }
    for idle in running {
        let left = IDLE.saturating_sub(idle.since.elapsed());
        cx.note(format!("waiting for {left:?} more"));
        sleep(left);
        for (what, stream) in &idle.connections {
            exchange(stream).with_context(|| format!("{what}, after {:?}", idle.since.elapsed()))?;
        }
        cx.note(format!("idle for {:?}", idle.since.elapsed()));
        drop((idle.node, idle.client, idle.pod, idle.state));
    }
    Ok(())
}
