//! Answers of others, kept for as long as they say. One cache for all zones, so that its size is what was asked for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::CNAME},
};
use moka::Expiry;

use super::answer::Answer;

/// A cached answer lives no longer than this, whatever its TTL says (RFC 8767, 4 recommends a cap of days; ours is for nodes).
const LONGEST: Duration = Duration::from_secs(3600);
/// The same of negative answers (RFC 2308, 5 recommends one to three hours at most).
const LONGEST_NEGATIVE: Duration = Duration::from_secs(300);
/// That nobody has answered is remembered for this long (RFC 9520, 3.2 asks for one second at least): shorter than clients wait
/// before they ask again (resolv.conf(5): 5 s).
const FAILURE: Duration = Duration::from_secs(2);
/// Longer answers, in bytes as they are sent, are not kept: what the cache may take is this for each of its places.
const LARGEST: usize = 4096;

/// An answer as it was sent: a fraction of what its records take in memory.
#[derive(Clone)]
struct Kept {
    bytes: Arc<[u8]>,
    at: Instant,
    until: Instant,
}

struct Until;

impl Expiry<Query, Kept> for Until {
    fn expire_after_create(&self, _: &Query, kept: &Kept, now: Instant) -> Option<Duration> {
        Some(kept.until.saturating_duration_since(now))
    }

    fn expire_after_update(
        &self,
        _: &Query,
        kept: &Kept,
        now: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(kept.until.saturating_duration_since(now))
    }
}

/// Answers by their questions.
pub struct Cache {
    kept: moka::sync::Cache<Query, Kept>,
    /// The zone that is ours.
    zone: Name,
}

impl Cache {
    /// For so many answers of others than this zone.
    pub fn new(most: u64, zone: Name) -> Self {
        let kept = moka::sync::Cache::builder().max_capacity(most).expire_after(Until).build();
        Self { kept, zone }
    }

    /// The answer to a question, its TTLs as they are by now.
    pub fn get(&self, query: &Query, now: Instant) -> Option<Answer> {
        let kept = self.kept.get(query).filter(|kept| now < kept.until)?;
        let message = Message::from_vec(&kept.bytes).ok()?;
        let age = u32::try_from(now.saturating_duration_since(kept.at).as_secs()).unwrap_or(u32::MAX);
        let aged = |mut record: Record| {
            record.ttl = record.ttl.min(LONGEST.as_secs() as u32).saturating_sub(age);
            record
        };
        Some(Answer {
            code: message.metadata.response_code,
            answers: message.answers.into_iter().map(aged).collect(),
            authorities: message.authorities.into_iter().map(aged).collect(),
            ..Answer::default()
        })
    }

    /// Keeps an answer for as long as it may be.
    pub fn put(&self, query: Query, answer: &Answer, now: Instant) {
        let lifetime = lifetime(query.query_type(), answer, &self.zone);
        self.keep(query, answer, lifetime, now);
    }

    /// What is answered where nobody has answered a lookup, which is remembered: what another lookup has found meanwhile, as long
    /// as that may be kept, else a failure.
    pub fn put_failure(&self, query: Query, now: Instant) -> Answer {
        if let Some(good) = self.get(&query, now).filter(|answer| answer.code != ResponseCode::ServFail) {
            return good;
        }
        let failure = Answer::code(ResponseCode::ServFail);
        self.keep(query, &failure, FAILURE, now);
        failure
    }

    /// How many answers there are.
    pub fn len(&self) -> u64 {
        // What has expired is taken out now and then only.
        self.kept.run_pending_tasks();
        self.kept.entry_count()
    }

    fn keep(&self, query: Query, answer: &Answer, lifetime: Duration, now: Instant) {
        if lifetime.is_zero() {
            return;
        }
        let mut message = Message::new(0, MessageType::Response, OpCode::Query);
        message.metadata.response_code = answer.code;
        message.answers.clone_from(&answer.answers);
        message.authorities.clone_from(&answer.authorities);
        let Ok(bytes) = message.to_vec() else { return };
        if bytes.len() <= LARGEST {
            self.kept.insert(query, Kept { bytes: bytes.into(), at: now, until: now + lifetime });
        }
    }
}

