//! Network plugins on the nodes: what those that leave packets to netfilter have written, loaded; those that don't, refused by name.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guard::{BOTH, VIPS, works};
use super::support::{one_line, one_node, web};
use crate::check;
use crate::ns::COMMAND_LIMIT;
use crate::runner::{Cx, Family, Matrix, Proto, Renderer, Suite};
use crate::topology::{Builder, Node, PodNetwork, Topology, Underlay};

/// What a plugin has programmed on node 1 of the usual topology, recorded by `rulesets/record.sh`.
struct Recorded {
    /// As `iptables-save` and `ip6tables-save` have written it.
    xtables: [&'static str; 2],
    /// As `ipset save` has.
    sets: &'static str,
    /// As `nft list ruleset` has, in its nftables mode.
    nft: &'static str,
}

const FLANNEL: Recorded = Recorded {
    xtables: [include_str!("../rulesets/flannel.iptables"), include_str!("../rulesets/flannel.ip6tables")],
    sets: "",
    nft: include_str!("../rulesets/flannel.nft"),
};

const CALICO: Recorded = Recorded {
    xtables: [include_str!("../rulesets/calico.iptables"), include_str!("../rulesets/calico.ip6tables")],
    sets: include_str!("../rulesets/calico.ipset"),
    nft: include_str!("../rulesets/calico.nft"),
};

pub fn register(suite: &mut Suite) {
    let limit = Duration::from_secs(300);
    for renderer in Renderer::ALL {
        let one = Matrix::once().with_renderers(&[renderer]);
        suite.add_slow("cni::flannel_rules", &one, limit, |cx| flannel(cx, Recorded::load_xtables));
        suite.add_slow("cni::flannel_nftables", &one, limit, |cx| flannel(cx, Recorded::load_nft));
        suite.add_slow("cni::calico_rules", &one, limit, |cx| calico(cx, Recorded::load_xtables));
        suite.add_slow("cni::calico_nftables", &one, limit, |cx| calico(cx, Recorded::load_nft));
    }
    suite.add("cni::refused_by_name", &Matrix::once(), refused_by_name);
}

impl Recorded {
    /// By the flavour of iptables that the case is about.
    fn load_xtables(&self, cx: &Cx, node: &Node) -> Result<()> {
        node.ns.run_with(&["ipset", "restore"], &of(node, self.sets), COMMAND_LIMIT)?.ok()?;
        let path = [("PATH", cx.meshlb()?.path.as_str())];
        for (family, rules) in Family::ALL.into_iter().zip(self.xtables) {
            let command = [family.iptables_restore(), "--noflush"];
            node.ns.run_env(&command, &path, &of(node, rules))?.ok()?;
        }
        Ok(())
    }

    fn load_nft(&self, _: &Cx, node: &Node) -> Result<()> {
        node.ns.run_with(&["nft", "-f", "-"], &of(node, self.nft), COMMAND_LIMIT)?.ok()?;
        Ok(())
    }
}

/// What is of node 1 (its pods' links, their addresses and its tunnel's), made another node's. Its own addresses are only in a set
/// of Calico's that tells whose DSCP is set, which is nobody's.
fn of(node: &Node, recorded: &str) -> String {
    let k = node.index;
    let mut text = recorded.to_owned();
    for (one, own) in [
        ("v11", format!("v{k}1")),
        ("v12", format!("v{k}2")),
        ("10.244.1.", format!("10.244.{k}.")),
        ("fd00:244:1:", format!("fd00:244:{k}:")),
        // Calico's tunnel.
        ("tunl0", "ov0".to_owned()),
    ] {
        text = text.replace(one, &own);
    }
    text
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

type Load = fn(&Recorded, &Cx, &Node) -> Result<()>;

fn flannel(cx: &mut Cx, load: Load) -> Result<()> {
    let spec = Topology::builder()
        .pod_network(PodNetwork::Bridge { br_netfilter: true })
        .underlay(Underlay::Vxlan)
        .rp_filter(1);
    beside(cx, &spec, |node| load(&FLANNEL, cx, node))
}

fn calico(cx: &mut Cx, load: Load) -> Result<()> {
    let spec = Topology::builder().underlay(Underlay::Ipip).rp_filter(1);
    beside(cx, &spec, |node| load(&CALICO, cx, node))
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
