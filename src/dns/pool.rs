//! The upstreams of one zone, asked for one answer.

use std::{
    collections::VecDeque,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::stream::{FuturesUnordered, StreamExt as _};
use hickory_net::{
    DnsError, NetError,
    xfer::{DnsExchange, DnsHandle, FirstAnswer as _},
};
use hickory_proto::op::{DnsRequest, DnsRequestOptions, DnsResponse, Query, ResponseCode};
use hickory_resolver::{
    ConnectionProvider, NameServerPool, PoolContext, TlsConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
};

use super::{answer::Answer, counted::Counted, message::LARGEST_UDP, udp::Connecting, upstream::State};

/// An upstream has this long for one try.
const TRY: Duration = Duration::from_secs(2);
/// All tries together: clients wait 5 s (resolv.conf(5)).
const ALL: Duration = Duration::from_secs(4);
/// The same where none of them has answered when it was last looked at: who waits for them is in the way of others.
const ALL_DOWN: Duration = Duration::from_secs(1);
/// Tries of an upstream that says nothing.
const TRIES: usize = 2;
/// Upstreams that are asked at once, the quicker ones first.
const AT_ONCE: usize = 2;
/// While none of them says anything one more is asked, after each of these.
const NEXT: Duration = Duration::from_millis(400);
/// So many at once and no more. Each is asked by a socket of its own.
pub(super) const MOST: usize = 3;

/// hickory-resolver connects, and the socket sends a question again when it is time ([`Connecting`]). By the resolver's own measure that
/// is after many seconds where an upstream has said of some names that there are none: it takes that for a failure, and slower
/// (`NameServer::send_inner`, 0.26.3); and each sending has a socket of its own there.
#[derive(Clone, Default)]
struct Connect(Connecting);

/// A connection by which the resolver sends nothing again.
#[derive(Clone)]
struct Connection(DnsExchange<Connecting>);

impl ConnectionProvider for Connect {
    type Conn = Connection;
    type FutureConn = Pin<Box<dyn Future<Output = Result<Connection, NetError>> + Send>>;
    type RuntimeProvider = Connecting;

    fn new_connection(
        &self,
        ip: IpAddr,
        config: &ConnectionConfig,
        context: &PoolContext,
    ) -> Result<Self::FutureConn, NetError> {
        let connecting = self.0.new_connection(ip, config, context)?;
        Ok(Box::pin(async move { connecting.await.map(Connection) }))
    }

    fn runtime_provider(&self) -> &Connecting {
        &self.0
    }
}

impl DnsHandle for Connection {
    type Response = <DnsExchange<Connecting> as DnsHandle>::Response;
    type Runtime = Connecting;

    fn send(&self, mut request: DnsRequest) -> Self::Response {
        // After the try is over.
        request.options_mut().retry_interval = 2 * TRY;
        self.0.send(request)
    }
}

/// One of them. A pool of its own, since hickory-resolver takes the first answer of a pool, also one that says no more than
/// that this upstream can't or won't (`NameServerPool::try_send`, 0.26.3).
struct Upstream {
    pool: NameServerPool<Connect>,
    state: Arc<State>,
    counted: Counted,
}

impl Upstream {
    /// What it says, at its `n`-th try.
    async fn ask(&self, query: &Query, n: usize) -> (&Self, usize, Result<Answer, Failed>) {
        let edns = self.state.takes_edns(Instant::now());
        let mut answer = self.send(query, edns).await;
        let again = edns && is_foreign(&answer);
        if again {
            // It may be EDNS that it does not know (RFC 6891, 7), and mostly is.
            answer = self.send(query, false).await;
        }
        let told = told(answer);
        if told.is_ok() {
            self.state.answered();
            if again {
                self.state.lacks_edns(Instant::now());
            }
        }
        (self, n, told)
    }

    async fn send(&self, query: &Query, edns: bool) -> Result<DnsResponse, NetError> {
        let mut options = DnsRequestOptions::default();
        options.use_edns = edns;
        options.edns_payload_len = LARGEST_UDP;
        options.recursion_desired = true;
        self.counted.count(self.pool.lookup(query.clone(), options).first_answer()).await
    }
}

/// Why an upstream gives no answer.
pub(super) enum Failed {
    /// It says that it can't or won't.
    Unwilling,
    /// It says nothing.
    Silent,
}

/// All of them.
pub struct Upstreams(Vec<Upstream>);

impl Upstreams {
    /// Those that these count, of which this is known.
    ///
    /// # Errors
    /// The library's.
    pub fn new(of: impl IntoIterator<Item = (Counted, Arc<State>)>) -> Result<Self, NetError> {
        let mut options = ResolverOpts::default();
        options.timeout = TRY;
        options.try_tcp_on_error = true;
        options.edns_payload_len = LARGEST_UDP;
        // Of the kernel's choice: see `Connecting`. Letters in random case would be one more hurdle for who forges answers, but
        // names of answers come back in them, and clients would see those.
        options.os_port_selection = true;
        let context = Arc::new(PoolContext::new(options, TlsConfig::new()?));
        let all = of.into_iter().map(|(counted, state)| {
            let at = counted.upstream;
            // By TCP where an answer is too large for UDP.
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = at.port();
                connection
            });
            let server = NameServerConfig::new(at.ip(), true, connections.into());
            let pool = NameServerPool::from_config([server], context.clone(), Connect::default());
            Upstream { pool, state, counted }
        });
        Ok(Self(all.collect()))
    }

    /// The first answer of one that is willing; `None` where there is none in time.
    pub async fn ask(&self, query: &Query) -> Option<Answer> {
        let down = self.0.iter().all(|upstream| upstream.state.is_down());
        tokio::time::timeout(if down { ALL_DOWN } else { ALL }, self.first(query)).await.ok().flatten()
    }

    async fn first(&self, query: &Query) -> Option<Answer> {
        let mut order: Vec<&Upstream> = self.0.iter().collect();
        order.sort_by_cached_key(|upstream| upstream.state.rank());
        let mut waiting: VecDeque<_> = order.into_iter().map(|upstream| (upstream, 1)).collect();
        let ask = |(upstream, n)| Upstream::ask(upstream, query, n);
        let mut asked = FuturesUnordered::new();
        loop {
            // One that is known not to answer costs a try only where no other one is left.
            while asked.len() < AT_ONCE
                && waiting.front().is_some_and(|(next, _)| asked.is_empty() || next.state.is_good())
            {
                asked.extend(waiting.pop_front().map(ask));
            }
            tokio::select! {
                told = asked.next(), if !asked.is_empty() => match told {
                    Some((_, _, Ok(answer))) => return Some(answer),
                    Some((upstream, n, Err(Failed::Silent))) if n < TRIES => waiting.push_back((upstream, n + 1)),
                    _ => {}
                },
                () = tokio::time::sleep(NEXT), if !waiting.is_empty() && asked.len() < MOST => {
                    asked.extend(waiting.pop_front().map(ask));
                }
                else => return None,
            }
        }
    }
}

