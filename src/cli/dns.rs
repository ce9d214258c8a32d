//! The DNS server's flags, and what it is fed with.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use anyhow::{Result, bail};
use clap::Args;
use hickory_proto::rr::Name;
use ipnet::IpNet;
use tracing::{error, info, warn};

use super::options::Options;
use crate::{
    allocate::Allocations,
    compile::{CompiledService, endpoints::Place, service::is_served},
    dns::{
        forward::{ForwardConfig, ZoneForward, parse_upstream},
        limit::PRIVATE,
        names::Names,
        ports,
        records::{Context, ServiceNames},
        server::{Config, Server},
        unknown::Unknown,
        zone::{Zone, is_localhost, is_loopback},
    },
    metrics::Metrics,
    model::{
        ids::{Family, PerFamily, Scope, ServiceKey},
        kernel::Element,
        node::nth_address,
        unread::Unread,
    },
    reconcile::Engine,
    source::Origin,
};

/// The word for the DNS addresses in `--dns-listen`.
const OWN: &str = "vip";
/// The word for nowhere.
const OFF: &str = "off";

/// Flags of the DNS server.
#[derive(Args, Clone, Debug)]
pub struct DnsOptions {
    /// DNS zone of the services' names.
    #[arg(
        long,
        global = true,
        env = "MESHLB_ZONE",
        default_value = "mesh.internal",
        value_parser = super::flag_values::parse_dns_name,
        help_heading = "DNS"
    )]
    pub zone: String,
    /// Where names are answered: `vip` is the second address of each VIP range, port 53, which only this node reaches; or
    /// ADDRESS[:PORT]; `off` for nowhere.
    #[arg(
        long,
        global = true,
        env = "MESHLB_DNS_LISTEN",
        value_name = "ADDR",
        value_delimiter = ',',
        default_value = "vip",
        help_heading = "DNS"
    )]
    pub dns_listen: Vec<String>,
    /// Who is asked for names outside the zone, ADDRESS[:PORT]; without any they are refused.
    #[arg(long, global = true, env = "MESHLB_DNS_UPSTREAM", value_name = "ADDR", value_delimiter = ',', value_parser = parse_upstream, help_heading = "DNS")]
    pub dns_upstream: Vec<SocketAddr>,
    /// Zones that others are asked for, each ZONE=ADDRESS[:PORT][+ADDRESS…].
    #[arg(
        long,
        global = true,
        env = "MESHLB_DNS_FORWARD",
        value_name = "ZONE=ADDR",
        value_delimiter = ',',
        help_heading = "DNS"
    )]
    pub dns_forward: Vec<ZoneForward>,
    /// Clients that are answered, besides this node [default: the ranges of this node's pods where its Node says them, and all private
    /// addresses at the DNS addresses, which only this node and its pods reach]
    #[arg(
        long,
        global = true,
        env = "MESHLB_DNS_ALLOW",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "DNS"
    )]
    pub dns_allow: Vec<IpNet>,
    /// Answers a second by UDP that a client gets before it is told to come by TCP; 0 is no limit.
    #[arg(
        long,
        global = true,
        env = "MESHLB_DNS_RATE",
        value_name = "N",
        default_value = "10000",
        help_heading = "DNS"
    )]
    pub dns_rate: u32,
    /// Answers of others that are kept.
    #[arg(
        long,
        global = true,
        env = "MESHLB_DNS_CACHE",
        value_name = "N",
        default_value = "10000",
        help_heading = "DNS"
    )]
    pub dns_cache: u64,
}

impl DnsOptions {
    /// The zone, at the addresses where names are answered.
    ///
    /// # Errors
    /// A text that names the flag.
    pub fn zone(&self, ranges: PerFamily<IpNet>) -> Result<Arc<Zone>> {
        let zone = Zone::new(&self.zone, ranges).map_err(anyhow::Error::msg)?;
        Ok(zone.served_at(&self.listen(ranges)?))
    }

