//! Names that are not ours, looked up by others: one cache, and behind it the upstreams of each zone.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use hickory_proto::{
    op::{Query, ResponseCode},
    rr::Name,
};

use prometheus_client::metrics::gauge::Gauge;

use super::{
    answer::Answer,
    cache::Cache,
    counted::Counted,
    handler::Elsewhere,
    places::{Place, Places},
    pool::Upstreams,
    running::Running,
    special::{is_nobodys, special},
    upstream::Probe,
};
use crate::metrics::DnsMetrics;

/// So often the cache is looked at.
const COUNT: Duration = Duration::from_secs(10);
/// Lookups that a zone may have at once, however many zones there are.
const FEWEST: usize = 4;
/// Questions that wait for an answer at once, many of them for the same one: each takes some memory, and nothing else. Each zone
/// has its part of them.
pub(super) const MOST_WAITING: usize = 16_384;

/// Upstreams of one zone: `corp.example=10.0.0.53`, with `+` between several.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneForward {
    /// The zone.
    pub zone: Name,
    /// Who is asked for it.
    pub upstreams: Vec<SocketAddr>,
}

impl FromStr for ZoneForward {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (zone, servers) =
            text.split_once('=').ok_or_else(|| format!("{text:?} is not ZONE=ADDRESS[:PORT][+ADDRESS…]"))?;
        let mut zone = Name::from_ascii(zone).map_err(|e| format!("{zone:?} is not a domain name: {e}"))?;
        zone.set_fqdn(true);
        let upstreams = servers.split('+').map(parse_upstream).collect::<Result<_, _>>()?;
        Ok(Self { zone: zone.to_lowercase(), upstreams })
    }
}

/// `ADDRESS` or `ADDRESS:PORT`; port 53 where none is given.
///
/// # Errors
/// A text for people.
pub fn parse_upstream(text: &str) -> Result<SocketAddr, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, 53));
    }
    let bare =
        text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).and_then(|t| t.parse::<IpAddr>().ok());
    match bare {
        Some(ip) => Ok(SocketAddr::new(ip, 53)),
        None => text.parse().map_err(|_| format!("{text:?} is not ADDRESS or ADDRESS:PORT")),
    }
}

/// What is looked up where.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ForwardConfig {
    /// Who is asked for names that no zone below has.
    pub upstreams: Vec<SocketAddr>,
    /// Zones with upstreams of their own.
    pub zones: Vec<ZoneForward>,
    /// Answers that are kept.
    pub cache: u64,
}

impl ForwardConfig {
    /// Whether nothing is looked up elsewhere.
    pub fn is_empty(&self) -> bool {
        self.upstreams.is_empty() && self.zones.is_empty()
    }

    /// Every upstream with the zone that it is asked for.
    pub fn all(&self) -> Vec<(Name, SocketAddr)> {
        let zones = self.zones.iter().flat_map(|z| z.upstreams.iter().map(|at| (z.zone.clone(), *at)));
        let mut out: Vec<_> = self.upstreams.iter().map(|at| (Name::root(), *at)).chain(zones).collect();
        out.sort();
        out.dedup();
        out
    }
}

/// Looks names up elsewhere.
pub struct Forwarder {
    /// The longest name first; the root zone last, where there are upstreams for it.
    zones: Vec<Arc<Zone>>,
    /// What they have answered.
    cache: Arc<Cache>,
    /// What they are asked.
    running: Running,
    probe: Arc<Probe>,
    metrics: DnsMetrics,
}

/// A zone of others.
struct Zone {
    name: Name,
    upstreams: Upstreams,
    /// Lookups that run. Each takes sockets, and the agent has other uses for those; and one zone whose upstreams say nothing
    /// must not keep others from being asked.
    running: Arc<Places>,
    /// Questions that wait for those: of the dead zone, too, they are the most.
    waiting: Arc<Places>,
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.zones.iter().map(|zone| &zone.name)).finish()
    }
}

impl Forwarder {
    /// A forwarder of names outside `ours`, with at most `most` lookups at once, as many for each zone, half of those for one
    /// client.
    ///
    /// # Errors
    /// A text for people.
    pub fn new(
        config: &ForwardConfig,
        ours: &Name,
        most: usize,
        probe: Arc<Probe>,
        metrics: DnsMetrics,
    ) -> Result<Self, String> {
        let zones = config.zones.len() + usize::from(!config.upstreams.is_empty());
        let share = |most: usize| (most / zones.max(1)).max(FEWEST);
        let build = |zone: &Name, upstreams: &[SocketAddr]| {
            let known = upstreams.iter().map(|at| {
                let counted = Counted { metrics: metrics.clone(), upstream: *at, zone: zone.clone() };
                (counted, probe.state(zone, *at))
            });
            Upstreams::new(known)
                .map(|upstreams| Zone {
                    name: zone.clone(),
                    upstreams,
                    running: Places::new(share(most), 2),
                    waiting: Places::new(share(MOST_WAITING), 2),
                })
                .map(Arc::new)
                .map_err(|e| format!("upstreams {upstreams:?}: {e}"))
        };
        let mut zones = Vec::new();
        for zone in &config.zones {
            zones.push(build(&zone.zone, &zone.upstreams)?);
        }
        if !config.upstreams.is_empty() {
            zones.push(build(&Name::root(), &config.upstreams)?);
        }
        zones.sort_by_key(|zone| std::cmp::Reverse(zone.name.iter().count()));
        let cache = Arc::new(Cache::new(config.cache, ours.clone()));
        Ok(Self { zones, cache, running: Running::default(), probe, metrics })
    }