/// Whether an upstream says that it does not understand what it is asked.
fn is_foreign(answer: &Result<DnsResponse, NetError>) -> bool {
    let code = match answer {
        Ok(response) => response.metadata.response_code,
        Err(NetError::Dns(DnsError::ResponseCode(code))) => *code,
        Err(_) => return false,
    };
    matches!(code, ResponseCode::FormErr | ResponseCode::NotImp)
}

/// What an upstream has said, as it has said it.
pub(super) fn told(answer: Result<DnsResponse, NetError>) -> Result<Answer, Failed> {
    match answer {
        Ok(response) => {
            let message = response.into_message();
            let code = message.metadata.response_code;
            if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
                return Err(Failed::Unwilling);
            }
            let (answers, authorities) = (message.answers, message.authorities);
            Ok(Answer { code, answers, authorities, ..Answer::default() })
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            let mut authorities = none.authorities.map(|a| a.to_vec()).unwrap_or_default();
            if authorities.is_empty() {
                authorities.extend(none.soa.map(|soa| soa.into_record_of_rdata()));
            }
            Ok(Answer { code: none.response_code, authorities, ..Answer::default() })
        }
        Err(NetError::Dns(_)) => Err(Failed::Unwilling),
        Err(e) => {
            tracing::debug!("an upstream: {e}");
            Err(Failed::Silent)
        }
    }
}