    /// How names are served; `None` for not at all.
    ///
    /// # Errors
    /// A text that names the flag.
    pub fn config(&self, ranges: PerFamily<IpNet>) -> Result<Option<Config>> {
        let zone = self.zone(ranges)?;
        let listen = self.listen(ranges)?;
        if listen.is_empty() {
            return Ok(None);
        }
        let is_own = |ip: IpAddr| ranges.iter().any(|(_, range)| nth_address(range, 2) == Some(ip));
        let forward = self.forward();
        for (_, upstream) in forward.all() {
            if upstream.ip().is_unspecified() || upstream.port() == 0 {
                bail!("DNS upstream {upstream} is no address that can be asked");
            }
            if is_own(upstream.ip()) || listen.contains(&upstream) {
                bail!("DNS upstream {upstream} is this node's own DNS: it would ask itself for ever");
            }
        }
        if let Some(own) = self.dns_forward.iter().find(|f| zone.name.zone_of(&f.zone)) {
            bail!("--dns-forward {}: names in --zone {} are answered here", own.zone, self.zone);
        }
        if let Some(own) = self.dns_forward.iter().find(|f| is_localhost(&f.zone) || is_loopback(&f.zone)) {
            bail!(
                "--dns-forward {}: names of the machine itself are answered here (RFC 6761, 6.3)",
                own.zone
            );
        }
        if let Some(own) = self.dns_forward.iter().find(|f| zone.has_reverse(&f.zone)) {
            bail!("--dns-forward {}: names of virtual IPs (--vip-cidr) are answered here", own.zone);
        }
        let private = || PRIVATE.iter().filter_map(|range| range.parse().ok()).collect();
        // Pods have addresses of plugins' own pools, which nothing tells: at addresses that nobody else reaches all private ones may ask.
        let allow_pods = self.dns_allow.is_empty();
        let allow = if allow_pods { private() } else { self.dns_allow.clone() };
        let allow_outside = allow_pods.then(Vec::new);
        let inside = listen.iter().map(SocketAddr::ip).filter(|ip| ip.is_loopback() || is_own(*ip)).collect();
        let (rate, remembered, ports) = (self.dns_rate, HashSet::new(), ports::DEFAULT);
        Ok(Some(Config {
            listen,
            allow,
            allow_outside,
            inside,
            allow_pods,
            rate,
            forward,
            remembered,
            ports,
        }))
    }

    /// What is looked up where. A zone that is named more than once has all of its upstreams, as the root zone has those of
    /// `--dns-upstream` too.
    fn forward(&self) -> ForwardConfig {
        let mut all: BTreeMap<&Name, Vec<SocketAddr>> = BTreeMap::new();
        let root = Name::root();
        let of_root = self.dns_upstream.iter().map(|upstream| (&root, upstream));
        let of_zones = self.dns_forward.iter().flat_map(|f| f.upstreams.iter().map(move |up| (&f.zone, up)));
        for (zone, upstream) in of_root.chain(of_zones) {
            let upstreams = all.entry(zone).or_default();
            if !upstreams.contains(upstream) {
                upstreams.push(*upstream);
            }
        }
        let upstreams = all.remove(&root).unwrap_or_default();
        let zones = all.into_iter().map(|(zone, upstreams)| ZoneForward { zone: zone.clone(), upstreams });
        ForwardConfig { upstreams, zones: zones.collect(), cache: self.dns_cache }
    }

    fn listen(&self, ranges: PerFamily<IpNet>) -> Result<Vec<SocketAddr>> {
        let mut out = Vec::new();
        for text in &self.dns_listen {
            match text.as_str() {
                OFF if self.dns_listen.len() == 1 => {}
                OFF => bail!("--dns-listen: off stands alone"),
                OWN => out.extend(
                    ranges.iter().filter_map(|(_, r)| nth_address(r, 2)).map(|ip| SocketAddr::new(ip, 53)),
                ),
                text => {
                    let address =
                        parse_upstream(text).map_err(|e| anyhow::anyhow!("--dns-listen: {e}, vip or off"))?;
                    if address.ip().is_unspecified() {
                        // An answer would leave from whichever address the route prefers.
                        bail!("--dns-listen {text}: name the addresses, one by one");
                    }
                    out.push(address);
                }
            }
        }
        // In their order: the first may be the zone's own.
        let mut seen = HashSet::new();
        out.retain(|address| seen.insert(*address));
        Ok(out)
    }
}

