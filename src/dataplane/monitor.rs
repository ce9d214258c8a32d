//! Tells when this node's addresses, links or routes change, as far as it concerns us.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};

use super::{
    Error,
    host::{
        address::{self, Link, RTM_DELADDR, RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK},
        netlink::{Conn, Message, Messages, receive, set_receive_timeout},
        route::{RTM_DELROUTE, RTM_NEWROUTE, Route, overlap},
    },
};
use crate::model::ids::{Family, PerFamily};

/// `RTNLGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV6_IFADDR`, `_IPV6_ROUTE` (linux/rtnetlink.h).
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];
/// A report waits until nothing has come for this long: an address comes with its routes, a pod with
/// several link events.
const QUIET: Duration = Duration::from_millis(100);
/// But never longer than this after the first event.
const AT_MOST: Duration = Duration::from_millis(500);
/// How often the thread looks whether it should end while nothing happens.
const IDLE: Duration = Duration::from_secs(1);
/// Room for a burst of events, such as a routing daemon's start; beyond it everything counts as changed.
const RECEIVE_BUFFER: usize = 1 << 20;

/// What may have changed since the last report. Read again what you need; it can be as before.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Changes {
    /// Addresses, links or default routes: see [`super::Host::facts`] and [`super::Host::bridges_of`].
    pub addresses: bool,
    /// A VIP route is gone, or a route of others came or went in a VIP range: see
    /// [`super::Host::vip_routes`] and [`super::Host::overlaps`].
    pub routes: bool,
}

impl Changes {
    const ALL: Self = Self { addresses: true, routes: true };

    fn any(self) -> bool {
        self.addresses || self.routes
    }

    fn add(&mut self, other: Self) {
        self.addresses |= other.addresses;
        self.routes |= other.routes;
    }
}

/// A thread that watches; it ends within a second after this is dropped.
pub struct Monitor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Watches the network namespace of the calling thread and calls `report` on the monitor's own
    /// thread. Changes from before the call are not reported, any later ones are: subscribe first, then
    /// read.
    ///
    /// # Errors
    /// When the kernel refuses the subscription, or a thread.
    pub fn spawn(
        ranges: PerFamily<IpNet>,
        report: impl FnMut(Changes) + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::Failed {
            object: "watch the addresses and routes of this node".into(),
            reason: e.to_string(),
        };
        let socket = subscribe().map_err(failed)?;
        let links = address::links(&mut Conn::new(NETLINK_ROUTE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let watch = Watch { filter: Filter { ranges, links }, socket, stop: stop.clone() };
        let thread = std::thread::Builder::new()
            .name("meshlb-monitor".into())
            .spawn(move || watch.run(report))
            .map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panicked only if `report` did, and that has been printed.
            let _ = thread.join();
        }
    }
}

fn subscribe() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    // More than rmem_max needs CAP_NET_ADMIN; less only means that bursts are lost sooner.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER);
    }
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

struct Watch {
    filter: Filter,
    socket: Socket,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn run(mut self, mut report: impl FnMut(Changes)) {
        let mut buf = vec![0; 64 * 1024];
        let mut pending = Changes::default();
        let mut first = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let wait = if pending.any() { QUIET.min(AT_MOST.saturating_sub(first.elapsed())) } else { IDLE };
            let new = self.wait(&mut buf, wait);
            if new.is_some_and(Changes::any) && !pending.any() {
                first = Instant::now();
            }
            pending.add(new.unwrap_or_default());
            // Quiet, or long enough.
            if pending.any() && (new.is_none() || first.elapsed() >= AT_MOST) {
                report(std::mem::take(&mut pending));
            }
        }
    }

    /// The changes of the next datagram; `None` when none comes in time.
    fn wait(&mut self, buf: &mut [u8], time: Duration) -> Option<Changes> {
        // Zero would mean for ever.
        let time = time.max(Duration::from_millis(1));
        let received = set_receive_timeout(&self.socket, time).and_then(|()| receive(&self.socket, buf));
        let error = match received {
            Ok(len) if len <= buf.len() => {
                let mut changes = Changes::default();
                for message in Messages::new(&buf[..len]) {
                    changes.add(message.map_or(Changes::ALL, |m| self.filter.changes(&m)));
                }
                return Some(changes);
            }
            Ok(_cut) => return Some(Changes::ALL),
            Err(e) => e,
        };
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN) => None,
            Some(Errno::ENOBUFS) => {
                tracing::debug!("address and route events came too fast; reading everything again");
                Some(Changes::ALL)
            }
            _ => {
                tracing::warn!("watching addresses and routes: {error}; trying again");
                std::thread::sleep(IDLE);
                if let Ok(socket) = subscribe() {
                    self.socket = socket;
                }
                Some(Changes::ALL)
            }
        }
    }
}

/// Decides what concerns us.
struct Filter {
    ranges: PerFamily<IpNet>,
    links: HashMap<u32, Link>,
}

impl Filter {
    fn changes(&mut self, message: &Message<'_>) -> Changes {
        match message.kind {
            RTM_NEWLINK | RTM_DELLINK => self.link(message),
            // IPv4 routes that go with an address or link go without a word of their own.
            RTM_NEWADDR | RTM_DELADDR => Changes::ALL,
            RTM_NEWROUTE | RTM_DELROUTE => self.route(message),
            _ => Changes::default(),
        }
    }

