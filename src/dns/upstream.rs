//! Looks whether upstreams answer, and whether one of them is ourselves.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Header, Message, Query, ResponseCode},
    rr::{Name, RecordType},
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use tokio::net::UdpSocket;

use super::choice::Random;
use crate::metrics::DnsMetrics;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);
/// An upstream has this long to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// The zone of what is asked of upstreams for everything: nobody has it. Not below `invalid.`, which many resolvers, ours among
/// them, answer without asking anyone (RFC 6761, 6.4), so that no loop shows.
const ZONE: &str = "meshlb-probe.";
/// Whoever has brought back a question of ours forwards to us what we forward to it, until it has not done so for this long: of
/// several upstreams behind one address each look meets but one.
const LOOPS_FOR: Duration = Duration::from_secs(120);
/// So many of them are remembered.
const MOST_LOOPS: usize = 64;
/// So long an upstream that does not know EDNS is asked without: it may be replaced by one that does (RFC 6891, 6.2.2).
const PLAIN_FOR: Duration = Duration::from_secs(300);
/// Names of so many looks at an upstream are remembered.
const LAST_NAMES: usize = 3;

/// Looks at all upstreams.
#[derive(Debug)]
pub struct Probe {
    watched: Vec<Watched>,
    /// Who has brought our questions back, and when last.
    loops: Mutex<HashMap<IpAddr, Instant>>,
}

/// What is known of an upstream: by looks at it, and by its answers to others' questions, which weigh more. That it does not answer
/// a question of ours for a name that nobody has may be its way with such names.
#[derive(Default, Debug)]
pub struct State {
    down: AtomicBool,
    /// It says that it can't or won't.
    unwilling: AtomicBool,
    /// Microseconds until it answered.
    took: AtomicU32,
    /// It has answered others' questions since the last look.
    answered: AtomicBool,
    /// When it was found not to know EDNS, and to answer without.
    plain: Mutex<Option<Instant>>,
}

impl State {
    /// Whether it answers, as far as is known.
    pub fn is_good(&self) -> bool {
        let (down, unwilling, _) = self.rank();
        !down && !unwilling
    }

    /// Whether it said nothing at all.
    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    /// The lower the sooner it is asked: the quicker one first, those that answer nothing last.
    pub fn rank(&self) -> (bool, bool, u32) {
        let [down, unwilling] = [&self.down, &self.unwilling].map(|is| is.load(Ordering::Relaxed));
        (down, unwilling, self.took.load(Ordering::Relaxed))
    }

    /// It has answered someone's question.
    pub fn answered(&self) {
        for (what, is) in [(&self.answered, true), (&self.down, false), (&self.unwilling, false)] {
            // Mostly it is so already, and others read it.
            if what.load(Ordering::Relaxed) != is {
                what.store(is, Ordering::Relaxed);
            }
        }
    }

