//! What commands say beside a running agent, and what becomes of a wrong object.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::support::ADMIN;
use super::{Cluster, metric, serve_from, two_nodes, vip, web};
use crate::check;
use crate::client::{Load, Probe};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};

pub fn register(suite: &mut Suite) {
    suite.add("lifecycle::commands_beside_an_agent", &Matrix::pair(), commands);
    suite.add("lifecycle::wrong_object_keeps_its_last_version", &Matrix::pair(), wrong_object);
}

fn commands(cx: &mut Cx) -> Result<()> {
    let renderer = cx.renderer();
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p12", "p21"]))?;
    let t = c.t.clone();
    let node = t.node(1);
    // The kernel goes on counting where a destination comes back within two minutes: one of the case before this, it may be.
    let before = counted(v4_server(&c.service(1, "web")?)?);
    check::answered(&c.t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, 6)?)?;
    // The kernel's totals are those of its last estimate, which it makes every 2 s (ip_vs_est.c).
    super::wait_until(
        &format!("6 connections more than {before} are counted"),
        Duration::from_secs(10),
        || Ok(counted(v4_server(&c.service(1, "web")?)?) >= before + 6),
    )?;
    let report = c.show(1)?;
    ensure!(report["node"] == "n1" && report["renderer"] == renderer.flag(), "{report:#}");
    ensure!(report["nodeProblems"] == json!([]), "{report:#}");
    let service = c.service(1, "web")?;
    ensure!(service["readyEndpoints"] == 3 && service["totalEndpoints"] == 3, "{service:#}");
    let v4 = v4_server(&service)?;
    ensure!(v4["state"] == "ok" && v4["scheduler"] == "rr", "{v4:#}");
    let endpoints = v4["endpoints"].as_array().context("no endpoints")?;
    ensure!(endpoints.iter().all(|e| e["state"] == "ready"), "{v4:#}");
    ensure!(endpoints.iter().any(|e| e["target"] == "p21" && e["node"] == "n2"), "{v4:#}");
    for args in [&["show"][..], &["show", "web", "-o", "wide"]] {
        let out = c.meshlb.run(node, args)?.ok()?.stdout;
        ensure!(out.contains("default/web") && out.contains(super::VIPS[0]), "{args:?} says:\n{out}");
    }
    let out = c.meshlb.run(node, &["explain", "web"])?.ok()?.stdout;
    for text in ["10.200.0.5", "published port 30080", "10.244.2.11:8080", "as they should be"] {
        ensure!(out.contains(text), "explain does not say {text}:\n{out}");
    }
    c.meshlb.run(node, &["explain", "web", "-o", "json"])?.ok()?;
    let out = c.meshlb.run(node, &["explain", "nothing"])?;
    ensure!(out.status == 1 && out.stderr.contains("no service nothing"), "{out}");
    let plan = |extra: &[&str]| -> Result<(i32, Value)> {
        let args: Vec<&str> = ["plan", "-o", "json"].iter().chain(extra).copied().collect();
        let out = c.meshlb.run(node, &args)?;
        let value = serde_json::from_str(&out.stdout).with_context(|| format!("plan -o json: {out}"))?;
        Ok((out.status, value))
    };
    let (status, value) = plan(&[])?;
    ensure!(status == 0 && value["changes"] == json!([]), "{status}: {value:#}");
    // Another folder: changes are shown and none is made, here and by the agent.
    let other = cx.dir.join("other");
    fs::create_dir_all(&other)?;
    let before = node.snapshot()?;
    let (status, value) = plan(&[&other.to_string_lossy()])?;
    let changes = value["changes"].as_array().context("no changes")?;
    ensure!(status == 2 && changes.iter().any(|c| c["action"] == "-"), "{status}: {value:#}");
    check::same(&before, &node.snapshot()?, "plan has changed something")?;
    // A second agent is refused beside the first, and so is apply with another folder.
    let dir = c.m.dir.to_string_lossy().into_owned();
    let other = other.to_string_lossy().into_owned();
    for args in [&["apply", &other][..], &["agent", "--source", &dir]] {
        let out = c.meshlb.run(node, args)?;
        ensure!(out.status == 1 && out.stderr.contains("another meshlb"), "{args:?}: {out}");
    }
    // With the agent's own it ends when the agent has done what the folder says.
    c.write(|t, m| {
        serve_from(t, m, "web", &["p11"]);
        Ok(())
    })?;
    let out = c.meshlb.run(node, &["apply", &dir])?.ok()?;
    ensure!(out.stdout.contains("1 services, followed by"), "{out}");
    check::only(&c.t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, 3)?, "p11")?;
    ensure!((metric(node, "meshlb_in_sync")? - 1.0).abs() < 0.1, "not in sync, says {ADMIN}");
    // What drained goes within seconds.
    super::wait_until("every node is in sync", Duration::from_secs(20), || Ok(c.in_sync().is_ok()))?;
    Ok(())
}

