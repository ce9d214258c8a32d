//! Names that every resolver answers by itself.

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        domain::usage::{IN_ADDR_ARPA_127, INVALID, IP6_ARPA_1, LOCALHOST, ONION},
        rdata::{A, AAAA, PTR, SOA},
    },
};

use super::{answer::Answer, zone::is_loopback};

/// Seconds that the names of the machine itself may be kept.
const LOCAL_TTL: u32 = 3600;

/// Whether it is a name that nobody has, unless someone is named who does (RFC 6761, 6.4; RFC 7686, 2).
pub fn is_nobodys(name: &Name) -> bool {
    INVALID.zone_of(name) || ONION.zone_of(name)
}

/// The answer to a question about such a name, or about one of the machine itself (RFC 6761, 6.3). Each of their zones is served
/// here, so it is here that is said for how long there is nothing (RFC 2308, 3).
pub fn special(query: &Query) -> Option<Answer> {
    let (name, kind) = (query.name(), query.query_type());
    let zones = [&INVALID, &ONION, &LOCALHOST, &IN_ADDR_ARPA_127, &IP6_ARPA_1];
    let zone = zones.into_iter().find(|zone| zone.zone_of(name))?.name();
    let none = |code| Some(Answer { code, authorities: vec![soa(zone)], ..Answer::default() });
    if is_nobodys(name) {
        return none(ResponseCode::NXDomain);
    }
    let data = if is_loopback(name) {
        match name.parse_arpa_name() {
            // Below an address's name there is none.
            Err(_) => return none(ResponseCode::NXDomain),
            Ok(net) if net.prefix_len() < net.max_prefix_len() => None,
            Ok(_) => (kind == RecordType::PTR).then(|| RData::PTR(PTR(LOCALHOST.name().clone()))),
        }
    } else {
        match kind {
            RecordType::A => Some(RData::A(A(Ipv4Addr::LOCALHOST))),
            RecordType::AAAA => Some(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
            _ => None,
        }
    };
    let Some(data) = data else { return none(ResponseCode::NoError) };
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
        let none6 = format!("SOA {} No Error", IP6_ARPA_1.name());
        for (name, kind, want) in [
            ("localhost.", RecordType::A, Some("127.0.0.1 No Error")),
            ("x.localhost.", RecordType::AAAA, Some("::1 No Error")),
            ("x.localhost.", RecordType::MX, Some("SOA localhost. No Error")),
            ("1.0.0.127.in-addr.arpa.", RecordType::PTR, Some("localhost. No Error")),
            ("1.0.0.127.in-addr.arpa.", RecordType::A, Some("SOA 127.in-addr.arpa. No Error")),
            ("127.in-addr.arpa.", RecordType::PTR, Some("SOA 127.in-addr.arpa. No Error")),
            ("0.127.in-addr.arpa.", RecordType::PTR, Some("SOA 127.in-addr.arpa. No Error")),
            ("x.1.0.0.127.in-addr.arpa.", RecordType::PTR, Some("SOA 127.in-addr.arpa. Non-Existent Domain")),
            ("300.0.0.127.in-addr.arpa.", RecordType::PTR, Some("SOA 127.in-addr.arpa. Non-Existent Domain")),
            (&IP6_ARPA_1.name().to_ascii(), RecordType::PTR, Some("localhost. No Error")),
            (&IP6_ARPA_1.name().to_ascii(), RecordType::A, Some(none6.as_str())),
            ("x.invalid.", RecordType::A, Some("SOA invalid. Non-Existent Domain")),
            ("x.onion.", RecordType::A, Some("SOA onion. Non-Existent Domain")),
            ("localhost.example.", RecordType::A, None),
            ("1.0.0.10.in-addr.arpa.", RecordType::PTR, None),
        ] {
            assert_eq!(told(name, kind).as_deref(), want, "{name} {kind}");
        }
    }
}