/// Services that the kernel does not serve yet as they are answered: one of their virtual IPs is to have entries and has none that
/// leads to them. One with some is served there, though a port may yet come; one that is to have none (in mode DNSRR, or without
/// endpoints) needs nothing of the kernel.
fn to_come(engine: &Engine) -> BTreeSet<ServiceKey> {
    let comes = |service: &CompiledService| {
        let marks = service.ports.iter().filter_map(|port| port.marks.get(&Scope::Vip).copied()).collect();
        service.vips.iter().any(|(_, vip)| {
            let at = |element: &&Element| matches!(element, Element::Vip(target) if target.addr == *vip);
            let mut entries = service.elements.keys().filter(at).peekable();
            entries.peek().is_some() && !entries.any(|element| engine.is_led(element, &marks))
        })
    };
    let services = engine.merged().services().iter();
    services.filter(|(_, service)| comes(service)).map(|(key, _)| key.clone()).collect()
}

/// The names of all services, for who only looks.
pub fn all_names(zone: Arc<Zone>, engine: &Engine) -> Names {
    let mut names = Names::new(zone);
    for key in engine.merged().services().keys() {
        let new = names_of(engine, key, &names);
        names.set(key, new);
    }
    names
}

/// The addresses of families that this node serves: to another one there is no route.
fn of_served(addresses: &PerFamily<IpAddr>, engine: &Engine) -> PerFamily<IpAddr> {
    let served = |family: Family| is_served(family, &engine.settings().node, engine.facts());
    let mut out = PerFamily::default();
    for (family, address) in addresses.iter().filter(|(family, _)| served(*family)) {
        out.set(family, Some(*address));
    }
    out
}

fn names_of(engine: &Engine, key: &ServiceKey, names: &Names) -> Option<ServiceNames> {
    let compiled = engine.merged().services().get(key)?;
    names_with(engine, key, compiled.vips, names)
}

/// The names of a service with these virtual IPs.
fn names_with(
    engine: &Engine,
    key: &ServiceKey,
    vips: PerFamily<IpAddr>,
    names: &Names,
) -> Option<ServiceNames> {
    let service = engine.snapshot().services().get(key)?;
    let context = Context { place: Place::of(&engine.settings().node), vips: of_served(&vips, engine) };
    let slices = engine.snapshot().slices_for(service);
    Some(ServiceNames::new(service, &slices, context, names.get(key).map(|old| &**old)))
}

/// First labels of the names of all services, besides those of services that have something allocated.
pub fn labels(engine: &Engine, allocations: &Allocations) -> BTreeSet<String> {
    let services = engine.snapshot().services().values();
    let labels = services.flat_map(|service| {
        let own = Some(&service.key.name).filter(|_| !allocations.services.contains_key(&service.key));
        own.into_iter().chain(&service.dns.aliases)
    });
    labels.map(|label| label.to_ascii_lowercase()).collect()
}

/// Keeps the server's names as the engine's services are.
pub struct Feed {
    names: Names,
    server: Option<Server>,
    metrics: Metrics,
    /// What could not be read of the source when it was read first, and has not been since: of what became wrong later the last
    /// good version is in force.
    never_read: Option<Unread>,
    published: bool,
    /// What [`Self::begin`] has taken over already, until the turn that it was for is over.
    begun: BTreeMap<ServiceKey, Arc<CompiledService>>,
    /// What it has left out, until then.
    to_come: BTreeSet<ServiceKey>,
    /// Services whose aliases may have been won or lost in turns that failed, to be told of with the next one.
    others: BTreeSet<ServiceKey>,
    problems: Vec<String>,
}

