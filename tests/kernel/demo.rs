//! `make demo`: what meshlb does, told in the order in which a person would try it, with real commands and their output.
//!
//! Every expectation is a line with ✓ or ✗; the program's status says whether all were met.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::check;
use crate::client::{Load, LoadReport, Probe};
use crate::ns::{self, Netns};
use crate::program::{self, Agent};
use crate::runner::{self, Family, Proto, Renderer};
use crate::topology::{Host, Node, Topology};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 5);
const VIP6: &str = "fd00:200::5";
/// The pods of the service as they become its endpoints.
const ENDPOINTS: [(&str, &str); 5] =
    [("vote-a", "p11"), ("vote-b", "p21"), ("vote-c", "p31"), ("vote-d", "p12"), ("vote-e", "p22")];
/// The pods listen on both.
const TARGETS: [u16; 2] = [8080, 8081];
/// On an emulated machine that has other things to do as well, an agent's first turn has taken 18 s.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs it.
pub fn main() -> ExitCode {
    if std::env::var_os("MESHLB_KERNEL").is_none_or(|v| v != "1") || !nix::unistd::geteuid().is_root() {
        println!("demo: needs root and a kernel with IPVS, or a VM: make demo sees to it");
        return ExitCode::FAILURE;
    }
    let dir = std::env::temp_dir().join("meshlb-demo");
    let mut story =
        Story { began: Instant::now(), title: String::new(), steps: Vec::new(), path: String::new(), dir };
    if let Err(error) = story.tell() {
        story.expect(false, &format!("the demo ended early: {error:#}"));
        story.logs();
    }
    ns::remove_leftovers();
    let _ = fs::remove_dir_all(&story.dir);
    story.summary()
}

/// What is told, and how it goes.
struct Story {
    began: Instant,
    title: String,
    /// Each step with what was expected and whether it came so.
    steps: Vec<(String, Vec<(bool, String)>)>,
    path: String,
    dir: PathBuf,
}

/// What the folder says.
#[derive(Clone)]
struct Vote {
    endpoints: Vec<usize>,
    weights: &'static str,
    target: u16,
    published: u16,
}

impl Vote {
    fn service(&self) -> String {
        let mut text = format!(
            "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata:\n  name: vote\n  namespace: default\nspec:\n  \
             vips: [{VIP}, \"{VIP6}\"]\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  scheduler: wrr\n"
        );
        if !self.weights.is_empty() {
            let _ = writeln!(text, "  weights: {{{}}}", self.weights);
        }
        let _ = write!(
            text,
            "  ports:\n  - name: http\n    port: 80\n    targetPort: {}\n    publish: {{mode: Ingress, port: {}}}\n",
            self.target, self.published
        );
        text
    }

    fn slice(&self, t: &Topology, family: Family) -> String {
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: vote-{family}\n  namespace: default\n  \
             labels: {{kubernetes.io/service-name: vote}}\naddressType: {}\nports:\n- {{name: http, port: {}}}\nendpoints:\n",
            family.address_type(),
            self.target
        );
        for (name, pod) in self.named() {
            let pod = t.pod(pod);
            let _ = writeln!(
                text,
                "- {{addresses: [\"{}\"], nodeName: n{}, targetRef: {{kind: Pod, name: {name}}}, conditions: {{ready: true}}}}",
                pod.ip(family),
                pod.node
            );
        }
        text
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.endpoints.iter().filter_map(|&i| ENDPOINTS.get(i).copied())
    }

    fn weight(&self, name: &str) -> u32 {
        let found = self.weights.split(", ").find_map(|w| w.strip_prefix(name)?.strip_prefix(": "));
        found.and_then(|w| w.parse().ok()).unwrap_or(1)
    }

    /// How often each is to answer in so many rounds.
    fn share(&self, rounds: u32) -> BTreeMap<String, u32> {
        self.named().map(|(name, _)| (name.to_owned(), self.weight(name) * rounds)).collect()
    }

    fn total(&self) -> u32 {
        self.share(1).values().sum()
    }

    /// The IPVS destinations of IPv4, as ipvsadm writes them.
    fn destinations(&self, t: &Topology) -> BTreeMap<String, u32> {
        let written = |pod: &str| format!("{}:{}", t.pod(pod).v4, self.target);
        self.named().map(|(name, pod)| (written(pod), self.weight(name))).collect()
    }
}