    fn zone(&self, name: &Name) -> Option<&Arc<Zone>> {
        self.zones.iter().find(|zone| zone.name.zone_of(name))
    }

    /// [`Self::find`], and the answer when it is there.
    pub async fn lookup(&self, query: &Query, client: IpAddr) -> Option<Arc<Answer>> {
        match self.find(query, client) {
            Found::Answer(answer) => Some(answer),
            Found::Later(lookup) => Some(lookup.answer().await),
            Found::NoPlace => None,
        }
    }

    /// Looks a client's question up, together with who else asks the same. Aliases are answered as they were told, and not followed: where they lead to is what
    /// the upstream has to know, but for names that are ours, which are never asked elsewhere
    /// ([`super::handler::Handler::forwarded`]).
    pub fn find(&self, query: &Query, client: IpAddr) -> Found {
        let Some(zone) = self.zone(query.name()) else {
            return Found::Answer(Arc::new(Answer::code(ResponseCode::Refused)));
        };
        let mut name = query.name().clone();
        name.set_fqdn(true);
        let query = Query::query(name, query.query_type());
        // What nobody has, someone does that was named for it, or for more than that but not for everything.
        let is_someones = !zone.name.is_root() && is_nobodys(query.name());
        if let Some(answer) = special(&query).filter(|_| !is_someones) {
            return Found::Answer(Arc::new(answer));
        }
        // What is in the cache takes no place.
        if let Some(answer) = self.cache.get(&query, Instant::now()) {
            self.metrics.cache_hits.inc();
            return Found::Answer(Arc::new(answer));
        }
        self.metrics.cache_misses.inc();
        let begin = || self.begin(zone, &query, client);
        let lookup = zone.waiting.take(client).and_then(|place| {
            let lookup = self.running.join(&query, Instant::now(), begin)?;
            Some(Lookup { lookup, _place: place })
        });
        lookup.map_or_else(
            || {
                self.metrics.limited("forwards");
                Found::NoPlace
            },
            Found::Later,
        )
    }

    /// A lookup in a zone, where there is a place for one more.
    fn begin(
        &self,
        zone: &Arc<Zone>,
        query: &Query,
        client: IpAddr,
    ) -> Option<BoxFuture<'static, Arc<Answer>>> {
        let place = zone.running.take(client)?;
        let (zone, cache, query) = (zone.clone(), self.cache.clone(), query.clone());
        let entries = self.metrics.cache_entries.clone();
        let lookup = async move {
            let _place = place;
            let found = zone.upstreams.ask(&query).await;
            let now = Instant::now();
            let answer = match found {
                Some(answer) => {
                    cache.put(query, &answer, now);
                    answer
                }
                None => {
                    tracing::debug!("{}: no upstream answers", query.name());
                    // Another lookup of it may have had more luck.
                    cache.put_failure(query, now)
                }
            };
            count(&cache, &entries);
            Arc::new(answer)
        };
        Some(lookup.boxed())
    }

    /// Counts now and then what is left in the cache, where nothing new comes.
    pub async fn watch(&self) {
        loop {
            tokio::time::sleep(COUNT).await;
            count(&self.cache, &self.metrics.cache_entries);
        }
    }
}

fn count(cache: &Cache, entries: &Gauge) {
    entries.set(i64::try_from(cache.len()).unwrap_or(i64::MAX));
}

/// What there is of a name of others by now.
pub enum Found {
    /// The answer.
    Answer(Arc<Answer>),
    /// It has to be asked for.
    Later(Lookup),
    /// So many are asked for already that there is no place for one more.
    NoPlace,
}

/// A lookup that a client waits for. It goes on while someone waits for its answer, and takes a place as long.
pub struct Lookup {
    lookup: futures::future::Shared<BoxFuture<'static, Arc<Answer>>>,
    _place: Place,
}

impl Lookup {
    /// Its answer.
    pub async fn answer(self) -> Arc<Answer> {
        self.lookup.await
    }
}

impl Elsewhere for Forwarder {
    fn covers(&self, name: &Name) -> bool {
        self.zone(name).is_some()
    }

    fn is_loop(&self, name: &Name, client: IpAddr) -> bool {
        self.probe.is_echo(name, client) || self.probe.is_loop(client)
    }
}
