//! Network plugins on the nodes: rule sets of those that leave packets to netfilter, loaded; those that don't, refused by name.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guard::{BOTH, VIPS, works};
use super::support::{one_line, one_node, web};
use crate::check;
use crate::ns::COMMAND_LIMIT;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::topology::{Builder, Node, PodNetwork, Topology, Underlay};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(300);
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        suite.add_slow("cni::flannel_rules", &one, limit, flannel);
        suite.add_slow("cni::calico_rules", &one, limit, calico);
    }
    suite.add("cni::refused_by_name", &Matrix::once(), refused_by_name);
}

fn load(cx: &Cx, node: &Node, rules: &str, replace: &[(&str, String)]) -> Result<()> {
    let mut lines = String::new();
    for line in rules.lines().filter(|line| !line.starts_with('#')) {
        match line.strip_prefix("POD ") {
            Some(each) => {
                for j in 1..=2 {
                    lines += &each.replace("LINK", &format!("v{}{j}", node.index));
                    lines.push('\n');
                }
            }
            None => {
                lines += line;
                lines.push('\n');
            }
        }
    }
    for (from, to) in replace {
        lines = lines.replace(from, to);
    }
    // By the flavour of iptables that the case is about.
    let path = [("PATH", cx.meshlb()?.path.as_str())];
    node.ns.run_env(&["iptables-restore", "--noflush"], &path, &lines)?.ok()?;
    Ok(())
}

/// A service works beside what is loaded, before and after us; taking ours out leaves it as it was.
fn beside(cx: &Cx, spec: &Builder, load: impl Fn(&Node) -> Result<()>) -> Result<()> {
    // The rules are left on these nodes.
    let t = cx.fresh_topology(spec)?;
    t.nodes.iter().try_for_each(&load)?;
    let before = t.snapshots()?;
    let mut m = cx.manifests()?;
    m.standard(&t, "vote", &VIPS)?;
    cx.apply(&t, &mut m)?;
    works(&t, &BOTH).context("beside the plugin's rules")?;
    cx.cleanup(&t)?;
    for (node, before) in t.nodes.iter().zip(&before) {
        check::foreign_unchanged(before, &node.snapshot()?).context(node.name.clone())?;
    }
    cx.taint();
    Ok(())
}

fn flannel(cx: &mut Cx) -> Result<()> {
    let spec = Topology::builder()
        .pod_network(PodNetwork::Bridge { br_netfilter: true })
        .underlay(Underlay::Vxlan)
        .rp_filter(1);
    beside(cx, &spec, |node| {
        let own = ("OWN", format!("10.244.{}.0/24", node.index));
        load(cx, node, include_str!("../rulesets/flannel.rules"), &[own, ("ALL", "10.244.0.0/16".to_owned())])
    })
}

fn calico(cx: &mut Cx) -> Result<()> {
    let spec = Topology::builder().underlay(Underlay::Ipip).rp_filter(1);
    beside(cx, &spec, |node| {
        let sets = "create cali40all-ipam-pools hash:net\nadd cali40all-ipam-pools 10.244.0.0/16\n\
                    create cali40masq-ipam-pools hash:net\nadd cali40masq-ipam-pools 10.244.0.0/16\n";
        node.ns.run_with(&["ipset", "restore"], sets, COMMAND_LIMIT)?.ok()?;
        load(cx, node, include_str!("../rulesets/calico.rules"), &[])
    })
}

/// Nothing is programmed beside those whose packets don't come by netfilter or who take our IPVS services away.
fn refused_by_name(cx: &mut Cx) -> Result<()> {
    let meshlb = cx.meshlb()?.clone();
    let t = cx.topology(&one_node())?;
    let n1 = t.node(1);
    let mut m = cx.manifests()?;
    web(&t, &mut m, &["p11"])?;
    m.write()?;
    let dir = m.dir.to_string_lossy().into_owned();
    let before = n1.snapshot()?;
    for (link, who) in [
        ("kube-dummy-if", "kube-router's service proxy"),
        ("cilium_host", "Cilium"),
        ("bpfin.cali", "Calico's eBPF"),
    ] {
        n1.ip_batch(&format!("link add {link} type dummy"))?;
        for command in [&["apply", &dir][..], &["agent", "--source", &dir]] {
            let out = meshlb.run(n1, command)?;
            ensure!(out.status == 1, "{link}: {out}");
            one_line(&out, &[who, link, "does not work beside it"])?;
        }
        // What is left of an earlier time can be taken out all the same.
        meshlb.run(n1, &["cleanup"])?.ok().context("cleanup beside it")?;
        n1.ip_batch(&format!("link del {link}"))?;
        check::same(&before, &n1.snapshot()?, &format!("it was programmed beside {link}"))?;
    }
    cx.apply_on(n1, &m)?;
    check::only(&t.ext.connect(Proto::Tcp, n1.at(Family::V4, 30080), 2)?, "p11")?;
    cx.cleanup(&t)
}
