//! Every field of a MeshService is edited on the API server while a load runs.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bed::{Bed, Granted, PATIENCE, endpoints, granted, named, pod, pods, says, service};
use crate::cases::support::wait_until_ok;
use crate::check;
use crate::client::{Load, Probe};
use crate::machine::patience;
use crate::runner::{Cx, Family, Proto};

const ALL: [&str; 3] = ["p11", "p21", "p31"];

/// Paths of all fields below a schema, without those that only hold others.
fn leaves(schema: &Value, at: &str, out: &mut BTreeSet<String>) {
    let inner = [&schema["properties"], &schema["items"]["properties"]];
    let fields: Vec<_> = inner.iter().filter_map(|p| p.as_object()).flatten().collect();
    if fields.is_empty() {
        out.insert(at.to_owned());
    }
    for (name, field) in fields {
        leaves(field, &format!("{at}{}{name}", if at.is_empty() { "" } else { "." }), out);
    }
}

/// What has been edited, and how.
struct Edits<'a> {
    bed: &'a Bed,
    cx: &'a Cx,
    done: BTreeSet<String>,
}

impl Edits<'_> {
    /// Changes these fields by a merge patch, which the controller then has accepted.
    fn edit(&mut self, fields: &[&str], spec: &Value) -> Result<Value> {
        self.done.extend(fields.iter().map(|f| (*f).to_owned()));
        self.cx.note(format!("{fields:?}: {spec}"));
        self.bed.kube.patch(&service(), spec).with_context(|| format!("{fields:?}"))?;
        says(&self.bed.kube, &service(), "Accepted", "True").with_context(|| format!("{fields:?}"))
    }

    /// Waits until this holds.
    fn until(&self, what: &str, f: impl Fn() -> Result<()>) -> Result<()> {
        wait_until_ok(what, PATIENCE, f).map(drop)
    }

    /// Who answers a pod of the first node over TCP, `n` connections.
    fn answer(&self, to: SocketAddr, n: usize, servers: &[&str]) -> Result<()> {
        check::even(&self.bed.t.pod("p12").connect(Proto::Tcp, to, n)?, servers)
    }
}

/// The two ports under load, and a third one.
fn ports(third: &Value) -> Value {
    let ports = service()["spec"]["ports"].clone();
    let mut all = ports.as_array().cloned().unwrap_or_default();
    all.push(third.clone());
    json!({"ports": all})
}

