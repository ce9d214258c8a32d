//! What clients and operators are promised, through the API server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bed::{
    Bed, PATIENCE, condition, endpoints, granted, mesh_service, named, pods, says, service, works,
};
use crate::cases::support::{http, metric, wait_until};
use crate::check;
use crate::client::{Load, Probe};
use crate::runner::{Cx, Family, Proto};

const OTHER: &str = "other";

pub fn rows(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    bed.kube.apply(&named("v1", "Namespace", None, OTHER))?;
    one_name_in_two_namespaces(&bed).context("S29")?;
    two_published_ports_to_one_target(&bed).context("P22")?;
    conflict_is_told(&bed).context("P19")?;
    nothing_is_left(&bed).context("P25")?;
    kept_and_counted(cx, &mut bed).context("P17, S9, S31, S35")?;
    bed.end()
}

/// S29: two services of one name, in two namespaces.
fn one_name_in_two_namespaces(bed: &Bed) -> Result<()> {
    let (kube, t) = (&bed.kube, &bed.t);
    let twin = mesh_service(OTHER, "vote");
    for object in [&service(), &twin] {
        kube.apply(object)?;
    }
    endpoints(kube, t, &["p11", "p21"])?;
    pods(kube, t, OTHER, "vote", &["p12", "p32"])?;
    let (ours, others) = (granted(kube, &service())?, granted(kube, &twin)?);
    ensure!(ours.vips.iter().all(|vip| !others.vips.contains(vip)), "{ours:?}, {others:?}");
    bed.until_served(&ours, &["p11", "p21"])?;
    bed.until_served(&others, &["p12", "p32"])?;
    for (namespace, vip) in [("default", ours.vips[0]), (OTHER, others.vips[0])] {
        let name = format!("vote.{namespace}.mesh.internal");
        let command = ["dig", "+short", "+time=5", "+tries=2", "@10.200.0.2", &name, "A"];
        let got = t.pod("p11").run(&command)?.stdout;
        ensure!(got.trim() == vip.ip().to_string(), "{name}: {got}");
    }
    Ok(())
}