/// The IPVS destinations of IPv4 that get new connections. (Read by netlink: `/proc/net/ip_vs` leaves services out when it
/// is read in parts and other namespaces have some too.)
fn destinations(node: &Node) -> Result<BTreeMap<String, u32>> {
    let mut out = BTreeMap::new();
    for line in node.run(&["ipvsadm", "-Ln"])?.ok()?.stdout.lines().skip(3) {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["->", address, _, weight, ..] = words.as_slice()
            && !address.starts_with('[')
            && *weight != "0"
        {
            out.insert((*address).to_owned(), weight.parse()?);
        }
    }
    Ok(out)
}

impl Story {
    fn services(&self) -> PathBuf {
        self.dir.join("services")
    }

    fn step(&mut self, title: &str) {
        let n = self.steps.len() + 1;
        self.title = title.to_owned();
        println!("\n━━━ {n}. {title} {}\n", "━".repeat(96_usize.saturating_sub(title.chars().count())));
        self.steps.push((title.to_owned(), Vec::new()));
    }

    fn expect(&mut self, ok: bool, text: &str) {
        println!("  {} {text}", if ok { "✓" } else { "✗" });
        let _ = std::io::stdout().flush();
        if self.steps.is_empty() {
            self.steps.push(("set-up".to_owned(), Vec::new()));
        }
        if let Some((_, expected)) = self.steps.last_mut() {
            expected.push((ok, text.to_owned()));
        }
    }

    fn say(&self, text: &str) {
        println!("  {text}");
        let _ = std::io::stdout().flush();
    }

    /// Runs a line of shell somewhere and shows it with what it says.
    fn run(&self, host: &Host, line: &str) -> Result<ns::Output> {
        let config = self.config(&host.name).to_string_lossy().into_owned();
        let env = [("PATH", self.path.as_str()), ("MESHLB_CONFIG", config.as_str())];
        let env = if host.name.starts_with('n') { &env[..] } else { &env[..1] };
        println!("{}$ {line}", host.name);
        let out = host.ns.run_env(&["sh", "-c", line], env, "")?;
        for line in out.stdout.lines().chain(out.stderr.lines()) {
            println!("    {}", line.trim_end());
        }
        let _ = std::io::stdout().flush();
        Ok(out)
    }

    fn config(&self, node: &str) -> PathBuf {
        self.dir.join(format!("{node}.yaml"))
    }

    /// Requests by the real curl, counted by who answered.
    fn curl(&self, host: &Host, at: &str, n: u32) -> Result<(BTreeMap<String, u32>, String)> {
        let counted = if n > 9 { " | sort | uniq -c" } else { "" };
        let out = self.run(host, &format!("curl -sS 'http://{at}/?[1-{n}]'{counted}"))?;
        let mut counts = BTreeMap::new();
        for line in out.stdout.lines() {
            let (times, line) = if counted.is_empty() {
                (1, line)
            } else {
                let (times, line) = line.trim().split_once(' ').context("uniq -c")?;
                (times.parse()?, line)
            };
            let server = line.split(' ').next().unwrap_or_default();
            *counts.entry(server.to_owned()).or_default() += times;
        }
        Ok((counts, out.stdout))
    }

    fn expect_share(&mut self, counts: &BTreeMap<String, u32>, want: &BTreeMap<String, u32>, what: &str) {
        let list = |m: &BTreeMap<String, u32>| {
            m.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
        };
        let ok = counts == want;
        let but = if ok { String::new() } else { format!(" (expected: {})", list(want)) };
        self.expect(ok, &format!("{what}: {}{but}", list(counts)));
    }

    /// Rewrites the folder, shows what is different, and waits until every node has it.
    fn edit(&mut self, t: &Topology, before: Option<&Vote>, now: &Vote) -> Result<()> {
        let texts = |v: &Vote| {
            [
                ("vote.yaml", v.service()),
                ("vote-endpoints.yaml", v.slice(t, Family::V4) + "---\n" + &v.slice(t, Family::V6)),
            ]
        };
        let old = before.map(texts);
        for (i, (file, text)) in texts(now).into_iter().enumerate() {
            let was = old.as_ref().and_then(|o| o.get(i)).map(|(_, text)| text.as_str());
            match was {
                Some(was) if was == text => continue,
                Some(was) => show_edit(file, was, &text),
                None => {}
            }
            let draft = self.services().join(".draft");
            fs::write(&draft, &text)?;
            fs::rename(&draft, self.services().join(file))?;
        }
        let Some(before) = before else { return Ok(()) };
        let began = Instant::now();
        self.wait(t, now)?;
        if before.published != now.published {
            for node in &t.nodes {
                until(PATIENCE, || {
                    let probe = http(SocketAddr::new(node.v4.into(), now.published));
                    Ok(probe.run(&t.ext.ns)?.answered() == 1)
                })?;
            }
        }
        self.expect(true, &format!("in force on all nodes within {:.1} s", began.elapsed().as_secs_f32()));
        Ok(())
    }