/// The IPv4 virtual server of a service's first port, as `show` tells of it.
fn v4_server(service: &Value) -> Result<&Value> {
    let servers = service["ports"][0]["virtualServers"].as_array().context("no virtualServers")?;
    servers.iter().find(|s| s["family"] == "IPv4").context("no IPv4 server")
}

/// Connections to its endpoints.
fn counted(server: &Value) -> u64 {
    server["endpoints"].as_array().into_iter().flatten().filter_map(|e| e["connections"].as_u64()).sum()
}

/// Its last good version goes on; the log says where the mistake is; the rest of the folder is followed.
fn wrong_object(cx: &mut Cx) -> Result<()> {
    let mut c = Cluster::start(cx, &two_nodes(), |t, m| web(t, m, &["p11", "p21"]))?;
    let load = Load::start(
        &c.t.pod("p11").ns,
        &Probe { pause: Duration::from_millis(5), ..Probe::new(Proto::Tcp, vip(Family::V4, 80)?) },
        1,
    );
    let file = c.m.dir.join("web.yaml");
    let good = fs::read_to_string(&file)?;
    let draft = c.m.dir.join(".draft");
    let put = |text: &str| -> Result<()> {
        fs::write(&draft, text)?;
        Ok(fs::rename(&draft, &file)?)
    };
    put(&good.replace("\"targetPort\": 8080", "\"targetPort\": 99999"))?;
    c.agents[0].wait_for_log("targetPort", Duration::from_secs(5))?;
    put("{ this is: [ not yaml")?;
    std::thread::sleep(Duration::from_millis(1500));
    let log = c.agents[0].log_text();
    cx.note(log.lines().filter(|l| l.contains("web.yaml")).collect::<Vec<_>>().join("\n"));
    ensure!(
        log.lines().any(|l| l.contains("web.yaml:") && l.contains("spec.ports[0].targetPort")),
        "the log does not name file, line and field:\n{log}"
    );
    check::even(&c.t.ext.connect(Proto::Udp, c.t.node(2).at(Family::V6, 30080), 4)?, &["p11", "p21"])?;
    // Another object is followed meanwhile.
    fs::remove_file(c.m.dir.join("web-v6-slice.yaml"))?;
    let p11 = c.t.pod("p11");
    super::wait_until("the slice's removal is followed", Duration::from_secs(5), || {
        Ok(p11.connect(Proto::Tcp, vip(Family::V6, 80)?, 1)?.failed() == 1)
    })?;
    // A restart with the wrong file: what is in the kernel stays.
    c.kill();
    for node in &c.t.nodes {
        c.agents.push(c.meshlb.agent(node, &c.m.dir)?);
    }
    super::wait_until("the agent is back", Duration::from_secs(10), || {
        Ok(metric(c.t.node(1), "meshlb_programmed_generation").is_ok())
    })?;
    std::thread::sleep(Duration::from_millis(1500));
    // The load's connections come between these: how even they are says nothing.
    check::among(&c.t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, 4)?, &["p11", "p21"])?;
    put(&good)?;
    super::wait_until("the corrected object is followed", Duration::from_secs(5), || {
        Ok(c.agents[0].log_text().contains("no longer: "))
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let report = load.stop()?;
    cx.note(format!("{} connections, slowest {:?}", report.answered(), report.slowest));
    ensure!(report.errors.is_empty() && report.answered() > 50, "the load: {report:?}");
    check::even(&c.t.pod("p11").connect(Proto::Tcp, vip(Family::V4, 80)?, 4)?, &["p11", "p21"])?;
    c.in_sync()
}
