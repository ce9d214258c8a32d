//! A real Prometheus scrapes an agent.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::guard::sh;
use super::healing::{full_turns, turned};
use super::support::{ADMIN, http, metric, one_node, ready, served, vip, wait_until, web, web_on_one_node};
use crate::check;
use crate::client::{Flows, Probe};
use crate::ns;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::topology::Node;

pub fn register(suite: &mut Suite) {
    suite.add_slow("scrape::prometheus", &Matrix::pair(), Duration::from_secs(120), prometheus);
    suite.add("scrape::readiness", &Matrix::pair(), readiness);
}

const SERVER: &str = "127.0.0.1:9090";

/// Prometheus, until it is dropped.
pub(super) struct Prometheus(Child);

impl Prometheus {
    fn start(node: &Node, dir: &Path) -> Result<Prometheus> {
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: meshlb\n  static_configs: [{{targets: ['{ADMIN}']}}]\n"
        );
        Prometheus::with("prometheus", node, dir, &text)
    }

    /// Started on a node with this configuration; its log is in `dir`.
    pub(super) fn with(program: &str, node: &Node, dir: &Path, text: &str) -> Result<Prometheus> {
        let config = dir.join("prometheus.yml");
        fs::write(&config, text)?;
        let flags = [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", dir.join("data").display()),
            format!("--web.listen-address={SERVER}"),
            // Its pages are not in the folder that it was built for.
            format!("--web.console.templates={}", dir.display()),
            format!("--web.console.libraries={}", dir.display()),
        ];
        let command: Vec<&str> = std::iter::once(program).chain(flags.iter().map(String::as_str)).collect();
        Ok(Prometheus(node.ns.spawn(&command, &[], &dir.join("prometheus.log"))?))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An instant query: its values, by the label `by`.
pub(super) fn query(node: &Node, expression: &str, by: &str) -> Result<BTreeMap<String, f64>> {
    let encoded: String = expression.bytes().map(|b| format!("%{b:02X}")).collect();
    let (status, body) = http(node, SERVER, &format!("/api/v1/query?query={encoded}"))?;
    ensure!(status == 200, "{expression}: {status} {body}");
    let value: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
    let results = value["data"]["result"].as_array().with_context(|| format!("{value:#}"))?;
    Ok(results
        .iter()
        .filter_map(|r| {
            let number = r["value"][1].as_str()?.parse().ok()?;
            Some((r["metric"][by].as_str().unwrap_or_default().to_owned(), number))
        })
        .collect())
}

/// The one value of a query; `None` where there is none yet.
fn one(node: &Node, expression: &str) -> Result<Option<f64>> {
    Ok(query(node, expression, "job")?.into_values().next())
}

/// Waits until a query has this value.
fn becomes(node: &Node, expression: &str, want: f64) -> Result<()> {
    becomes_within(node, expression, want, Duration::from_secs(15))
}

/// The same, for as long.
pub(super) fn becomes_within(node: &Node, expression: &str, want: f64, within: Duration) -> Result<()> {
    let mut last = None;
    wait_until(expression, within, || {
        // It may only be starting.
        last = one(node, expression).unwrap_or_default();
        Ok(last.is_some_and(|v| (v - want).abs() < 0.001))
    })
    .with_context(|| format!("{expression} is {last:?}, not {want}"))
    .map(drop)
}

/// What is counted of a destination, in the order in which `ipvsadm --stats` shows it.
const COUNTED: [&str; 5] =
    ["connections", "incoming_packets", "outgoing_packets", "incoming_bytes", "outgoing_bytes"];

/// The numbers behind each destination that `ipvsadm` shows, summed over services.
fn ipvsadm(node: &Node, how: &[&str]) -> Result<BTreeMap<String, Vec<f64>>> {
    let command: Vec<&str> = ["ipvsadm", "-Ln"].iter().chain(how).copied().collect();
    let text = node.run(&command)?.ok()?.stdout;
    let mut out: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["->", address, rest @ ..] = &words[..]
            && address.ends_with(|c: char| c.is_ascii_digit())
        {
            let numbers: Vec<f64> = rest.iter().filter_map(|n| n.parse().ok()).collect();
            let sums = out.entry((*address).to_owned()).or_insert_with(|| vec![0.0; numbers.len()]);
            sums.iter_mut().zip(numbers).for_each(|(sum, n)| *sum += n);
        }
    }
    Ok(out)
}