/// P22: two published ports lead to one target.
fn two_published_ports_to_one_target(bed: &Bed) -> Result<()> {
    let port = |name: &str, port: u16, published: u16| json!({"name": name, "port": port, "targetPort": 8080, "publish": {"port": published}});
    let mut two = mesh_service("default", "two");
    two["spec"]["ports"] = json!([port("a", 80, 31001), port("b", 81, 31002)]);
    bed.kube.apply(&two)?;
    pods(&bed.kube, &bed.t, "default", "two", &["p11", "p31"])?;
    wait_until("both published ports", PATIENCE, || {
        for number in [31001, 31002] {
            for node in &bed.t.nodes {
                let tally = bed.t.ext.connect(Proto::Tcp, node.at(Family::V4, number), 4)?;
                if check::even(&tally, &["p11", "p31"]).is_err() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    })?;
    Ok(())
}

/// P19: a number that another one has is refused by name, and its owner's clients notice nothing.
fn conflict_is_told(bed: &Bed) -> Result<()> {
    let mut late = mesh_service("default", "late");
    late["spec"]["ports"] = json!([{"port": 80, "targetPort": 8080, "publish": {"port": 31001}}]);
    bed.kube.apply(&late)?;
    pods(&bed.kube, &bed.t, "default", "late", &["p22"])?;
    let told = says(&bed.kube, &late, "Allocated", "False PublishedPortTaken")?;
    ensure!(condition(&told, "Allocated").contains("default/two"), "{:#}", told["status"]);
    std::thread::sleep(Duration::from_secs(1));
    let tally = bed.t.ext.connect(Proto::Tcp, bed.t.node(2).at(Family::V4, 31001), 8)?;
    check::even(&tally, &["p11", "p31"])?;
    // It heals by itself.
    bed.kube.delete(&mesh_service("default", "two"))?;
    says(&bed.kube, &late, "Ready", "True")?;
    wait_until("it has the number", PATIENCE, || {
        let tally = bed.t.ext.connect(Proto::Tcp, bed.t.node(2).at(Family::V4, 31001), 2)?;
        Ok(check::only(&tally, "p22").is_ok())
    })?;
    bed.kube.delete(&late)
}

/// P25: of a service that is deleted no entry is left.
fn nothing_is_left(bed: &Bed) -> Result<()> {
    let twin = mesh_service(OTHER, "vote");
    let given = granted(&bed.kube, &twin)?;
    bed.kube.delete(&twin)?;
    bed.until_refused(bed.t.pod("p12"), given.vips[0])?;
    for node in &bed.t.nodes {
        let gone = |text: &str| {
            !text.contains(&given.vips[0].ip().to_string()) && !text.contains(&format!(":{}", given.ports[0]))
        };
        wait_until("nothing names it", PATIENCE, || {
            let text = node
                .run(&["sh", "-c", "ipset save 2>/dev/null; nft list ruleset 2>/dev/null; iptables-save"])?
                .stdout;
            Ok(gone(&text))
        })?;
        let services = node.run(&["ipvsadm", "-Sn"])?.ok()?.stdout;
        ensure!(!services.contains(&format!("{}:8080", bed.t.pod("p32").v4)), "{}:\n{services}", node.name);
    }
    Ok(())
}

/// P17, S9: what was given automatically is kept when all of us are killed and started again, and a load goes on meanwhile.
/// S31, S35: what operators read of it.
fn kept_and_counted(cx: &Cx, bed: &mut Bed) -> Result<()> {
    let given = granted(&bed.kube, &service())?;
    let t = bed.t.clone();
    let now = ["p11", "p21"];
    works(&t, &given, &now)?;
    let probe = |to: SocketAddr| Probe { pause: Duration::from_millis(30), ..Probe::new(Proto::Tcp, to) };
    let loads = [
        Load::start(&t.pod("p12").ns, &probe(given.vips[0]), 1),
        Load::start(&t.ext.ns, &probe(t.node(3).at(Family::V4, given.ports[0])), 1),
    ];
    bed.controller = None;
    for k in 1..=3 {
        bed.take_agent(k)?.kill();
    }
    std::thread::sleep(Duration::from_secs(1));
    for k in 1..=3 {
        bed.start_agent(k)?;
    }
    bed.controller = Some(bed.kube.controller(&cx.dir)?);
    for k in 1..=3 {
        bed.until_ready(k)?;
    }
    // The controller writes nothing that has not changed: what it would give anew shows by a change.
    bed.kube.patch(&service(), &json!({"drain": {"timeoutSeconds": 7}}))?;
    says(&bed.kube, &service(), "Accepted", "True")?;
    let kept = granted(&bed.kube, &service())?;
    ensure!(kept == given, "{given:?} before, {kept:?} after all were started anew");
    for load in loads {
        let report = load.stop()?;
        ensure!(report.errors.is_empty() && report.answered() > 50, "{report:?}");
    }
    works(&t, &given, &now)?;
    // Counters by service and endpoint, beside ipvsadm's; how long changes took; drift.
    let node = t.node(1);
    let of = |name: &str| metric(node, &format!("{name}{{namespace=\"default\",service=\"vote\""));
    let counted = of("meshlb_service_connections_total")?;
    t.pod("p12").connect(Proto::Tcp, given.vips[0], 10)?;
    wait_until("ten connections more are counted", PATIENCE, || {
        Ok(of("meshlb_service_connections_total")? >= counted + 10.0)
    })?;
    node.run(&["ip", "route", "del", "local", "10.200.0.0/16", "dev", "lo"])?.ok()?;
    wait_until("what somebody took away is counted", PATIENCE, || {
        Ok(metric(node, "meshlb_drift_total{kind=\"route\"}").is_ok_and(|n| n >= 1.0))
    })?;
    let (_, text) = http(node, "127.0.0.1:9477", "/metrics")?;
    for series in [
        "meshlb_endpoint_connections_total{",
        "meshlb_drift_total{",
        "meshlb_source_to_kernel_seconds_bucket{",
    ] {
        ensure!(text.contains(series), "no {series}: {:?}", series_of(&text));
    }
    Ok(())
}

fn series_of(text: &str) -> Vec<&str> {
    let mut names: Vec<&str> =
        text.lines().filter_map(|l| l.split(['{', ' ']).next()).filter(|n| *n != "#").collect();
    names.dedup();
    names
}

/// S33: a range without a free number or address is a condition, and heals.
pub fn exhausted(cx: &mut Cx) -> Result<()> {
    let bed = Bed::start(cx)?;
    let kube = &bed.kube;
    // All numbers that may be published but one are taken by a range of one service.
    let mut much = mesh_service("default", "much");
    much["spec"]["ports"] = json!([{"port": 30001, "endPort": 32767, "publish": {"port": 30001}}]);
    much["spec"]["ipFamilies"] = json!(["IPv4"]);
    much["spec"]["ipFamilyPolicy"] = json!("SingleStack");
    kube.apply(&much)?;
    says(kube, &much, "Allocated", "True")?;
    let wants = |name: &str| {
        let mut object = mesh_service("default", name);
        object["spec"]["ports"] = json!([{"port": 80, "targetPort": 8080, "publish": {}}]);
        object
    };
    let (first, second) = (wants("first"), wants("second"));
    kube.apply(&first)?;
    let has = says(kube, &first, "Allocated", "True")?;
    ensure!(has["status"]["ports"][0]["publishedPort"] == 30000, "{:#}", has["status"]);
    kube.apply(&second)?;
    says(kube, &second, "Allocated", "False PublishedPortsExhausted")?;
    pods(kube, &bed.t, "default", "first", &["p11"])?;
    pods(kube, &bed.t, "default", "second", &["p21"])?;
    let open = |name: &str, port: u16| -> Result<bool> {
        let tally = bed.t.ext.connect(Proto::Tcp, bed.t.node(3).at(Family::V4, port), 2)?;
        Ok(check::only(&tally, name).is_ok())
    };
    wait_until("the first one is served", PATIENCE, || open("p11", 30000))?;
    kube.delete(&much)?;
    let healed = says(kube, &second, "Ready", "True")?;
    let port = healed["status"]["ports"][0]["publishedPort"].as_u64().and_then(|n| u16::try_from(n).ok());
    let port = port.context("no published port")?;
    wait_until("the second one is served", PATIENCE, || open("p21", port))?;
    for object in [&first, &second] {
        kube.delete(object)?;
    }
    addresses_exhausted(cx, bed)
}

/// The same of virtual IPs: a range of which five are left, for six services.
fn addresses_exhausted(cx: &Cx, mut bed: Bed) -> Result<()> {
    bed.controller = None;
    bed.controller = Some(bed.kube.controller_of(&cx.dir, "10.200.0.0/29,fd00:200::/112")?);
    let kube = &bed.kube;
    let wants = |k: usize| {
        let mut object = mesh_service("default", &format!("few{k}"));
        object["spec"]["ports"] = json!([{"port": 80, "targetPort": 8080}]);
        object["spec"]["ipFamilies"] = json!(["IPv4"]);
        object["spec"]["ipFamilyPolicy"] = json!("SingleStack");
        object
    };
    // The first two of its addresses are ours, the last one is nobody's.
    let has = |object: &Value| -> Result<Option<SocketAddr>> {
        let found = kube.get(object)?;
        let vip = found["status"]["vips"][0].as_str().map(str::parse).transpose()?;
        Ok(vip.map(|ip| SocketAddr::new(ip, 80)))
    };
    let mut served = Vec::new();
    let mut without = None;
    for k in 0..6 {
        let object = wants(k);
        kube.apply(&object)?;
        wait_until("it has an address, or is told that there is none", PATIENCE, || {
            Ok(has(&object)?.is_some() || condition(&kube.get(&object)?, "Allocated").starts_with("False"))
        })?;
        match has(&object)? {
            Some(vip) => served.push((object, vip)),
            None => {
                says(kube, &object, "Allocated", "False VIPsExhausted")?;
                pods(kube, &bed.t, "default", &format!("few{k}"), &["p21"])?;
                without = Some(object);
                break;
            }
        }
    }
    let without = without.context("none was told that there is no address")?;
    cx.note(format!("{} services have an address of a /29", served.len()));
    ensure!(served.len() >= 4, "only {} services have one", served.len());
    let (first, vip) = served.swap_remove(0);
    kube.delete(&first)?;
    says(kube, &without, "Ready", "True")?;
    ensure!(has(&without)? == Some(vip), "{:?}", has(&without)?);
    wait_until("it is served", PATIENCE, || {
        Ok(check::only(&bed.t.pod("p12").connect(Proto::Tcp, vip, 2)?, "p21").is_ok())
    })?;
    bed.end()
}

/// Bad input: garbage in a slice of somebody's, a token that nobody knows, an account without rights, nobody to ask, a broken kubeconfig. (A clock that jumps:
/// tests/cluster.)
pub fn bad(cx: &mut Cx) -> Result<()> {
    let mut bed = Bed::start(cx)?;
    let t = bed.t.clone();
    let now = ["p11", "p21"];
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, &t, &now)?;
    let given = granted(&bed.kube, &service())?;
    bed.until_served(&given, &now)?;
    // Garbage that an API server takes.
    let slice = |name: &str, type_: &str, endpoints: Value| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": type_,
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "vote"}},
            "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints,
        })
    };
    let garbage = [
        slice("names", "FQDN", json!([{"addresses": ["example.com"]}])),
        slice("own", "IPv4", json!([{"addresses": ["10.200.0.9"]}])),
        slice("unready", "IPv4", json!([{"addresses": ["10.244.9.9"], "conditions": {"ready": false}}])),
        slice("empty", "IPv6", json!([])),
    ];
    for object in &garbage {
        bed.kube.apply(object).with_context(|| format!("{object:#}"))?;
    }
    std::thread::sleep(Duration::from_secs(3));
    bed.until_served(&given, &now).context("beside garbage")?;
    bed.agent(1)?.wait_for_log("default/own", PATIENCE)?;
    bed.agent(1)?.wait_for_log("default/names", PATIENCE)?;
    says(&bed.kube, &service(), "Ready", "True EndpointSliceUnusable: ")?;
    garbage.iter().try_for_each(|object| bed.kube.delete(object))?;
    says(&bed.kube, &service(), "Ready", "True Serving: ")?;
    // Who can't read, or finds nobody, says so in one line, and leaves the kernel as it is.
    let before = t.node(3).snapshot()?;
    bed.take_agent(3)?.kill();
    let node = t.node(3);
    let good = bed.meshlb(3)?;
    let file = cx.dir.join("kubeconfig-n3");
    let text = std::fs::read_to_string(&file)?;
    let token =
        text.split_once("token: ").and_then(|(_, rest)| rest.split('}').next()).context("no token")?;
    for (what, wrong, told) in [
        ("a token that nobody knows", text.replace(token, "xyz"), "401"),
        (
            "an account without rights",
            text.replace(token, &bed.kube.token_without_rights()?),
            "may not list and watch meshservices",
        ),
        ("no API server", text.replace(":6443", ":6444"), "can't be reached"),
        ("no kubeconfig", "{apiVersion: v1, kind: Config, clusters: [".to_owned(), "kubeconfig"),
    ] {
        std::fs::write(&file, wrong)?;
        let mut agent = good.start(node, &["agent", "--source=kube"], "bad.log")?;
        let said = wait_until(what, PATIENCE, || Ok(agent.log_text().contains(told)));
        let log = agent.log_text();
        said.with_context(|| log.clone())?;
        cx.note(format!("{what}: {log}"));
        // Whoever goes on trying says it once.
        std::thread::sleep(Duration::from_secs(20));
        let again = agent.log_text().lines().filter(|l| l.contains(told)).count();
        ensure!(again <= 2, "{what}: said {again} times in 20 s:\n{}", agent.log_text());
        let _ = agent.alive();
        agent.kill();
        check::same(&before, &node.snapshot()?, what)?;
        std::fs::remove_file(node.dir.join("bad.log"))?;
    }
    // Neither a kubeconfig nor an account.
    let mut alone = good;
    alone.flags.retain(|flag| !flag.starts_with("--kubeconfig"));
    let out = alone.run(node, &["agent", "--source=kube"])?;
    ensure!(out.status == 1 && out.stderr.contains("no API server: there is neither"), "{out}");
    check::same(&before, &node.snapshot()?, "without a kubeconfig")?;
    std::fs::write(&file, text)?;
    bed.start_agent(3)?;
    bed.until_served(&given, &now).context("with the right kubeconfig again")?;
    bed.end()
}
