//! The DNS server's flags, and what it is fed with.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use anyhow::{Result, bail};
use clap::Args;
use ipnet::IpNet;
use tracing::{error, info, warn};

use super::options::Options;
use crate::{
    compile::{CompiledService, endpoints::Place},
    dns::{
        forward::{ForwardConfig, ZoneForward, parse_upstream},
        limit::PRIVATE,
        names::Names,
        records::{Context, ServiceNames},
        server::{Config, Server},
        zone::Zone,
    },
    metrics::Metrics,
    model::{
        ids::{PerFamily, ServiceKey},
        node::nth_address,
    },
    reconcile::Engine,
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
    /// Clients that are answered, besides this node [default: private addresses]
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
    /// The zone.
    ///
    /// # Errors
    /// A text that names the flag.
    pub fn zone(&self, ranges: PerFamily<IpNet>) -> Result<Arc<Zone>> {
        Zone::new(&self.zone, ranges).map_err(anyhow::Error::msg)
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
        let forward = ForwardConfig {
            upstreams: self.dns_upstream.clone(),
            zones: self.dns_forward.clone(),
            cache: self.dns_cache,
        };
        for (_, upstream) in forward.all() {
            if upstream.ip().is_unspecified() || upstream.port() == 0 {
                bail!("DNS upstream {upstream} is no address that can be asked");
            }
            let own = ranges.iter().any(|(_, range)| nth_address(range, 2) == Some(upstream.ip()));
            if own || listen.contains(&upstream) {
                bail!("DNS upstream {upstream} is this node's own DNS: it would ask itself for ever");
            }
        }
        if let Some(own) = self.dns_forward.iter().find(|f| zone.name.zone_of(&f.zone)) {
            bail!("--dns-forward {}: names in --zone {} are answered here", own.zone, self.zone);
        }
        let private = || PRIVATE.iter().filter_map(|range| range.parse().ok()).collect();
        let allow = if self.dns_allow.is_empty() { private() } else { self.dns_allow.clone() };
        Ok(Some(Config { listen, allow, rate: self.dns_rate, forward }))
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
        out.sort();
        out.dedup();
        Ok(out)
    }
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

fn names_of(engine: &Engine, key: &ServiceKey, names: &Names) -> Option<ServiceNames> {
    let service = engine.snapshot().services().get(key)?;
    let compiled = engine.merged().services().get(key)?;
    let context = Context { place: Place::of(&engine.settings().node), vips: compiled.vips };
    let slices = engine.snapshot().slices_for(service);
    Some(ServiceNames::new(service, &slices, context, names.get(key).map(|old| &**old)))
}

/// Keeps the server's names as the engine's services are.
pub struct Feed {
    names: Names,
    server: Option<Server>,
    metrics: Metrics,
    held: BTreeSet<ServiceKey>,
    published: bool,
    /// What [`Self::begin`] has taken over already, until the turn that it was for is over.
    begun: BTreeMap<ServiceKey, Arc<CompiledService>>,
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
    /// Starts the server, where one is wanted. That it can't be is told; it is no reason not to balance.
    ///
    /// # Errors
    /// Flags that can't be.
    pub fn start(options: &Options, engine: &Engine, metrics: &Metrics) -> Result<Self> {
        let ranges = engine.settings().node.ranges;
        let zone = options.dns.zone(ranges)?;
        let node = engine.facts().all_addresses.clone();
        let server = match options.dns.config(ranges)? {
            None => None,
            Some(config) => match Server::start(&config, zone.clone(), node, metrics.dns().clone()) {
                Ok(server) => Some(server),
                Err(e) => {
                    error!("DNS can't be served: {e}; everything else goes on");
                    None
                }
            },
        };
        Ok(Self {
            names: Names::new(zone),
            server,
            metrics: metrics.clone(),
            held: BTreeSet::new(),
            published: false,
            begun: BTreeMap::new(),
            problems: Vec::new(),
        })
    }

    /// Takes over services that were compiled. Gives others that won or lost an alias by it.
    pub fn update(
        &mut self,
        engine: &Engine,
        keys: &BTreeSet<ServiceKey>,
        since: Option<Instant>,
    ) -> BTreeSet<ServiceKey> {
        let mut others = BTreeSet::new();
        let begun = std::mem::take(&mut self.begun);
        let services = engine.merged().services();
        let is_new = |key: &&ServiceKey| match (begun.get(*key), services.get(*key)) {
            (Some(before), Some(now)) => !Arc::ptr_eq(before, now),
            _ => true,
        };
        for key in keys.iter().filter(is_new) {
            let new = names_of(engine, key, &self.names);
            others.extend(self.names.set(key, new));
        }
        let held = engine.held().clone();
        if let Some(server) = &self.server {
            server.set_node(engine.facts().all_addresses.clone());
            if !keys.is_empty() || held != self.held || !self.published {
                self.published = true;
                server.publish(self.names.publish(true, &held));
                self.held = held;
                if let Some(since) = since {
                    self.metrics.dns().changed(since.elapsed());
                }
            }
        }
        others
    }

    /// Takes over all services that were compiled, where that has not been done yet: an agent that starts again answers as
    /// soon as it knows them, and not only when it has looked at the kernel's state of each.
    pub fn begin(&mut self, engine: &Engine) {
        if self.server.is_some() && !self.published && !engine.merged().services().is_empty() {
            let services = engine.merged().services();
            self.update(engine, &services.keys().cloned().collect(), None);
            self.begun.clone_from(services);
        }
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