    fn wait(&self, t: &Topology, vote: &Vote) -> Result<()> {
        let want = vote.destinations(t);
        for node in &t.nodes {
            let mut last = BTreeMap::new();
            until(PATIENCE, || {
                last = destinations(node)?;
                Ok(last == want)
            })
            .with_context(|| format!("{} has {last:?}, not {want:?}", node.name))?;
        }
        Ok(())
    }

    fn agent(&self, node: &Node) -> Result<Agent> {
        let line = format!("exec meshlb agent --source {}", self.services().display());
        println!("{}$ {} &", node.name, line.trim_start_matches("exec "));
        let config = self.config(&node.name).to_string_lossy().into_owned();
        let env = [("PATH", self.path.as_str()), ("MESHLB_CONFIG", config.as_str()), ("NO_COLOR", "1")];
        Agent::spawn(&node.ns, &["sh", "-c", &line], &env, self.dir.join(format!("{}.log", node.name)))
    }

    fn count(&mut self, report: &LoadReport, what: &str) {
        let ok = report.errors.is_empty() && report.answered() > 50;
        self.expect(
            ok,
            &format!(
                "{what}: {} connections, {} errors (slowest {} ms)",
                report.answered(),
                report.errors.len(),
                report.slowest.as_millis()
            ),
        );
        for (at, error) in report.errors.iter().take(5) {
            self.say(&format!("    after {:.2} s: {error}", at.as_secs_f32()));
        }
    }

    fn tell(&mut self) -> Result<()> {
        runner::load_modules()?;
        ns::remove_leftovers();
        let _ = fs::remove_dir_all(&self.dir);
        fs::create_dir_all(self.services())?;
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin)?;
        symlink(program::binary(), bin.join("meshlb"))?;
        self.path =
            format!("{}:{}", bin.display(), program::flavoured_path(&self.dir, Renderer::IptablesNft)?);
        println!("meshlb: a demonstration in network namespaces, kernel {}", kernel());
        println!("
  Nodes n1 to n4 (192.168.50.1 to .4), pods pKJ on node K (10.244.K.1J), a client ext outside (192.168.50.100): each is
  a namespace, and the name before the $ says in which one a command runs. The pods speak HTTP on 8080 and 8081.");
        let t = Topology::builder().nodes(4).ports(&[]).host_ports(&[]).build(&self.dir.join("nodes"))?;
        for (name, pod) in ENDPOINTS {
            let pod = t.pod(pod);
            for target in TARGETS {
                serve(&pod.ns, &format!("{name} on n{}, port {target}", pod.node), target)?;
            }
        }
        for node in &t.nodes {
            let config = format!(
                "node: {}\nnode-ip: [{}, \"{}\"]\nvip-cidr: [10.200.0.0/16, \"fd00:200::/112\"]\nrenderer: iptables-nft\nstate-dir: {dir}/state\nrun-dir: {dir}/run\n",
                node.name,
                node.v4,
                node.v6,
                dir = self.dir.join(&node.name).display(),
            );
            fs::create_dir_all(self.dir.join(&node.name))?;
            fs::write(self.config(&node.name), config)?;
        }

        let mut vote = Vote { endpoints: vec![0, 1, 2], weights: "", target: 8080, published: 30080 };
        let mut agents = self.apply(&t, &vote)?;
        self.vip(&t, &vote)?;
        self.published(&t, &vote)?;
        let load = Load::start(&t.pod("p41").ns, &http(SocketAddr::new(VIP.into(), 80)), 3);
        self.changes(&t, &mut vote)?;
        self.removal(&t, &mut vote)?;
        self.count(&load.stop()?, "the load of steps 4 and 5, from its start to its end");
        self.look(&t, &vote)?;
        self.kill(&t, &vote, &mut agents)?;
        self.cleanup(&t, agents)
    }