    /// It has answered a question without EDNS that it did not understand with it.
    pub fn lacks_edns(&self, now: Instant) {
        *self.plain.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Whether it is asked with EDNS.
    pub fn takes_edns(&self, now: Instant) -> bool {
        let since = *self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_none_or(|since| now.saturating_duration_since(since) > PLAIN_FOR)
    }

    /// Takes over what a look at it has shown; whether it answers at all.
    fn note(&self, answer: Option<ResponseCode>, took: Duration) -> bool {
        let good = self.answered.swap(false, Ordering::Relaxed);
        let down = answer.is_none() && !good;
        let unwilling = matches!(answer, Some(ResponseCode::Refused | ResponseCode::ServFail)) && !good;
        self.down.store(down, Ordering::Relaxed);
        self.unwilling.store(unwilling, Ordering::Relaxed);
        if answer.is_some() || down {
            self.took.store(u32::try_from(took.as_micros()).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
        !down
    }
}

/// One upstream and what it is asked. A question that comes back to us shows a loop.
#[derive(Debug)]
struct Watched {
    upstream: SocketAddr,
    /// The zone that it is asked for.
    zone: Name,
    /// The names that it was asked for last, the newest at the end: another one each time, since what it remembers it does not
    /// send on. A question may come back late.
    names: Mutex<VecDeque<Name>>,
    /// The question has come back since it was asked.
    echoed: AtomicBool,
    looped: AtomicBool,
    state: Arc<State>,
}

impl Probe {
    /// Of these upstreams, each with the zone that it is asked for.
    pub fn new(upstreams: &[(Name, SocketAddr)]) -> Self {
        let watched = upstreams.iter().map(|(zone, upstream)| Watched {
            upstream: *upstream,
            zone: zone.clone(),
            names: Mutex::default(),
            echoed: AtomicBool::new(false),
            looped: AtomicBool::new(false),
            state: Arc::default(),
        });
        Self { watched: watched.collect(), loops: Mutex::default() }
    }

    /// What is known of an upstream that is asked for a zone.
    pub fn state(&self, zone: &Name, upstream: SocketAddr) -> Arc<State> {
        let watched = self.watched.iter().find(|w| w.upstream == upstream && w.zone == *zone);
        watched.map(|w| w.state.clone()).unwrap_or_default()
    }

    /// Whether a question is one of these; that it was asked, and by whom, is remembered.
    pub fn is_echo(&self, name: &Name, client: IpAddr) -> bool {
        let Some(watched) = self.watched.iter().find(|w| w.has_asked(name)) else { return false };
        watched.echoed.store(true, Ordering::Relaxed);
        let mut loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        loops.retain(|_, at| at.elapsed() < LOOPS_FOR);
        if loops.len() < MOST_LOOPS || loops.contains_key(&client) {
            loops.insert(client, Instant::now());
        }
        true
    }

    /// Whether a client forwards to us what we forward to it, or to one behind it.
    pub fn is_loop(&self, client: IpAddr) -> bool {
        let loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        loops.get(&client).is_some_and(|at| at.elapsed() < LOOPS_FOR)
    }

    /// What is wrong with upstreams at present.
    pub fn problems(&self) -> Vec<String> {
        let mut out = BTreeSet::new();
        for watched in &self.watched {
            let upstream = watched.upstream;
            if watched.state.down.load(Ordering::Relaxed) {
                out.insert(format!("DNS upstream {upstream} does not answer"));
            }
            if watched.looped.load(Ordering::Relaxed) {
                out.insert(format!(
                    "DNS upstream {upstream} sends our own questions back to us, a loop: what it asks is refused but for \
                     our zone; take it out of --dns-upstream, or have it forward only our zone here"
                ));
            }
        }
        out.into_iter().collect()
    }

    /// Looks at all of them again and again.
    pub async fn watch(&self, metrics: &DnsMetrics) {
        futures::future::join_all(self.watched.iter().map(|watched| watched.watch(metrics))).await;
    }
}

/// A name in a zone that is not there.
fn question(zone: &Name, random: u64) -> Name {
    let label = format!("meshlb-{random:016x}");
    let under = if zone.is_root() { Name::from_ascii(ZONE).unwrap_or_default() } else { zone.clone() };
    // A zone so long that no label fits before it is asked for itself, as others may do.
    under.prepend_label(label).unwrap_or(under)
}

impl Watched {
    /// A name to ask for.
    fn next_name(&self) -> Name {
        let name = question(&self.zone, Random::default().number());
        if name == self.zone {
            return name;
        }
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= LAST_NAMES {
            names.pop_front();
        }
        names.push_back(name.clone());
        name
    }

    fn has_asked(&self, name: &Name) -> bool {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    async fn watch(&self, metrics: &DnsMetrics) {
        loop {
            self.echoed.store(false, Ordering::Relaxed);
            let began = Instant::now();
            let answer =
                tokio::time::timeout(PATIENCE, self.ask(self.upstream)).await.ok().and_then(Result::ok);
            let up = self.state.note(answer, began.elapsed());
            metrics.upstream_up(self.upstream, &self.zone, up);
            self.looped.store(self.echoed.load(Ordering::Relaxed), Ordering::Relaxed);
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn ask(&self, upstream: SocketAddr) -> std::io::Result<ResponseCode> {
        let mut request = Message::query();
        let id = request.metadata.id;
        request.metadata.recursion_desired = true;
        request.add_query(Query::query(self.next_name(), RecordType::A));
        let bytes = request.to_vec().map_err(std::io::Error::other)?;
        let any: SocketAddr = if upstream.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(upstream).await?;
        let mut buffer = [0; 512];
        // A datagram may get lost.
        for _ in 0..2 {
            socket.send(&bytes).await?;
            let read = tokio::time::timeout(PATIENCE / 3, socket.recv(&mut buffer)).await;
            match read {
                Ok(Ok(n)) => match Header::read(&mut BinDecoder::new(buffer.get(..n).unwrap_or_default())) {
                    Ok(header) if header.metadata.id == id => return Ok(header.metadata.response_code),
                    _ => {}
                },
                Err(_) => {}
                Ok(Err(e)) => return Err(e),
            }
        }
        Err(std::io::ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_that_answers_others_is_not_down() {
        let state = State::default();
        let second = Duration::from_secs(1);
        assert!(!state.note(None, second) && state.is_down() && !state.is_good());
        // A look that comes to nothing says nothing where there are answers.
        state.answered();
        assert!(state.is_good());
        assert!(state.note(None, 2 * second) && state.is_good());
        assert_eq!(state.rank(), (false, false, 1_000_000), "how quick it is, no look has told");
        assert!(!state.note(None, second), "none since the last look");
        // Nor does one that is refused.
        assert!(state.note(Some(ResponseCode::Refused), second) && !state.is_good() && !state.is_down());
        state.answered();
        assert!(state.is_good());
        assert!(state.note(Some(ResponseCode::ServFail), second) && state.is_good());
        assert!(state.note(Some(ResponseCode::NXDomain), second) && state.is_good());
    }

    #[test]
    fn that_an_upstream_lacks_edns_is_not_believed_for_ever() {
        let (state, now) = (State::default(), Instant::now());
        assert!(state.takes_edns(now));
        state.lacks_edns(now);
        assert!(!state.takes_edns(now + PLAIN_FOR) && state.takes_edns(now + PLAIN_FOR + PATIENCE));
    }

    /// An upstream that has an answer to a name keeps it, and so hides a loop that is made later.
    #[test]
    fn each_look_asks_for_another_name() {
        let upstream = ([192, 0, 2, 1], 53).into();
        let probe =
            Probe::new(&[(Name::root(), upstream), (Name::from_ascii("corp.example.").unwrap(), upstream)]);
        let asked: Vec<Name> = (0..4).map(|_| probe.watched[1].next_name()).collect();
        assert_eq!(asked.iter().collect::<std::collections::HashSet<_>>().len(), 4);
        assert!(asked.iter().all(|name| probe.watched[1].zone.zone_of(name)));
        let client = [10, 0, 0, 1].into();
        assert!(!probe.is_echo(&asked[0], client), "long ago");
        assert!(!probe.is_loop(client));
        for name in &asked[1..] {
            probe.watched[1].echoed.store(false, Ordering::Relaxed);
            assert!(probe.is_echo(name, client));
            assert!(probe.watched[1].echoed.load(Ordering::Relaxed));
        }
        assert!(probe.is_loop(client));
        assert!(!probe.watched[0].echoed.load(Ordering::Relaxed));
    }
}
