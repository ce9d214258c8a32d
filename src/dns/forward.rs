//! Names that are not ours, looked up by others: one cache, and behind it the upstreams of each zone.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        domain::usage::{IN_ADDR_ARPA_127, INVALID, IP6_ARPA_1, LOCALHOST, ONION},
        rdata::{A, AAAA, PTR, SOA},
    },
};

use super::{
    answer::Answer, cache::Cache, counted::Counted, handler::Elsewhere, places::Places, pool::Upstreams,
    upstream::Probe, zone::is_loopback,
};
use crate::metrics::DnsMetrics;

/// So often the cache is looked at.
const COUNT: Duration = Duration::from_secs(10);
/// Lookups that a zone may have at once, however many zones there are.
const FEWEST: usize = 4;
/// Seconds that the names of the machine itself may be kept.
const LOCAL_TTL: u32 = 3600;

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
    zones: Vec<Zone>,
    /// What they have answered.
    cache: Cache,
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
        let each = (most / zones.max(1)).max(FEWEST);
        let build = |zone: &Name, upstreams: &[SocketAddr]| {
            let known = upstreams.iter().map(|at| {
                let counted = Counted { metrics: metrics.clone(), upstream: *at, zone: zone.clone() };
                (counted, probe.state(zone, *at))
            });
            Upstreams::new(known)
                .map(|upstreams| Zone { name: zone.clone(), upstreams, running: Places::new(each, 2) })
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
        let cache = Cache::new(config.cache, ours.clone());
        Ok(Self { zones, cache, probe, metrics })
    }

    fn zone(&self, name: &Name) -> Option<&Zone> {
        self.zones.iter().find(|zone| zone.name.zone_of(name))
    }

    /// Looks a client's question up. Aliases are answered as they were told, and not followed: where they lead to is what
    /// the upstream has to know, but for names that are ours, which are never asked elsewhere
    /// ([`super::handler::Handler::forwarded`]). `None` where so many run already that there is no place for one more.
    pub async fn lookup(&self, query: &Query, client: IpAddr) -> Option<Answer> {
        let Some(zone) = self.zone(query.name()) else {
            return Some(Answer::code(ResponseCode::Refused));
        };
        let mut name = query.name().clone();
        name.set_fqdn(true);
        let query = Query::query(name, query.query_type());
        if let Some(answer) = special(&query) {
            return Some(answer);
        }
        // What is in the cache takes no place.
        if let Some(answer) = self.cache.get(&query, Instant::now()) {
            self.metrics.cache_hits.inc();
            return Some(answer);
        }
        self.metrics.cache_misses.inc();
        let Some(_place) = zone.running.take(client) else {
            self.metrics.limited("forwards");
            return None;
        };
        let found = zone.upstreams.ask(&query).await;
        let now = Instant::now();
        let answer = match found {
            Some(answer) => {
                self.cache.put(query, &answer, now);
                answer
            }
            None => {
                tracing::debug!("{}: no upstream answers", query.name());
                // Another lookup of it may have had more luck.
                self.cache.put_failure(query, now)
            }
        };
        self.count();
        Some(answer)
    }

    fn count(&self) {
        self.metrics.cache_entries.set(i64::try_from(self.cache.len()).unwrap_or(i64::MAX));
    }

    /// Counts now and then what is left in the cache, where nothing new comes.
    pub async fn watch(&self) {
        loop {
            tokio::time::sleep(COUNT).await;
            self.count();
        }
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

/// Names that every resolver answers by itself (RFC 6761, 6.3 and 6.4; RFC 7686, 2). Each of their zones is served here, so it is
/// here that is said for how long there is nothing (RFC 2308, 3).
fn special(query: &Query) -> Option<Answer> {
    let (name, kind) = (query.name(), query.query_type());
    let zones = [&INVALID, &ONION, &LOCALHOST, &IN_ADDR_ARPA_127, &IP6_ARPA_1];
    let zone = zones.into_iter().find(|zone| zone.zone_of(name))?.name();
    let none = |code| Answer { code, authorities: vec![soa(zone)], ..Answer::default() };
    if INVALID.zone_of(name) || ONION.zone_of(name) {
        return Some(none(ResponseCode::NXDomain));
    }
    let pointer = is_loopback(name);
    let data = match kind {
        RecordType::A if !pointer => Some(RData::A(A(Ipv4Addr::LOCALHOST))),
        RecordType::AAAA if !pointer => Some(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
        RecordType::PTR if pointer => Some(RData::PTR(PTR(LOCALHOST.name().clone()))),
        _ => None,
    };
    let Some(data) = data else { return Some(none(ResponseCode::NoError)) };
    let answers = vec![Record::from_rdata(name.clone(), LOCAL_TTL, data)];
    Some(Answer { answers, ..Answer::default() })
}

/// The SOA record of a zone that nobody else has.
fn soa(zone: &Name) -> Record {
    let nobody = INVALID.prepend_label("nobody").unwrap_or_default();
    let data = SOA::new(zone.clone(), nobody, 1, 3600, 1200, 604_800, LOCAL_TTL);
    Record::from_rdata(zone.clone(), LOCAL_TTL, RData::SOA(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_names_are_nobodys() {
        let told = |name: &str, kind| {
            let answer = special(&Query::query(Name::from_ascii(name).unwrap(), kind))?;
            let records = answer.answers.iter().map(|r| r.data.to_string());
            let soa = answer.authorities.iter().map(|r| format!("{} {}", r.record_type(), r.name));
            Some(records.chain(soa).chain([answer.code.to_string()]).collect::<Vec<_>>().join(" "))
        };
        for (name, kind, want) in [
            ("localhost.", RecordType::A, Some("127.0.0.1 No Error")),
            ("x.localhost.", RecordType::AAAA, Some("::1 No Error")),
            ("x.localhost.", RecordType::MX, Some("SOA localhost. No Error")),
            ("1.0.0.127.in-addr.arpa.", RecordType::PTR, Some("localhost. No Error")),
            ("1.0.0.127.in-addr.arpa.", RecordType::A, Some("SOA 127.in-addr.arpa. No Error")),
            ("x.invalid.", RecordType::A, Some("SOA invalid. Non-Existent Domain")),
            ("x.onion.", RecordType::A, Some("SOA onion. Non-Existent Domain")),
            ("localhost.example.", RecordType::A, None),
            ("1.0.0.10.in-addr.arpa.", RecordType::PTR, None),
        ] {
            assert_eq!(told(name, kind).as_deref(), want, "{name} {kind}");
        }
    }
}