    /// Many events about a link tell nothing that matters here (carrier, statistics, queues).
    fn link(&mut self, message: &Message<'_>) -> Changes {
        let Some((index, link)) = Link::parse(message.body) else {
            return Changes::ALL;
        };
        let before = if message.kind == RTM_DELLINK {
            self.links.remove(&index);
            None
        } else {
            self.links.insert(index, link.clone())
        };
        if before.as_ref() == Some(&link) { Changes::default() } else { Changes::ALL }
    }

    /// On a node that speaks BGP, routes come and go all the time.
    fn route(&self, message: &Message<'_>) -> Changes {
        let Some(route) = Route::parse(message.body) else {
            return Changes::default();
        };
        if route.dst.prefix_len() == 0 {
            return Changes { addresses: true, routes: false };
        }
        let Some(range) = self.ranges.get(Family::of(&route.dst.addr())) else {
            return Changes::default();
        };
        let own_write = route.is_ours(range) && message.kind == RTM_NEWROUTE;
        Changes { addresses: false, routes: overlap(&route.dst, range) && !own_write }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::{
        dataplane::{
            Host,
            host::{
                LinuxHost,
                testing::{eth0, in_netns, ip},
            },
        },
        model::kernel::VipRoute,
    };

    const ADDRESSES: Changes = Changes { addresses: true, routes: false };
    const ROUTES: Changes = Changes { addresses: false, routes: true };

    fn monitor() -> (Monitor, Receiver<Changes>) {
        let ranges = PerFamily { v4: "10.200.0.0/16".parse().ok(), v6: "fd00:200::/112".parse().ok() };
        let (sender, receiver) = channel();
        let monitor = Monitor::spawn(ranges, move |changes| {
            let _ = sender.send(changes);
        });
        (monitor.unwrap(), receiver)
    }

    /// `ip` with these commands at once.
    fn batch(commands: impl Iterator<Item = String>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), commands.collect::<Vec<_>>().join("\n")).unwrap();
        ip(&format!("-batch {}", file.path().display()));
    }

    /// Everything reported until a second of silence.
    fn reported(receiver: &Receiver<Changes>) -> Vec<Changes> {
        std::iter::from_fn(|| receiver.recv_timeout(Duration::from_secs(1)).ok()).collect()
    }

    #[test]
    fn reports_what_concerns_us_once() {
        in_netns(|| {
            eth0(&["192.168.50.1/24", "fd00:50::1/64"]);
            std::thread::sleep(Duration::from_secs(3)); // link-local addresses settle
            let (_monitor, receiver) = monitor();
            let mut host = LinuxHost::default();
            for (range, source) in [("10.200.0.0/16", "192.168.50.1"), ("fd00:200::/112", "fd00:50::1")] {
                let route = VipRoute { range: range.parse().unwrap(), source: source.parse().unwrap() };
                host.put_vip_route(&route).unwrap();
            }
            ip("route add 10.9.0.0/16 via 192.168.50.9");
            assert_eq!(reported(&receiver), [], "our own routes and unrelated ones");

            batch((2..20).map(|n| format!("addr add 192.168.50.{n}/24 dev eth0")));
            let seen = reported(&receiver);
            assert!(!seen.is_empty() && seen.len() < 10, "{seen:?}");
            assert!(seen.iter().all(|c| c.addresses), "{seen:?}");

            ip("route del local 10.200.0.0/16 dev lo table local");
            assert_eq!(reported(&receiver), [ROUTES]);
            ip("-6 route del local fd00:200::/112 dev lo table local");
            assert_eq!(reported(&receiver), [ROUTES]);
            ip("route add 10.200.7.0/24 via 192.168.50.9");
            assert_eq!(reported(&receiver), [ROUTES]);
            ip("route add default via 192.168.50.9");
            assert_eq!(reported(&receiver), [ADDRESSES]);
            ip("link set eth0 txqueuelen 77");
            assert_eq!(reported(&receiver), []);
            ip("link set eth0 down");
            assert!(reported(&receiver).contains(&Changes::ALL));
        });
    }

    #[test]
    fn a_lost_event_counts_as_every_change() {
        in_netns(|| {
            eth0(&["192.168.50.1/24"]);
            let (sender, receiver) = channel();
            let (gate, opened) = channel::<()>();
            // The first report blocks, so that the buffer (some 2,000 events) runs over meanwhile.
            let mut first = true;
            let _monitor = Monitor::spawn(PerFamily::default(), move |changes| {
                if std::mem::take(&mut first) {
                    let _ = opened.recv();
                }
                let _ = sender.send(changes);
            })
            .unwrap();
            ip("addr add 192.168.50.2/24 dev eth0");
            std::thread::sleep(Duration::from_millis(700));
            batch((0..8000).map(|n| format!("route add 10.{}.{}.0/24 via 192.168.50.9", n >> 8, n & 255)));
            gate.send(()).unwrap();
            let seen = reported(&receiver);
            // These routes concern nobody, so a second report can only come from the overrun.
            assert_eq!(seen.get(1), Some(&Changes::ALL), "{seen:?}");
        });
    }

    #[test]
    fn ends_when_dropped() {
        in_netns(|| {
            let (monitor, receiver) = monitor();
            let start = Instant::now();
            drop(monitor);
            assert!(start.elapsed() < Duration::from_secs(3));
            assert!(receiver.recv().is_err());
        });
    }
}