/// What others take away, by the kind of drift that it is counted as.
fn taken(renderer: Renderer) -> Vec<(&'static str, &'static str)> {
    let mut out = vec![
        (
            "ipvs_service",
            "ipvsadm -D -f $(ipvsadm -Sn | sed -n 's/^-A -f \\([0-9]*\\) .*/\\1/p' | sort -n | head -1)",
        ),
        (
            "ipvs_destination",
            "ipvsadm -Sn | grep -m1 -- '-f .* -r 10.244' | sed 's/ -w .*//; s/^-a/-d/; s/ -m$//' | xargs ipvsadm",
        ),
        ("route", "ip route del local 10.200.0.0/16 dev lo table local"),
        ("sysctl", "echo 0 > /proc/sys/net/ipv4/vs/conntrack"),
    ];
    out.extend(if renderer == Renderer::Nftables {
        [("set_element", "nft flush map inet meshlb vips-4"), ("rules", "nft flush chain inet meshlb in")]
    } else {
        [
            ("set_element", "ipset flush meshlb-vips-4"),
            (
                "rules",
                "iptables -t nat -D PREROUTING -j MESHLB-PREROUTING || iptables -t nat -F MESHLB-PREROUTING",
            ),
        ]
    });
    out
}

fn prometheus(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    // Counters from nothing: the kernel gives a destination that comes back within a minute its old ones again.
    let t = cx.fresh_topology(&one_node())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11", "p12"])?;
    m.write()?;
    cx.will_clean(n1);
    let _prometheus = Prometheus::start(n1, &cx.dir)?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    ready(n1, &mut agent)?;
    wait_until("Prometheus answers", Duration::from_secs(40), || {
        Ok(http(n1, SERVER, "/-/ready").is_ok_and(|(status, _)| status == 200))
    })
    .with_context(|| fs::read_to_string(cx.dir.join("prometheus.log")).unwrap_or_default())?;
    becomes(n1, "up{job=\"meshlb\"}", 1.0)?;
    becomes(n1, "meshlb_services", 1.0)?;
    becomes(n1, "meshlb_in_sync", 1.0)?;
    becomes(n1, "sum(meshlb_service_connections_total)", 0.0)?;
    // Real traffic: 7 to the address and 5 to the published port over TCP, 4 over UDP, all IPv4; 3 over IPv6.
    let pod = t.pod("p12");
    check::answered(&pod.connect(Proto::Tcp, vip(Family::V4, 80)?, 7)?)?;
    check::answered(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, 30080), 5)?)?;
    check::answered(&pod.connect(Proto::Udp, vip(Family::V4, 80)?, 4)?)?;
    check::answered(&pod.connect(Proto::Tcp, vip(Family::V6, 80)?, 3)?)?;
    let sum = |labels: &str| {
        format!("sum(meshlb_service_connections_total{{namespace=\"default\",service=\"web\",{labels}}})")
    };
    becomes(n1, &sum("protocol=\"TCP\",family=\"IPv4\""), 12.0)?;
    becomes(n1, &sum("protocol=\"UDP\",family=\"IPv4\""), 4.0)?;
    becomes(n1, &sum("protocol=\"TCP\",family=\"IPv6\""), 3.0)?;
    // All that is counted, of each destination, as ipvsadm shows it; a last packet may be on its way.
    let column = |table: BTreeMap<String, Vec<f64>>, i: usize| -> BTreeMap<String, f64> {
        table
            .into_iter()
            .map(|(address, numbers)| (address, numbers.get(i).copied().unwrap_or(-1.0)))
            .collect()
    };
    let agree = |series: &str, how: &[&str], i: usize| -> Result<BTreeMap<String, f64>> {
        let expression = format!("sum by (endpoint) (meshlb_endpoint_{series})");
        let (mut told, mut counted) = (BTreeMap::new(), BTreeMap::new());
        wait_until(&expression, Duration::from_secs(15), || {
            counted = column(ipvsadm(n1, how)?, i);
            told = query(n1, &expression, "endpoint")?;
            Ok(told == counted)
        })
        .with_context(|| format!("Prometheus has {told:?}, ipvsadm {counted:?}"))?;
        // A service's are those of its destinations together. (It has no weight.)
        if series != "weight" {
            becomes(n1, &format!("sum(meshlb_service_{series})"), told.values().sum())
                .with_context(|| format!("of endpoints {told:?}"))?;
        }
        Ok(told)
    };
    for (i, of) in COUNTED.iter().enumerate() {
        let told = agree(&format!("{of}_total"), &["--stats", "--exact"], i)?;
        let least = if *of == "connections" { 19.0 } else { 38.0 };
        ensure!(told.values().sum::<f64>() >= least, "{of}: {told:?}");
    }
    // The table shows weight, active and inactive connections; one is open.
    let probe = Probe::new(Proto::Tcp, vip(Family::V4, 80)?);
    let open = Flows::start(&pod.ns, &probe, 1, Duration::from_millis(200))?;
    let active = agree("active_connections", &[], 1)?;
    ensure!((active.values().sum::<f64>() - 1.0).abs() < 0.1, "{active:?}");
    open.stop()?;
    // Four IPVS services have each of them: two families, two protocols, and those of the published port.
    let weights = agree("weight", &[], 0)?;
    ensure!(weights.len() == 4 && weights.values().all(|n| *n >= 2.0), "{weights:?}");
    let inactive = agree("inactive_connections", &[], 2)?;
    ensure!(inactive.values().sum::<f64>() >= 1.0, "{inactive:?}");
    becomes(n1, "sum(meshlb_reconciles_total{outcome!=\"success\"}) or vector(0)", 0.0)?;
    let turns = one(n1, "sum(meshlb_reconciles_total{outcome=\"success\"})")?;
    ensure!(turns.is_some_and(|n| n >= 1.0), "turns: {turns:?}");
    // A change of endpoints is timed.
    let count = "meshlb_source_to_kernel_seconds_count";
    let before = metric(n1, count)?;
    m.endpoints("web", &[t.pod("p11")]);
    m.write()?;
    becomes(n1, count, before + 1.0)?;
    let spent = one(n1, "meshlb_source_to_kernel_seconds_sum")?.unwrap_or_default();
    ensure!(spent > 0.0 && spent < 60.0, "{spent} s");
    becomes(n1, "sum(meshlb_service_endpoints{protocol=\"TCP\",family=\"IPv4\",state=\"ready\"})", 1.0)?;
    // What others take away is put back and counted, by kind.
    let take = taken(cx.renderer());
    for (kind, script) in &take {
        let series = format!("meshlb_drift_total{{kind=\"{kind}\"");
        let (before, turns) = (metric(n1, &series).unwrap_or(0.0), full_turns(n1));
        sh(cx, n1, script).with_context(|| (*kind).to_owned())?;
        wait_until(kind, Duration::from_secs(15), || Ok(metric(n1, &series).is_ok_and(|n| n > before)))
            .with_context(|| agent.log_text())?;
        turned(n1, turns);
    }
    wait_until("drift at Prometheus", Duration::from_secs(15), || {
        let kinds = query(n1, "meshlb_drift_total > 0", "kind")?;
        Ok(take.iter().all(|(kind, _)| kinds.contains_key(*kind)))
    })?;
    becomes(n1, "meshlb_in_sync", 1.0)?;
    served(&t, &["p11"])?;
    // And the format itself.
    let (_, text) = http(n1, ADMIN, "/metrics")?;
    let out =
        n1.ns.enter(|| ns::run_here(&["promtool", "check", "metrics"], &[], &text, ns::COMMAND_LIMIT))?;
    ensure!(out.status == 0 && out.stdout.is_empty() && out.stderr.is_empty(), "{out}\n{text}");
    agent.terminate(Duration::from_secs(5))?;
    becomes(n1, "up{job=\"meshlb\"}", 0.0)
}

