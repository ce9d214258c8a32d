//! The harness itself: that every kind of topology carries packets, and that its checks can fail.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::check;
use crate::client::{Flows, Load, Probe};
use crate::runner::{Cx, Family, Matrix, Proto, Suite};
use crate::topology::{Builder, PodNetwork, Topology, Underlay};

pub fn register(suite: &mut Suite) {
    suite.add("harness::routed", &Matrix::once(), |cx| carries(cx, &Topology::builder()));
    suite.add("harness::tools", &Matrix::once(), tools);
    suite.add("harness::foreign_state_is_seen", &Matrix::once(), foreign_state);
    suite.add("harness::bridge", &Matrix::once(), |cx| {
        carries(
            cx,
            &Topology::builder().pod_network(PodNetwork::Bridge { br_netfilter: false }).cni_masquerade(),
        )
    });
    suite.add("harness::vxlan_bridge", &Matrix::once(), |cx| {
        let bridge = PodNetwork::Bridge { br_netfilter: true };
        carries(cx, &Topology::builder().pod_network(bridge).underlay(Underlay::Vxlan).cni_masquerade())
    });
    suite.add("harness::ipip", &Matrix::once(), |cx| {
        carries(cx, &Topology::builder().underlay(Underlay::Ipip))
    });
    suite.add("harness::wireguard", &Matrix::once(), |cx| {
        carries(cx, &Topology::builder().underlay(Underlay::Wireguard))
    });
}

/// Every pod reaches every pod, nodes reach pods, the outside reaches nodes, all protocols, big datagrams too.
fn carries(cx: &mut Cx, spec: &Builder) -> Result<()> {
    let t = cx.topology(spec)?;
    for family in Family::ALL {
        for proto in Proto::ALL.into_iter().filter(|p| p.available()) {
            for from in ["p11", "p22"] {
                for to in &t.pods {
                    let tally = t.pod(from).connect(proto, to.at(family, 8080), 1)?;
                    check::only(&tally, &to.name)?;
                    check::seen_as(&tally, &[t.pod(from).ip(family)])?;
                }
            }
            check::only(&t.ext.connect(proto, t.node(2).at(family, 80), 1)?, "HOST-n2")?;
            check::only(&t.node(1).connect(proto, t.pod("p31").at(family, 8080), 1)?, "p31")?;
            let closed = t.ext.connect(proto, t.node(1).at(family, 9), 1)?;
            ensure!(closed.answered() == 0, "port 9 is closed: {closed}");
        }
        let big = Probe::new(Proto::Udp, t.pod("p21").at(family, 8080)).bytes(4000);
        check::only(&t.pod("p11").probe(&big)?, "p21")?;
        let big = Probe::new(Proto::Tcp, t.pod("p21").at(family, 8080)).bytes(300_000);
        check::only(&t.pod("p11").probe(&big)?, "p21")?;
        ensure!(t.ext.ping(t.node(3).ip(family))?.is_ok(), "n3 does not answer a ping");
        ensure!(t.pod("p11").ping(t.pod("p12").ip(family))?.is_ok(), "p12 does not answer a ping");
    }
    Ok(())
}

fn tools(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder())?;
    let to = t.pod("p21").at(Family::V4, 8080);
    let from = t.pod("p11");
    let load = Load::start(&from.ns, &Probe::new(Proto::Tcp, to), 2);
    let flows = Flows::start(&from.ns, &Probe::new(Proto::Tcp, to), 3, Duration::from_millis(20))?;
    std::thread::sleep(Duration::from_millis(500));
    let report = load.stop()?;
    cx.note(format!("{} connections in half a second", report.answered()));
    ensure!(report.answered() > 10 && report.errors.is_empty(), "the load: {report:?}");
    ensure!(flows.now().iter().all(|f| f.servers == ["p21"] && f.errors.is_empty()), "{:?}", flows.now());
    // A server that ends takes its connections with it, and nobody listens any more.
    t.pod("p21").stop_serving("p21");
    std::thread::sleep(Duration::from_millis(200));
    let flows = flows.stop()?;
    ensure!(flows.iter().all(|f| f.exchanges > 0 && f.errors.len() == 1), "{flows:?}");
    check::refused(&from.connect(Proto::Tcp, to, 2)?)?;
    check::refused(&from.connect(Proto::Udp, to, 1)?)?;
    t.pod("p21").serve(&crate::server::everywhere(&[8080], Proto::Sctp.available()))?;
    // Source address and port.
    let probe =
        Probe::new(Proto::Udp, t.node(1).at(Family::V4, 80)).bound_to([192, 168, 50, 102]).bound_port(4000);
    let tally = t.ext.probe(&probe)?;
    check::seen_as(&tally, &[[192, 168, 50, 102].into()])?;
    ensure!(tally.answers.iter().all(|a| a.peer.port() == 4000), "{tally:?}");
    Ok(())
}

fn foreign_state(cx: &mut Cx) -> Result<()> {
    let t = cx.topology(&Topology::builder())?;
    let n = t.node(1);
    let before = n.snapshot()?;
    n.run(&["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "4711", "-j", "ACCEPT"])?.ok()?;
    n.run(&["ipset", "create", "meshlb-x", "hash:ip"])?.ok()?;
    n.run(&["ipvsadm", "-A", "-f", "256", "-s", "rr"])?.ok()?;
    let after = n.snapshot()?;
    let diff = before.diff(&after);
    ensure!(diff.len() == 3, "{diff:?}");
    ensure!(check::foreign_unchanged(&before, &after).is_err(), "a foreign rule was not seen");
    ensure!(check::nothing_left(&t).is_err(), "what is left was not seen");
    ensure!(after.ours().lines().count() == 2, "{:?}", after.ours());
    n.run(&["iptables-nft", "-D", "INPUT", "-p", "tcp", "--dport", "4711", "-j", "ACCEPT"])?.ok()?;
    n.run(&["ipset", "destroy", "meshlb-x"])?.ok()?;
    n.run(&["ipvsadm", "-D", "-f", "256"])?.ok()?;
    check::same(&before, &n.snapshot()?, "changed")
}