    fn apply(&mut self, t: &Topology, vote: &Vote) -> Result<Vec<Agent>> {
        self.step("A service `vote` with three endpoints on three nodes");
        self.edit(t, None, vote)?;
        let n1 = t.node(1);
        let dir = self.services().display().to_string();
        self.run(n1, &format!("cat {dir}/vote.yaml"))?;
        self.run(n1, &format!("grep -h addresses {dir}/vote-endpoints.yaml"))?;
        let checked = self.run(n1, &format!("meshlb check {dir}"))?;
        self.expect(checked.status == 0, "the manifests are valid");
        self.say("Every node has a file with its settings, and MESHLB_CONFIG names it:");
        self.run(n1, "cat $MESHLB_CONFIG")?;
        let began = Instant::now();
        let agents = t.nodes.iter().map(|n| self.agent(n)).collect::<Result<Vec<_>>>()?;
        self.wait(t, vote)?;
        self.expect(
            true,
            &format!("in force on all nodes {:.1} s after the agents' start", began.elapsed().as_secs_f32()),
        );
        until(PATIENCE, || Ok(n1.run(&["curl", "-sf", "http://127.0.0.1:9477/readyz"])?.status == 0))
            .context("/readyz")?;
        let ready = self.run(n1, "curl -sS -w ' (%{http_code})\\n' http://127.0.0.1:9477/readyz")?;
        self.expect(ready.stdout.contains("200"), "the agent says it is ready");
        Ok(agents)
    }

    fn vip(&mut self, t: &Topology, vote: &Vote) -> Result<()> {
        self.step("The virtual address from a pod");
        let pod = t.pod("p41");
        let (counts, text) = self.curl(pod, &VIP.to_string(), 9)?;
        self.expect_share(&counts, &vote.share(3), "nine requests are spread evenly");
        self.expect(
            text.lines().all(|l| l.ends_with(&format!(" {}", pod.v4))),
            "the endpoints see the client's own address",
        );
        let (counts, _) = self.curl(pod, &format!("[{VIP6}]"), 9)?;
        self.expect_share(&counts, &vote.share(3), "and over IPv6");
        let refused = self.run(pod, &format!("curl -sS http://{VIP}:81/"))?;
        self.expect(
            refused.status == 7 && refused.took < Duration::from_secs(2),
            "a port that the service has not is refused at once",
        );
        Ok(())
    }

    fn published(&mut self, t: &Topology, vote: &Vote) -> Result<()> {
        self.step("The published port on a node without an endpoint");
        let n4 = t.node(4);
        let (counts, text) = self.curl(&t.ext, &format!("{}:{}", n4.v4, vote.published), 6)?;
        self.expect_share(&counts, &vote.share(2), "n4 has no endpoint, and its port leads to all three");
        self.expect(
            text.lines().all(|l| l.ends_with(&format!(" {}", n4.v4))),
            "the answers come back by n4: the endpoints see its address",
        );
        Ok(())
    }

    fn changes(&mut self, t: &Topology, vote: &mut Vote) -> Result<()> {
        self.step("Scaling, weights and ports, edited under load");
        self.say("p41 opens connections to the VIP all the time, with three threads, and every error counts. The curls below");
        self.say("go through n3 and n2, which the load does not use: their numbers are exact.");
        let p32 = t.pod("p32");
        println!("\n  Scaled to five:");
        let before = vote.clone();
        vote.endpoints = vec![0, 1, 2, 3, 4];
        self.edit(t, Some(&before), vote)?;
        let (counts, _) = self.curl(p32, &VIP.to_string(), 10)?;
        self.expect_share(&counts, &vote.share(2), "five endpoints, evenly");

        println!("\n  Three times the weight for vote-a:");
        let before = vote.clone();
        vote.weights = "vote-a: 3";
        self.edit(t, Some(&before), vote)?;
        let (counts, _) = self.curl(p32, &VIP.to_string(), vote.total() * 2)?;
        self.expect_share(&counts, &vote.share(2), "three to one");

        println!("\n  Other ports, of the pods and published:");
        let before = vote.clone();
        (vote.target, vote.published) = (8081, 30090);
        self.edit(t, Some(&before), vote)?;
        let (counts, text) = self.curl(p32, &VIP.to_string(), vote.total() * 2)?;
        self.expect_share(&counts, &vote.share(2), "the VIP's port leads to the new port of the pods");
        self.expect(text.lines().all(|l| l.contains("port 8081")), "all of them answer on 8081");
        let n2 = t.node(2).v4;
        let out = self.run(&t.ext, &format!("curl -sS http://{n2}:{}/", vote.published))?;
        self.expect(out.status == 0 && out.stdout.contains("port 8081"), "30090 is published");
        let out = self.run(&t.ext, &format!("curl -sS http://{n2}:{}/", before.published))?;
        self.expect(out.status == 7, "30080 is no longer");
        Ok(())
    }