struct Loads(Vec<(&'static str, Load)>);

impl Loads {
    fn start(bed: &Bed, given: &Granted) -> Result<Loads> {
        let t = &bed.t;
        let probe = |proto, to: SocketAddr| Probe {
            pause: Duration::from_millis(30),
            ..Probe::new(proto, to).within(Duration::from_secs(6))
        };
        let vip = *given.vips.first().context("no VIP")?;
        // On the third node, where an endpoint is all the time.
        let published = |family, i: usize| t.node(3).at(family, given.ports[i]);
        Ok(Loads(vec![
            ("TCP by VIP", Load::start(&t.pod("p12").ns, &probe(Proto::Tcp, vip), 1)),
            ("UDP by VIP", Load::start(&t.node(1).ns, &probe(Proto::Udp, vip), 1)),
            ("TCP published", Load::start(&t.ext.ns, &probe(Proto::Tcp, published(Family::V4, 0)), 1)),
            ("UDP published", Load::start(&t.ext.ns, &probe(Proto::Udp, published(Family::V4, 1)), 1)),
        ]))
    }

    /// No connection has failed but so many that were refused; a datagram on its way to an endpoint that was taken away may be lost.
    fn stop(self, cx: &Cx, may_be_refused: usize) -> Result<()> {
        for (what, load) in self.0 {
            let report = load.stop()?;
            cx.note(format!("{what}: {} answered, slowest {:?}", report.answered(), report.slowest));
            let lost =
                report.errors.iter().filter(|(_, e)| what.starts_with("UDP") && e == "timeout").count();
            let refused = |e: &str| matches!(e, "ECONNREFUSED" | "EPERM");
            let refused = report.errors.iter().filter(|(_, e)| refused(e)).count();
            ensure!(
                report.errors.len() == lost + refused
                    && refused <= may_be_refused
                    && lost <= 2
                    && report.answered() > 20,
                "{what}: {} answered, errors {:?}",
                report.answered(),
                report.errors
            );
        }
        Ok(())
    }
}

pub fn edited(cx: &mut Cx) -> Result<()> {
    let bed = Bed::start(cx)?;
    let core = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "vote-core", "namespace": "default"},
        "spec": {"clusterIP": "None", "selector": {"app": "poll"}, "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    });
    bed.kube.apply(&core)?;
    bed.kube.apply(&service())?;
    endpoints(&bed.kube, &bed.t, &ALL)?;
    let given = granted(&bed.kube, &service())?;
    bed.until_served(&given, &ALL)?;
    let mut edits = Edits { bed: &bed, cx, done: BTreeSet::new() };
    let loads = Loads::start(&bed, &given)?;
    schedulers(&mut edits, &given)?;
    // The kernel waits for all its processors in between (`synchronize_rcu` in `ip_vs_edit_service`): long where they are emulated.
    loads.stop(cx, 3 * usize::try_from(patience(Duration::from_secs(1)).as_secs())?)?;
    let loads = Loads::start(&bed, &given)?;
    under_load(&mut edits, &given)?;
    loads.stop(cx, 0)?;
    bed.until_served(&given, &ALL).context("after all edits under load")?;
    let mut done = edits.done;
    let mut edits = Edits { bed: &bed, cx, done: BTreeSet::new() };
    ending(&mut edits, &given)?;
    done.append(&mut edits.done);
    bed.kube.delete(&core)?;
    let mut all = BTreeSet::new();
    leaves(
        &meshlb::api::crd::crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"],
        "",
        &mut all,
    );
    ensure!(done == all, "not edited: {:?}; no fields: {:?}", all.difference(&done), done.difference(&all));
    bed.end()
}

/// With each other scheduler the kernel has none for a moment (docs/coexistence.md): what comes just then is refused.
fn schedulers(edits: &mut Edits, given: &Granted) -> Result<()> {
    let t = edits.bed.t.clone();
    let vip6 = *given.vips.last().context("no VIP")?;
    edits.edit(&["scheduler"], &json!({"scheduler": "wrr"}))?;
    edits.edit(&["weights"], &json!({"weights": {"vote-p11": 3}}))?;
    edits.until("three of five by weight", || {
        let tally = t.pod("p12").connect(Proto::Tcp, vip6, 10)?;
        ensure!(tally.servers.get("p11") == Some(&6), "{tally}");
        Ok(())
    })?;
    edits.edit(&["weights"], &json!({"weights": null}))?;
    edits.until("weights are gone", || edits.answer(vip6, 6, &ALL))?;
    edits
        .edit(&["scheduler", "schedulerFlags"], &json!({"scheduler": "sh", "schedulerFlags": ["sh-port"]}))?;
    edits.edit(&["scheduler", "schedulerFlags"], &json!({"scheduler": null, "schedulerFlags": null}))?;
    // By hash, answers are even by chance; and what follows must not meet the moment without a scheduler.
    edits.until("round robin again", || {
        for node in &t.nodes {
            let listed = node.run(&["ipvsadm", "-Ln"])?.ok()?.stdout;
            let by_hash = listed
                .lines()
                .any(|line| line.starts_with("FWM") && line.split_whitespace().any(|word| word == "sh"));
            ensure!(!by_hash, "{}: {listed}", node.name);
        }
        edits.answer(vip6, 6, &ALL)
    })
}

/// What takes nothing away from who uses port 80.
fn under_load(edits: &mut Edits, given: &Granted) -> Result<()> {
    let (t, kube) = (edits.bed.t.clone(), &edits.bed.kube);
    let [vip4, vip6] = given.vips[..] else { unreachable!("granted() has two") };
    edits.edit(&["drain.timeoutSeconds"], &json!({"drain": {"timeoutSeconds": 5}}))?;
    edits.edit(
        &["dns.aliases", "dns.ttlSeconds"],
        &json!({"dns": {"aliases": ["ballot"], "ttlSeconds": 7}}),
    )?;
    let name = |short: &str| format!("{short}.default.mesh.internal");
    let asked = |name: &str| -> Result<String> {
        Ok(t.pod("p11")
            .run(&["dig", "+noall", "+answer", "+time=3", "+tries=1", "@10.200.0.2", name, "A"])?
            .stdout)
    };
    edits.until("the alias", || {
        let got = asked(&name("ballot"))?;
        let words: Vec<&str> = got.split_whitespace().collect();
        ensure!(words.get(1) == Some(&"7") && words.last() == Some(&&*vip4.ip().to_string()), "{got}");
        Ok(())
    })?;
    edits.edit(&["internalTrafficPolicy"], &json!({"internalTrafficPolicy": "Local"}))?;
    edits.until("the node's own", || edits.answer(vip6, 4, &["p11"]))?;
    edits.edit(&["internalTrafficPolicy"], &json!({"internalTrafficPolicy": "Cluster"}))?;
    edits.until("all", || edits.answer(vip6, 6, &ALL))?;
    edits.edit(&["trafficDistribution"], &json!({"trafficDistribution": "PreferSameNode"}))?;
    edits.until("the nearest", || edits.answer(vip6, 4, &["p11"]))?;
    edits.edit(&["trafficDistribution"], &json!({"trafficDistribution": null}))?;
    edits.until("all", || edits.answer(vip6, 6, &ALL))?;
    edits.edit(&["externalTrafficPolicy"], &json!({"externalTrafficPolicy": "Local"}))?;
    edits.until("the client's address is kept", || {
        let tally = t.ext.connect(Proto::Tcp, t.node(3).at(Family::V6, given.ports[0]), 3)?;
        check::only(&tally, "p31")?;
        check::seen_as(&tally, &[t.ext.ip(Family::V6)])
    })?;
    edits.edit(&["externalTrafficPolicy"], &json!({"externalTrafficPolicy": "Cluster"}))?;
    // One that is not ready: never a new connection, unless that is asked for (P23).
    let unready = pod("default", t.pod("p22"), "vote");
    kube.apply(&unready)?;
    kube.pod_is(&unready, &[t.pod("p22").v4.to_string(), t.pod("p22").v6.to_string()], false)?;
    std::thread::sleep(Duration::from_secs(2));
    edits.answer(vip6, 9, &ALL).context("one is not ready")?;
    edits.edit(&["publishNotReadyAddresses"], &json!({"publishNotReadyAddresses": true}))?;
    edits.until("the one that is not ready too", || edits.answer(vip6, 8, &["p11", "p21", "p22", "p31"]))?;
    edits.edit(&["publishNotReadyAddresses"], &json!({"publishNotReadyAddresses": false}))?;
    edits.until("it is gone", || edits.answer(vip6, 6, &ALL))?;
    kube.delete(&unready)?;
    turned_unready(edits, given)?;
    third_port(edits, given)?;
    // Other pods, by another selector, and by a Service of somebody else; drained ones end what they have begun.
    let others = ["p22", "p31"];
    pods(kube, &t, "default", "poll", &others)?;
    edits.edit(&["selector"], &json!({"selector": {"app": "poll"}}))?;
    edits.until("others", || edits.answer(vip6, 4, &others))?;
    edits.edit(&["selector"], &json!({"selector": {"app": "vote"}}))?;
    edits.until("all", || edits.answer(vip6, 6, &ALL))?;
    Ok(())
}

/// One that has served under the load and is not ready any more: no new connection gets there, by the VIP or published (P23).
fn turned_unready(edits: &mut Edits, given: &Granted) -> Result<()> {
    let (t, kube) = (edits.bed.t.clone(), &edits.bed.kube);
    let vip6 = *given.vips.last().context("no VIP")?;
    let object = pod("default", t.pod("p21"), "vote");
    let ready =
        |ready| kube.pod_is(&object, &[t.pod("p21").v4.to_string(), t.pod("p21").v6.to_string()], ready);
    ready(false)?;
    let published = t.node(2).at(Family::V4, given.ports[0]);
    // Each node acts on it in its own time.
    edits.until("the one that is not ready is out", || {
        edits.answer(vip6, 4, &["p11", "p31"])?;
        check::among(&t.ext.connect(Proto::Tcp, published, 8)?, &["p11", "p31"])
    })?;
    for _ in 0..3 {
        for (from, to) in [(t.pod("p12"), vip6), (&t.ext, published)] {
            check::among(&from.connect(Proto::Tcp, to, 8)?, &["p11", "p31"])?;
        }
    }
    ready(true)?;
    edits.until("all", || edits.answer(vip6, 6, &ALL))
}

/// A port beside the two that are under load.
fn third_port(edits: &mut Edits, given: &Granted) -> Result<()> {
    let t = edits.bed.t.clone();
    let mut to = *given.vips.last().context("no VIP")?;
    to.set_port(81);
    let third = json!({"name": "third", "port": 81, "targetPort": 8081});
    edits.edit(&["ports.name", "ports.port", "ports.targetPort"], &ports(&third))?;
    edits.until("a third port", || edits.answer(to, 6, &ALL))?;
    edits.edit(&["ports.name"], &ports(&json!({"name": "drei", "port": 81, "targetPort": 8081})))?;
    edits.answer(to, 6, &ALL).context("renamed")?;
    edits.edit(&["ports.targetPort"], &ports(&json!({"name": "drei", "port": 81, "targetPort": 8080})))?;
    edits.until("another target", || {
        let tally = t.pod("p12").connect(Proto::Tcp, to, 3)?;
        ensure!(tally.answers.iter().all(|a| a.local.port() == 8080) && tally.failed() == 0, "{tally}");
        Ok(())
    })?;
    let udp = json!({"name": "drei", "port": 81, "protocol": "UDP", "targetPort": 8080});
    edits.edit(&["ports.protocol"], &ports(&udp))?;
    edits.until("UDP instead of TCP", || {
        check::even(&t.pod("p12").connect(Proto::Udp, to, 6)?, &ALL)?;
        check::refused(&t.pod("p12").connect(Proto::Tcp, to, 1)?)
    })?;
    // Published, elsewhere, at one address alone, by nodes with an endpoint alone.
    let third = |publish: Value| json!({"name": "drei", "port": 81, "targetPort": 8081, "publish": publish});
    let at = |k: u8, port: u16| t.node(k).at(Family::V4, port);
    let open = |k: u8, port: u16| check::even(&t.ext.connect(Proto::Tcp, at(k, port), 6)?, &ALL);
    let shut = |k: u8, port: u16| check::refused(&t.ext.connect(Proto::Tcp, at(k, port), 1)?);
    edits.edit(&["ports.publish.port"], &ports(&third(json!({"port": 30777}))))?;
    edits.until("it is published", || open(2, 30777))?;
    edits.edit(&["ports.publish.port"], &ports(&third(json!({"port": 30778}))))?;
    edits.until("it is published elsewhere", || open(2, 30778).and_then(|()| shut(2, 30777)))?;
    let one = json!({"port": 30778, "addresses": [t.node(1).v4.to_string()]});
    edits.edit(&["ports.publish.addresses"], &ports(&third(one)))?;
    edits.until("at one address", || open(1, 30778).and_then(|()| shut(2, 30778)))?;
    edits.edit(&["ports.publish.mode"], &ports(&third(json!({"port": 30778, "mode": "Host"}))))?;
    edits.until("each node its own", || {
        check::only(&t.ext.connect(Proto::Tcp, at(2, 30778), 2)?, "p21")?;
        check::only(&t.ext.connect(Proto::Tcp, at(3, 30778), 2)?, "p31")
    })?;
    let range = json!({"name": "range", "port": 8080, "endPort": 8081});
    edits.edit(&["ports.endPort"], &ports(&range))?;
    edits.until("a range", || {
        (8080..=8081).try_for_each(|port| edits.answer(SocketAddr::new(to.ip(), port), 6, &ALL))
    })?;
    edits.edit(&[], &json!({"ports": service()["spec"]["ports"]}))?;
    edits.until("it is gone", || check::refused(&t.pod("p12").connect(Proto::Tcp, to, 1)?))
}

/// What takes away what clients use.
fn ending(edits: &mut Edits, given: &Granted) -> Result<()> {
    let (t, kube) = (edits.bed.t.clone(), &edits.bed.kube);
    let [vip4, vip6] = given.vips[..] else { unreachable!("granted() has two") };
    let from = t.pod("p12");
    let refused = |to: SocketAddr| check::refused(&from.connect(Proto::Tcp, to, 1)?);
    // The pods of another Service.
    edits.edit(&["serviceName", "selector"], &json!({"selector": null, "serviceName": "vote-core", "ports": [{"port": 80, "targetPort": 8080, "publish": {"port": given.ports[0]}}]}))?;
    edits.until("a Service of another", || edits.answer(vip4, 4, &["p22", "p31"]))?;
    edits.until("the Service of its selector is gone", || {
        ensure!(kube.get(&named("v1", "Service", Some("default"), "vote")).is_err(), "it is there");
        Ok(())
    })?;
    edits.edit(
        &["serviceName", "selector"],
        &json!({"selector": {"app": "vote"}, "serviceName": null, "ports": service()["spec"]["ports"]}),
    )?;
    edits.bed.until_served(&granted(kube, &service())?, &ALL)?;
    // One family, and both again.
    edits.edit(
        &["ipFamilies", "ipFamilyPolicy"],
        &json!({"ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}),
    )?;
    edits.until("IPv4 alone", || edits.answer(vip4, 6, &ALL).and_then(|()| refused(vip6)))?;
    edits.edit(
        &["ipFamilies", "ipFamilyPolicy"],
        &json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}),
    )?;
    edits.bed.until_served(&granted(kube, &service())?, &ALL)?;
    // Other virtual IPs.
    let asked = ["10.200.77.7", "fd00:200::77"];
    edits.edit(&["vips"], &json!({"vips": asked}))?;
    let to = |text: &str| -> Result<SocketAddr> { Ok(SocketAddr::new(text.parse()?, 80)) };
    let [new4, new6] = [to(asked[0])?, to(asked[1])?];
    edits.until("other virtual IPs", || {
        edits.answer(new4, 6, &ALL)?;
        edits.answer(new6, 6, &ALL)?;
        refused(vip4)
    })?;
    edits.edit(&["vips"], &json!({"vips": null}))?;
    let kept = granted(kube, &service())?;
    ensure!(kept.vips == [new4, new6], "what it has is kept: {kept:?}");
    // Round robin by DNS: the VIP is free, and one is allocated again (P5).
    let dns = |answer: &str| json!({"mode": "DNSRR", "dns": {"answer": answer}});
    let ask = || -> Result<Vec<String>> {
        let name = "vote.default.mesh.internal";
        let out = from.run(&["dig", "+short", "+time=3", "+tries=1", "@10.200.0.2", name, "A"])?.stdout;
        let mut lines: Vec<String> = out.lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines)
    };
    let ips: Vec<String> = ALL.map(|p| t.pod(p).v4.to_string()).to_vec();
    let ports = json!({"ports": [{"port": 80, "targetPort": 8080}]});
    edits.edit(&[], &ports)?;
    edits.edit(&["mode", "dns.answer"], &dns("Shuffle"))?;
    edits.until("its endpoints are its addresses", || {
        let got = ask()?;
        ensure!(got == ips, "{got:?}");
        refused(new4)
    })?;
    let status = kube.get(&service())?["status"].clone();
    ensure!(status["vips"].as_array().is_none_or(Vec::is_empty), "{status:#}");
    edits.edit(&["dns.answer"], &dns("Single"))?;
    edits.until("one of them at a time", || {
        let got = ask()?;
        ensure!(got.len() == 1 && ips.contains(&got[0]), "{got:?}");
        Ok(())
    })?;
    edits.edit(&["mode"], &json!({"mode": "VIP", "dns": null, "ports": service()["spec"]["ports"]}))?;
    edits.bed.until_served(&granted(kube, &service())?, &ALL).context("a VIP again")?;
    // What is not acted upon yet is said, not ignored.
    for (fields, on, off) in [
        (
            vec!["forwarding"],
            json!({"forwarding": "Tunnel", "ports": [{"port": 8080}]}),
            json!({"forwarding": null, "ports": service()["spec"]["ports"]}),
        ),
        (vec!["sessionAffinity"], json!({"sessionAffinity": "ClientIP"}), json!({"sessionAffinity": null})),
        (vec!["sourceRanges"], json!({"sourceRanges": ["192.0.2.0/24"]}), json!({"sourceRanges": null})),
        (
            vec![
                "healthCheck.tcp",
                "healthCheck.fall",
                "healthCheck.rise",
                "healthCheck.intervalSeconds",
                "healthCheck.timeoutSeconds",
            ],
            json!({"healthCheck": {"tcp": {}}}),
            json!({"healthCheck": null}),
        ),
        (
            vec!["ports.publish.nodeSelector"],
            json!({"ports": [{"port": 80, "targetPort": 8080, "publish": {"nodeSelector": {"a": "b"}}}]}),
            json!({"ports": service()["spec"]["ports"]}),
        ),
    ] {
        edits.done.extend(fields.iter().map(|f| (*f).to_owned()));
        kube.patch(&service(), &on)?;
        let told = says(kube, &service(), "Accepted", "False NotSupportedYet")?;
        let field = fields[0].rsplit('.').next().unwrap_or_default().replace("tcp", "healthCheck");
        ensure!(super::bed::condition(&told, "Accepted").contains(&field), "{:#}", told["status"]);
        edits.edit(&[], &off)?;
    }
    edits.bed.until_served(&granted(kube, &service())?, &ALL).context("served again").map(drop)
}