/// How long an answer may be kept: nothing where it does not say so itself. Aliases into `ours` need no more than themselves.
fn lifetime(kind: RecordType, answer: &Answer, ours: &Name) -> Duration {
    if !matches!(answer.code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return Duration::ZERO;
    }
    let seconds = |n: u32| Duration::from_secs(n.into());
    let records = answer.answers.iter().map(|record| seconds(record.ttl)).min();
    let found = answer.answers.iter().any(|record| kind == RecordType::ANY || record.record_type() == kind);
    if found && answer.code == ResponseCode::NoError {
        return records.unwrap_or_default().min(LONGEST);
    }
    // RFC 2308, 5: what is not there is not there for as long as the zone says, and aliases lead to it for as long as they say.
    let zone = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(seconds(record.ttl.min(soa.minimum))),
        _ => None,
    });
    let leads_here = || {
        let mut targets = answer.answers.iter().filter_map(|record| match &record.data {
            RData::CNAME(CNAME(target)) => Some(target),
            _ => None,
        });
        targets.any(|target| ours.zone_of(target))
    };
    // Where nobody says that there is nothing, the upstream has failed to find out where the aliases lead.
    let longest = if zone.is_some() || leads_here() { LONGEST_NEGATIVE } else { FAILURE };
    zone.into_iter().chain(records).min().unwrap_or_default().min(longest)
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{
        Name,
        rdata::{A, SOA},
    };

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn query(kind: RecordType) -> Query {
        Query::query(name("www.example."), kind)
    }

    fn address(ttl: u32) -> Record {
        Record::from_rdata(name("www.example."), ttl, RData::A(A([192, 0, 2, 1].into())))
    }

    fn alias_to(target: &str, ttl: u32) -> Record {
        Record::from_rdata(name("www.example."), ttl, RData::CNAME(CNAME(name(target))))
    }

    fn alias(ttl: u32) -> Record {
        alias_to("far.example.", ttl)
    }

    fn cache(most: u64) -> Cache {
        Cache::new(most, name("mesh.internal."))
    }

    fn soa(ttl: u32, minimum: u32) -> Record {
        let data = SOA::new(name("ns.example."), name("h.example."), 1, 1, 1, 1, minimum);
        Record::from_rdata(name("example."), ttl, RData::SOA(data))
    }

    fn answer(code: ResponseCode, answers: &[Record], authorities: &[Record]) -> Answer {
        Answer { code, answers: answers.into(), authorities: authorities.into(), ..Answer::default() }
    }

    #[test]
    fn answers_live_as_long_as_they_say() {
        use ResponseCode::{NXDomain, NoError, Refused, ServFail};
        for (code, answers, authorities, seconds) in [
            (NoError, vec![address(60)], vec![], 60),
            (NoError, vec![address(100_000)], vec![], 3600),
            (NoError, vec![address(0)], vec![], 0),
            (NoError, vec![alias(7), address(60)], vec![soa(5, 5)], 7),
            (NoError, vec![], vec![soa(60, 30)], 30),
            (NoError, vec![], vec![soa(900, 900)], 300),
            (NXDomain, vec![], vec![soa(20, 30)], 20),
            // Who does not say how long it is not there is asked again.
            (NXDomain, vec![], vec![], 0),
            (NoError, vec![alias(60)], vec![soa(20, 30)], 20),
            (NXDomain, vec![alias(10)], vec![soa(20, 30)], 10),
            // An alias alone, and nobody knows where it leads: that may be known in a moment.
            (NoError, vec![alias(60)], vec![], 2),
            (NoError, vec![alias(1)], vec![], 1),
            (NXDomain, vec![alias(60)], vec![], 2),
            // Where it leads to us, there is no more to know.
            (NoError, vec![alias_to("vote.default.Mesh.internal.", 60)], vec![], 60),
            (NXDomain, vec![alias(60), alias_to("mesh.internal.", 900)], vec![], 60),
            (NoError, vec![alias_to("vote.default.mesh.internal.", 900)], vec![], 300),
            (ServFail, vec![], vec![soa(20, 30)], 0),
            (Refused, vec![address(60)], vec![], 0),
        ] {
            let got = lifetime(RecordType::A, &answer(code, &answers, &authorities), &name("mesh.internal."));
            assert_eq!(got.as_secs(), seconds, "{code} {answers:?} {authorities:?}");
        }
    }

    #[test]
    fn what_is_kept_grows_old_and_goes() {
        let (cache, start) = (cache(100), Instant::now());
        let a = query(RecordType::A);
        cache.put(a.clone(), &answer(ResponseCode::NoError, &[alias(300), address(60)], &[]), start);
        let got = cache.get(&a, start + Duration::from_secs(10)).unwrap();
        assert_eq!(got.answers.iter().map(|r| r.ttl).collect::<Vec<_>>(), [290, 50]);
        assert_eq!(got.answers[1].data, address(60).data);
        assert!(cache.get(&a, start + Duration::from_secs(60)).is_none());
        assert!(cache.get(&query(RecordType::AAAA), start).is_none());
        cache.put_failure(query(RecordType::AAAA), start);
        let failed = cache.get(&query(RecordType::AAAA), start + Duration::from_secs(1)).unwrap();
        assert_eq!(failed.code, ResponseCode::ServFail);
        assert!(cache.get(&query(RecordType::AAAA), start + Duration::from_secs(2)).is_none());
        assert_eq!(cache.len(), 2);
    }

    #[test]
    fn a_failure_takes_the_place_of_no_answer_that_still_holds() {
        let (cache, start) = (cache(100), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let a = || query(RecordType::A);
        assert_eq!(cache.put_failure(a(), start).code, ResponseCode::ServFail);
        cache.put(a(), &answer(ResponseCode::NoError, &[address(60)], &[]), after(1));
        // Another lookup of the same name fails later.
        assert_eq!(cache.put_failure(a(), after(3)).answers[0].data, address(60).data);
        assert_eq!(cache.get(&a(), after(4)).unwrap().answers.len(), 1);
        assert_eq!(cache.put_failure(a(), after(61)).code, ResponseCode::ServFail);
        assert_eq!(cache.get(&a(), after(62)).unwrap().code, ResponseCode::ServFail);
        // That there is nothing is an answer, too.
        let none = || query(RecordType::AAAA);
        cache.put(none(), &answer(ResponseCode::NXDomain, &[], &[soa(20, 30)]), start);
        assert_eq!(cache.put_failure(none(), after(1)).code, ResponseCode::NXDomain);
        assert_eq!(cache.get(&none(), after(2)).unwrap().code, ResponseCode::NXDomain);
    }

    #[test]
    fn the_cache_has_its_limits() {
        let (cache, now) = (cache(10), Instant::now());
        let many = vec![address(60); 1000];
        cache.put(query(RecordType::A), &answer(ResponseCode::NoError, &many, &[]), now);
        assert!(cache.get(&query(RecordType::A), now).is_none(), "longer than is kept");
        for i in 0..100 {
            let query = Query::query(name(&format!("w{i}.example.")), RecordType::A);
            cache.put(query, &answer(ResponseCode::NoError, &[address(60)], &[]), now);
        }
        assert!((1..=10).contains(&cache.len()), "{}", cache.len());
    }
}