    fn removal(&mut self, t: &Topology, vote: &mut Vote) -> Result<()> {
        self.step("An endpoint is taken away, still under load");
        let before = vote.clone();
        vote.endpoints.retain(|&i| i != 1);
        self.edit(t, Some(&before), vote)?;
        let (counts, _) = self.curl(t.pod("p32"), &VIP.to_string(), vote.total() * 2)?;
        self.expect_share(&counts, &vote.share(2), "vote-b gets no new connections");
        Ok(())
    }

    fn look(&mut self, t: &Topology, vote: &Vote) -> Result<()> {
        self.step("What is there: show, explain, ipvsadm, our chains");
        let n4 = t.node(4);
        let out = self.run(n4, "meshlb show")?;
        self.expect(
            out.status == 0 && out.stdout.contains("vote") && out.stdout.trim_end().ends_with("ok"),
            "show: ok",
        );
        let out = self.run(n4, "meshlb show vote")?;
        let (a, b) = (out.stdout.contains("vote-a"), out.stdout.contains("vote-b"));
        self.expect(a && !b, "vote-b, without a connection that it would still be needed for, is not there");
        let out = self.run(n4, "meshlb explain vote")?;
        self.expect(out.status == 0, "explain: every hop is as it should be");
        let out = self.run(n4, "ipvsadm -Ln")?;
        let here = |pod: &str| out.stdout.contains(&format!("{}:{}", t.pod(pod).v4, vote.target));
        self.expect(out.status == 0 && vote.named().all(|(_, pod)| here(pod)), "IPVS has the endpoints");
        let out = self.run(n4, "iptables-save | grep -i meshlb")?;
        self.expect(out.status == 0, "our chains, and the jumps to them");
        let out = self.run(n4, "ipset list -n")?;
        self.expect(out.stdout.to_ascii_lowercase().contains("meshlb"), "our sets");
        Ok(())
    }

    fn kill(&mut self, t: &Topology, vote: &Vote, agents: &mut Vec<Agent>) -> Result<()> {
        self.step("kill -9 of an agent under load");
        let n4 = t.node(4);
        let load = Load::start(&t.pod("p41").ns, &http(SocketAddr::new(VIP.into(), 80)), 3);
        thread::sleep(Duration::from_secs(1));
        let mut agent = agents.pop().context("no agent")?;
        self.run(n4, &format!("kill -9 {}", agent.pid()))?;
        until(PATIENCE, || Ok(!agent.alive())).context("the agent goes on")?;
        self.expect(true, "the agent of n4, which the load goes through, is gone");
        thread::sleep(Duration::from_secs(2));
        let out = self.run(&t.ext, &format!("curl -sS http://{}:{}/", n4.v4, vote.published))?;
        self.expect(out.status == 0, "n4 balances without it");
        let agent = self.agent(n4)?;
        agents.push(agent);
        until(PATIENCE, || Ok(n4.run(&["curl", "-sf", "http://127.0.0.1:9477/readyz"])?.status == 0))
            .context("/readyz")?;
        let out = self.run(n4, "meshlb plan")?;
        self.expect(out.status == 0, "a new agent finds everything as it should be");
        thread::sleep(Duration::from_millis(500));
        self.count(&load.stop()?, "the load, over the kill and the new start");
        Ok(())
    }