/// Alive from the start; ready from when the folder was read and the kernel is as it says.
fn readiness(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let (t, mut m) = web_on_one_node(cx, &["p11", "p12"])?;
    let n1 = t.node(1);
    cx.will_clean(n1);
    // The folder is not there yet.
    let away = cx.dir.join("away");
    m.write()?;
    fs::rename(&m.dir, &away)?;
    let mut agent = meshlb.agent(n1, &m.dir)?;
    wait_until("the agent answers", Duration::from_secs(10), || Ok(http(n1, ADMIN, "/livez").is_ok()))?;
    for _ in 0..4 {
        let (status, body) = http(n1, ADMIN, "/livez")?;
        ensure!(status == 200, "/livez: {status} {body}");
        let (status, body) = http(n1, ADMIN, "/readyz")?;
        ensure!(status == 503 && body.contains("[-] sources: not all read yet"), "/readyz: {status} {body}");
        std::thread::sleep(Duration::from_millis(500));
    }
    let log = agent.log_text();
    ensure!(log.lines().filter(|l| l.contains("does not exist")).count() == 1, "not one line:\n{log}");
    ensure!(n1.snapshot()?.ours().is_empty(), "programmed before the folder was read");
    fs::rename(&away, &m.dir)?;
    ready(n1, &mut agent)?;
    served(&t, &["p11", "p12"])
}