impl Drop for Feed {
    /// What nobody keeps up to date is not to be answered.
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            server.stop();
        }
    }
}

impl Feed {
    /// Starts the server, where one is wanted. That it can't be is told; it is no reason not to balance. `labels` are services
    /// and aliases of earlier runs.
    ///
    /// # Errors
    /// Flags that can't be.
    pub fn start<'a>(
        options: &Options,
        source: &Origin,
        engine: &Engine,
        labels: impl Iterator<Item = &'a str>,
        metrics: &Metrics,
    ) -> Result<Self> {
        let ranges = engine.settings().node.ranges;
        let zone = options.dns.zone(ranges)?;
        let node = engine.facts().all_addresses.clone();
        let server = match options.dns.config(ranges)? {
            None => None,
            Some(mut config) => {
                // A folder says no ranges of pods: nobody has to wait for them.
                config.allow_pods &= *source == Origin::Kube;
                if let Some(at) = config.outside().filter(|_| config.allow_outside.is_some()) {
                    info!(
                        "DNS at {at}: this node and pods that its Node tells of may ask; --dns-allow says who else"
                    );
                }
                config.ports = ports::of_clients(&options.proc_sys);
                config.remembered = labels.map(|label| label.to_ascii_lowercase().into_bytes()).collect();
                match Server::start(&config, zone.clone(), node, metrics.dns().clone()) {
                    Ok(server) => Some(server),
                    Err(e) => {
                        error!("DNS can't be served: {e}; everything else goes on");
                        None
                    }
                }
            }
        };
        Ok(Self::new(zone, server, metrics))
    }

    fn new(zone: Arc<Zone>, server: Option<Server>, metrics: &Metrics) -> Self {
        Self {
            names: Names::new(zone),
            server,
            metrics: metrics.clone(),
            never_read: None,
            published: false,
            begun: BTreeMap::new(),
            to_come: BTreeSet::new(),
            others: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    /// Takes over services that were compiled. Gives others that won or lost an alias by it.
    pub fn update(
        &mut self,
        engine: &Engine,
        keys: &BTreeSet<ServiceKey>,
        since: Option<Instant>,
    ) -> BTreeSet<ServiceKey> {
        let mut others = std::mem::take(&mut self.others);
        let begun = std::mem::take(&mut self.begun);
        self.to_come.retain(|key| !keys.contains(key));
        let services = engine.merged().services();
        let is_new = |key: &&ServiceKey| match (begun.get(*key), services.get(*key)) {
            (Some(before), Some(now)) => !Arc::ptr_eq(before, now),
            _ => true,
        };
        for key in keys.iter().filter(is_new) {
            let new = names_of(engine, key, &self.names);
            others.extend(self.names.set(key, new));
        }
        let servers = of_served(&self.names.zone().servers, engine);
        let changed = self.note_unread(engine) | self.names.set_servers(servers);
        self.see_node(engine);
        if self.server.is_some() && (!keys.is_empty() || changed || !self.published) {
            self.publish();
            if let Some(since) = since {
                self.metrics.dns().changed(since.elapsed());
            }
        }
        others
    }

    /// A turn can't be prepared, and the next one may not be, for as long as the kernel can't be read: what does not depend on it
    /// is answered as the source says all the same. The rest follows with the turn that can be.
    pub fn turn_failed(&mut self, engine: &Engine) {
        if !self.published {
            // The first turn is waited for: of most services nothing is known before it.
            return;
        }
        let mut changed = false;
        for key in engine.untold() {
            let before = self.names.get(key).cloned();
            let vips = engine.merged().services().get(key).map(|compiled| compiled.vips).unwrap_or_default();
            let new = names_with(engine, key, vips, &self.names);
            let free = match (&new, &before) {
                (Some(new), before) => new.is_free_of_kernel(before.as_deref()),
                // The kernel still has what is gone, unless there was nothing.
                (None, before) => before.as_ref().is_some_and(|before| before.is_free_of_kernel(None)),
            };
            if free {
                self.others.extend(self.names.set(key, new));
                changed = true;
            }
        }
        if changed {
            self.publish();
        }
    }

    fn publish(&mut self) {
        if let Some(server) = &self.server {
            self.published = true;
            server.publish(self.names.publish(true));
        }
    }

    /// Takes over what the source can't speak for; whether that is something else now.
    fn note_unread(&mut self, engine: &Engine) -> bool {
        let now = engine.unread();
        let unread = self.never_read.as_ref().map_or_else(|| now.clone(), |before| before.and(now));
        let unnamed = |key: &&ServiceKey| self.names.get(key).is_none();
        // One that was read before and is not there any more has been made anew since, as something that can't be read.
        let mut all = unread.clone();
        let is_gone = |key: &&ServiceKey| !engine.snapshot().services().contains_key(*key);
        all.services.extend(now.services.iter().filter(is_gone).cloned());
        let meant = engine.held().iter().chain(&all.services).filter(unnamed).cloned().collect();
        // All their names are known.
        let aliases = |key: &ServiceKey| {
            let service = engine.snapshot().services().get(key);
            let aliases = service.map_or(&[][..], |service| &service.dns.aliases);
            aliases
                .iter()
                .map(|alias| ServiceKey::new(key.namespace.clone(), alias.clone()))
                .collect::<Vec<_>>()
        };
        let coming = self.to_come.iter().filter(unnamed);
        let coming = coming.flat_map(|key| std::iter::once(key.clone()).chain(aliases(key))).collect();
        let unknown = Unknown::new(&all, &meant, &coming);
        self.never_read = Some(unread);
        self.names.set_unknown(unknown)
    }

    /// Takes over what the source says of the node: who may ask does not depend on what is in the kernel.
    pub fn see_node(&self, engine: &Engine) {
        if let Some(server) = &self.server {
            server.set_node(&engine.facts().all_addresses, engine.pods());
        }
    }

    /// Takes over what no turn follows: what the source says of the node, and that something can be read at last where nothing
    /// else has come of that, as when it was deleted.
    pub fn look(&mut self, engine: &Engine) {
        self.see_node(engine);
        let all_read = self.never_read.as_ref().is_some_and(Unread::is_empty);
        if self.published && !all_read && engine.untold().next().is_none() && self.note_unread(engine) {
            self.publish();
        }
    }

    /// Takes over the services that were compiled, where that has not been done yet: an agent that starts again answers as soon
    /// as it knows them, and not only when what has changed meanwhile is in the kernel. Those that are only then in the kernel
    /// may be there by their names, but nothing more is said of them.
    pub fn begin(&mut self, engine: &Engine) {
        if self.server.is_some() && !self.published && !engine.merged().services().is_empty() {
            self.take_over(engine, &to_come(engine));
        }
    }

    fn take_over(&mut self, engine: &Engine, to_come: &BTreeSet<ServiceKey>) {
        let services = engine.merged().services();
        let there = || services.iter().filter(|(key, _)| !to_come.contains(key));
        self.to_come.clone_from(to_come);
        self.update(engine, &there().map(|(key, _)| key.clone()).collect(), None);
        self.begun = there().map(|(key, compiled)| (key.clone(), compiled.clone())).collect();
    }

    /// Aliases that a service does not get.
    pub fn conflicts(&self, key: &ServiceKey) -> Vec<String> {
        self.names.conflicts(key)
    }

    /// What is wrong with the server at present. What is new, and what is over, is logged.
    pub fn problems(&mut self) -> &[String] {
        let now = self.server.as_ref().map(Server::problems).unwrap_or_default();
        for line in now.iter().filter(|line| !self.problems.contains(line)) {
            warn!("{line}");
        }
        for line in self.problems.iter().filter(|line| !now.contains(line)) {
            info!("no longer: {line}");
        }
        self.metrics.problems("dns", now.len());
        self.problems = now;
        &self.problems
    }
}

#[cfg(test)]
mod tests;