    fn cleanup(&mut self, t: &Topology, agents: Vec<Agent>) -> Result<()> {
        self.step("cleanup, and nothing is left");
        for (node, agent) in t.nodes.iter().zip(agents) {
            println!("{}$ kill {}", node.name, agent.pid());
            let status = agent.terminate(Duration::from_secs(15))?;
            if status != 0 {
                self.expect(false, &format!("the agent of {} ends with {status}", node.name));
            }
        }
        for node in &t.nodes {
            let out = self.run(node, "meshlb cleanup")?;
            if out.status != 0 {
                self.expect(false, &format!("cleanup on {}", node.name));
            }
        }
        let n4 = t.node(4);
        let mut empty = true;
        empty &= self.run(n4, "ipvsadm -Ln | grep -- FWM")?.stdout.is_empty();
        empty &= self
            .run(n4, "iptables-save | grep -i meshlb; ip6tables-save | grep -i meshlb")?
            .stdout
            .is_empty();
        empty &= self.run(n4, "ipset list -n; nft list tables | grep -i meshlb")?.stdout.is_empty();
        empty &=
            self.run(n4, "ip route show table all | grep -E '10\\.200\\.|fd00:200::'")?.stdout.is_empty();
        self.expect(empty, "no IPVS service, chain, rule, set, table or route");
        let left: Vec<String> = t
            .nodes
            .iter()
            .filter_map(|n| fs::read_dir(self.dir.join(&n.name).join("state")).ok())
            .flat_map(|d| d.flatten().map(|f| f.file_name().to_string_lossy().into_owned()))
            .filter(|f| f.ends_with(".json"))
            .collect();
        self.expect(
            left.is_empty(),
            &format!("no state is kept{}", left.iter().map(|f| format!(", but {f}")).collect::<String>()),
        );
        let same = check::nothing_left(t);
        self.expect(
            same.is_ok(),
            "all four nodes: rules, sets, IPVS, addresses, routes and sysctls are word for word as before the first command",
        );
        if let Err(e) = same {
            self.say(&format!("{e:#}"));
        }
        let out = self.run(t.pod("p41"), &format!("curl -sS --max-time 3 http://{VIP}/"))?;
        self.expect(out.status != 0, "the virtual address is gone");
        Ok(())
    }

    /// The ends of the agents' logs.
    fn logs(&self) {
        for k in 1..=4 {
            let log = fs::read_to_string(self.dir.join(format!("n{k}.log"))).unwrap_or_default();
            let skip = log.lines().count().saturating_sub(30);
            for line in log.lines().skip(skip) {
                println!("  n{k}: {line}");
            }
        }
    }

    fn summary(&self) -> ExitCode {
        let (mut good, mut bad) = (0, 0);
        println!("\n━━━ Summary {}\n", "━".repeat(91));
        for (n, (title, expected)) in (1..).zip(&self.steps) {
            let missed: Vec<_> = expected.iter().filter(|(ok, _)| !ok).collect();
            (good, bad) = (good + expected.len() - missed.len(), bad + missed.len());
            println!(
                "  {} {n}. {title}: {} of {}",
                if missed.is_empty() { "✓" } else { "✗" },
                expected.len() - missed.len(),
                expected.len()
            );
            for (_, text) in missed {
                println!("       ✗ {text}");
            }
        }
        println!(
            "\ndemo: {good} as they should be, {bad} not, in {:.0} s",
            self.began.elapsed().as_secs_f32()
        );
        if bad == 0 && self.steps.len() >= 8 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn show_edit(file: &str, was: &str, now: &str) {
    println!("  {file}:");
    for line in was.lines().filter(|l| !now.lines().any(|x| x == *l)) {
        println!("    - {}", line.trim_start_matches("- "));
    }
    for line in now.lines().filter(|l| !was.lines().any(|x| x == *l)) {
        println!("    + {}", line.trim_start_matches("- "));
    }
}

fn until(limit: Duration, mut f: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    while !f()? {
        if Instant::now() > end {
            bail!("not so after {limit:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A request by HTTP/1.0, as one of the harness's probes.
fn http(to: SocketAddr) -> Probe {
    Probe {
        request: Some("GET / HTTP/1.0\r\n\r\n"),
        pause: Duration::from_millis(5),
        ..Probe::new(Proto::Tcp, to)
    }
}

/// Serves HTTP in a pod until this process ends.
fn serve(ns: &Netns, name: &str, port: u16) -> Result<()> {
    for ip in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let to = SocketAddr::new(ip, port);
        let socket = ns.enter(|| {
            let socket = crate::server::socket(Proto::Tcp, ip)?;
            if ip.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.set_reuse_address(true)?;
            socket.bind(&to.into())?;
            socket.listen(1024)?;
            Ok(socket)
        })?;
        let (listener, name) = (TcpListener::from(socket), name.to_owned());
        thread::Builder::new().name(format!("http {name}")).spawn(move || {
            for stream in listener.incoming().flatten() {
                let name = name.clone();
                let _ = thread::Builder::new().spawn(move || answer(stream, &name));
            }
        })?;
    }
    Ok(())
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let peer = stream.peer_addr()?.ip();
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => request.extend_from_slice(buffer.get(..n).unwrap_or_default()),
        }
    }
    let body = format!("{name}: hello {peer}\n");
    let head =
        format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes())
}
