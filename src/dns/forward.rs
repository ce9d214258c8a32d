//! Names that are not ours, looked up by others: hickory's resolver with its cache, one for each set of upstreams.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    pin::pin,
    str::FromStr,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use hickory_net::{DnsError, NetError, runtime::TokioRuntimeProvider};
use hickory_proto::{
    op::{Query, ResponseCode},
    rr::{Name, RecordType},
};
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    lookup::Lookup,
};

use super::{answer::Answer, counted::Counted, handler::Elsewhere, places::Places, upstream::Probe};
use crate::metrics::DnsMetrics;

/// An upstream has this long for one try. Clients wait 5 s (resolv.conf(5)): a try and one more fit into that.
const TRY: Duration = Duration::from_secs(2);
const MORE_TRIES: usize = 1;
/// A cached answer lives no longer than this, whatever its TTL says (RFC 8767, 4 recommends a cap of days; ours is for nodes).
const LONGEST: Duration = Duration::from_secs(3600);
/// The same of negative answers (RFC 2308, 5 recommends one to three hours at most).
const LONGEST_NEGATIVE: Duration = Duration::from_secs(300);

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

/// The upstreams of a zone.
struct Resolvers {
    /// By UDP, and by TCP where an answer is too large for that.
    any: TokioResolver,
    /// By TCP alone. hickory-resolver asks two upstreams at once, and gives up when the second one says too that its answer is
    /// too large (`NameServerPool::send`, 0.26.3: the first such answer has switched UDP off by then).
    tcp: TokioResolver,
    /// Each upstream by itself, where there are several. hickory-resolver takes the first answer there is, also one that says
    /// no more than that this upstream can't or won't (`NameServerPool::try_send`, 0.26.3).
    each: Vec<TokioResolver>,
}

impl Resolvers {
    async fn lookup(&self, name: Name, kind: RecordType) -> Result<Lookup, NetError> {
        let unwilling = match self.any.lookup(name.clone(), kind).await {
            Err(NetError::Truncated) => return self.tcp.lookup(name, kind).await,
            Err(e @ NetError::Dns(DnsError::ResponseCode(_))) => e,
            found => return found,
        };
        for one in &self.each {
            match one.lookup(name.clone(), kind).await {
                Err(NetError::Truncated) => return self.tcp.lookup(name, kind).await,
                Err(e) if !matches!(e, NetError::Dns(DnsError::NoRecordsFound(_))) => {}
                found => return found,
            }
        }
        Err(unwilling)
    }
}

/// Looks names up elsewhere.
pub struct Forwarder {
    /// By zone, the longest first; the root zone last, where there are upstreams for it.
    zones: Vec<(Name, Resolvers)>,
    /// Lookups that run. Each takes sockets, and the agent has other uses for those.
    running: Arc<Places>,
    probe: Arc<Probe>,
    metrics: DnsMetrics,
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.zones.iter().map(|(zone, _)| zone)).finish()
    }
}

impl Forwarder {
    /// A forwarder with at most `most` lookups at once, half of them for one client.
    ///
    /// # Errors
    /// A text for people.
    pub fn new(
        config: &ForwardConfig,
        most: usize,
        probe: Arc<Probe>,
        metrics: DnsMetrics,
    ) -> Result<Self, String> {
        let counted = Counted(metrics.clone());
        let build = |upstreams: &[SocketAddr]| {
            ::metrics::with_local_recorder(&counted, || {
                let udp = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
                let tcp = [ConnectionConfig::tcp()];
                let build = |of: &[SocketAddr], ways: &[ConnectionConfig]| resolver(of, config.cache, ways);
                let alone = if upstreams.len() > 1 { upstreams } else { &[] };
                let each = alone.iter().map(|at| build(&[*at], &udp)).collect::<Result<_, _>>()?;
                Ok(Resolvers { any: build(upstreams, &udp)?, tcp: build(upstreams, &tcp)?, each })
            })
            .map_err(|e: NetError| format!("upstreams {upstreams:?}: {e}"))
        };
        let mut zones = Vec::new();
        for zone in &config.zones {
            zones.push((zone.zone.clone(), build(&zone.upstreams)?));
        }
        if !config.upstreams.is_empty() {
            zones.push((Name::root(), build(&config.upstreams)?));
        }
        zones.sort_by_key(|(zone, _)| std::cmp::Reverse(zone.iter().count()));
        Ok(Self { zones, running: Places::new(most, 2), probe, metrics })
    }

    fn resolver(&self, name: &Name) -> Option<&Resolvers> {
        self.zones.iter().find(|(zone, _)| zone.zone_of(name)).map(|(_, resolver)| resolver)
    }

    /// Looks a client's question up.
    pub async fn lookup(&self, query: &Query, client: IpAddr) -> Answer {
        let Some(resolver) = self.resolver(query.name()) else {
            return Answer::code(ResponseCode::Refused);
        };
        let mut name = query.name().clone();
        name.set_fqdn(true);
        let mut lookup = pin!(resolver.lookup(name, query.query_type()));
        // What is in the cache is there at once, and takes no place.
        let at_once = std::future::poll_fn(|context| Poll::Ready(lookup.as_mut().poll(context))).await;
        let found = match at_once {
            Poll::Ready(found) => found,
            Poll::Pending => {
                let Some(_place) = self.running.take(client) else {
                    self.metrics.limited("forwards");
                    return Answer::code(ResponseCode::ServFail);
                };
                lookup.await
            }
        };
        match found {
            Ok(found) => Answer {
                code: ResponseCode::NoError,
                answers: found.answers().to_vec(),
                authorities: found.authorities().to_vec(),
                additionals: Vec::new(),
            },
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                let mut authorities = none.authorities.map(|a| a.to_vec()).unwrap_or_default();
                if authorities.is_empty() {
                    authorities.extend(none.soa.map(|soa| soa.into_record_of_rdata()));
                }
                Answer { code: none.response_code, authorities, ..Answer::default() }
            }
            Err(e) => {
                tracing::debug!("{}: {e}", query.name());
                Answer::code(ResponseCode::ServFail)
            }
        }
    }
}

impl Elsewhere for Forwarder {
    fn covers(&self, name: &Name) -> bool {
        self.resolver(name).is_some()
    }

    fn is_loop(&self, name: &Name, client: IpAddr) -> bool {
        self.probe.is_echo(name, client) || self.probe.is_loop(client)
    }
}

fn resolver(
    upstreams: &[SocketAddr],
    cache: u64,
    ways: &[ConnectionConfig],
) -> Result<TokioResolver, NetError> {
    let servers = upstreams.iter().map(|at| {
        let on = |way: &ConnectionConfig| {
            let mut connection = way.clone();
            connection.port = at.port();
            connection
        };
        let connections = ways.iter().map(on).collect();
        NameServerConfig::new(at.ip(), true, connections)
    });
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    let mut options = ResolverOpts::default();
    options.timeout = TRY;
    options.attempts = MORE_TRIES;
    options.cache_size = cache;
    options.use_hosts_file = ResolveHosts::Never;
    options.preserve_intermediates = true;
    options.try_tcp_on_error = true;
    options.positive_max_ttl = Some(LONGEST);
    options.negative_max_ttl = Some(LONGEST_NEGATIVE);
    options.edns_payload_len = super::message::LARGEST_UDP;
    options.enable_per_name_server_metrics = true;
    *builder.options_mut() = options;
    builder.build()
}
