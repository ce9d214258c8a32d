//! What `show` and `explain` tell of a service's names.

use std::{
    collections::BTreeSet,
    fmt::Write,
    net::{IpAddr, SocketAddr},
};

use hickory_proto::rr::RecordType;
use serde::Serialize;

use crate::{
    dns::{
        ask,
        names::Names,
        records::{Main, ServiceNames},
    },
    model::{
        ids::{Family, ServiceKey},
        service::DnsAnswer,
    },
};

/// A name and what it answers.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct NameReport {
    /// The name.
    pub name: String,
    /// `A` or `AAAA`; `SRV` for ports.
    pub kind: &'static str,
    /// What it should answer.
    pub answers: Vec<String>,
    /// Only one of them at a time.
    pub single: bool,
    /// `ok`, or how the server's answer differs; absent where it has not been asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// Endpoints whose own names are told, and asked for: a service may have thousands.
const MOST_ENDPOINTS: usize = 10;

/// How many endpoints of a service have names that [`of`] leaves out.
pub fn left_out(names: &Names, key: &ServiceKey) -> usize {
    names.get(key).map_or(0, |service| service.labels().skip(MOST_ENDPOINTS).count())
}

/// The names of a service: its own, its aliases, its endpoints' together, its ports, and those of some endpoints.
pub fn of(names: &Names, key: &ServiceKey) -> Vec<NameReport> {
    let Some(service) = names.get(key) else { return Vec::new() };
    let below = format!("{}.{}", key.namespace, names.zone().name.to_ascii().trim_end_matches('.'));
    let own = format!("{}.{below}", key.name);
    let mut out = main(service, &own);
    for alias in names.aliases(key) {
        out.extend(main(service, &format!("{alias}.{below}")));
    }
    for (family, tasks) in service.tasks.iter() {
        let tasks = tasks.entries().iter().map(|(ip, _)| *ip);
        out.extend(name(format!("tasks.{own}"), family, tasks, false));
    }
    for port in &service.ports {
        let target = |label: &Option<std::sync::Arc<str>>| match label {
            Some(label) => format!("{label}.{own}"),
            None => own.clone(),
        };
        out.push(NameReport {
            name: format!("_{}._{}.{own}", port.name, port.protocol.lower()),
            kind: "SRV",
            answers: port.targets.iter().map(|t| format!("{}:{}", target(&t.label), t.port)).collect(),
            single: false,
            state: None,
        });
    }
    for label in service.labels().take(MOST_ENDPOINTS) {
        for family in Family::ALL {
            let mut addresses = service.labelled(label).filter(|ip| Family::of(ip) == family).peekable();
            if addresses.peek().is_some() {
                out.extend(name(format!("{label}.{own}"), family, addresses, false));
            }
        }
    }
    out
}

fn main(service: &ServiceNames, text: &str) -> Vec<NameReport> {
    match &service.main {
        Main::Vips(vips) => vips.iter().flat_map(|(f, ip)| name(text.to_owned(), f, [*ip], false)).collect(),
        Main::Endpoints(answer, of) => of
            .iter()
            .flat_map(|(family, addresses)| {
                let addresses = addresses.entries().iter().map(|(ip, _)| *ip);
                name(text.to_owned(), family, addresses, *answer == DnsAnswer::Single)
            })
            .collect(),
    }
}

fn name(
    name: String,
    family: Family,
    of: impl IntoIterator<Item = IpAddr>,
    single: bool,
) -> Option<NameReport> {
    let kind = if family == Family::V4 { "A" } else { "AAAA" };
    let answers = of.into_iter().map(|ip| ip.to_string()).collect();
    Some(NameReport { name, kind, answers, single, state: None })
}

/// Asks a server for these names and notes how it answers.
pub fn ask(reports: &mut [NameReport], server: SocketAddr) {
    for report in reports.iter_mut() {
        let kind = match report.kind {
            "A" => RecordType::A,
            "AAAA" => RecordType::AAAA,
            _ => RecordType::SRV,
        };
        let state = match ask::texts(server, &format!("{}.", report.name), kind) {
            Err(e) => e,
            Ok((found, cut)) => verdict(report, &found, cut),
        };
        let silent = state.starts_with("no answer");
        report.state = Some(state);
        if silent {
            // The next one would take as long.
            return;
        }
    }
}

/// Whether this is what it should answer; of an answer that was `cut` a part is.
fn verdict(report: &NameReport, found: &[String], cut: bool) -> String {
    let want: BTreeSet<&str> = report.answers.iter().map(String::as_str).collect();
    let have: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    let right = match (report.single, cut) {
        (true, _) => have.is_subset(&want) && have.len() == want.len().min(1),
        (false, true) => have.is_subset(&want) && !have.is_empty(),
        (false, false) => have == want,
    };
    if right {
        "ok".into()
    } else if found.is_empty() {
        "answers nothing".into()
    } else {
        format!("answers {}", found.join(" "))
    }
}

/// Whether each is answered as it should be, as far as it was asked.
pub fn fine(reports: &[NameReport]) -> bool {
    reports.iter().all(|report| report.state.as_deref().is_none_or(|state| state == "ok"))
}

/// A line a name. Of `left_out` endpoints the names are not there.
pub fn lines(out: &mut String, reports: &[NameReport], left_out: usize, server: Option<SocketAddr>) {
    let asked = match server {
        Some(server) => format!("asked at {server}"),
        None => "no agent serves DNS here".into(),
    };
    let _ = writeln!(out, "\nnames, {asked}");
    for report in reports {
        let answers = match report.answers.as_slice() {
            [] => "nothing".to_owned(),
            all if report.single && all.len() > 1 => format!("one of {}", all.join(" ")),
            all => all.join(" "),
        };
        let state = report.state.as_ref().map_or(String::new(), |state| format!(": {state}"));
        let _ = writeln!(out, "  {} {} {answers}{state}", report.name, report.kind);
    }
    if left_out > 0 {
        let _ = writeln!(out, "  and names of {left_out} more endpoints");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        compile::endpoints::Place,
        dns::{
            forward::ForwardConfig,
            ports,
            records::Context,
            server::{Config, Server},
            zone::Zone,
        },
        metrics::DnsMetrics,
        model::{
            fixtures::{config, endpoint, port, service, slice},
            ids::PerFamily,
            service::{Mode, Service},
        },
    };

    #[test]
    fn names_of_ports_and_of_some_endpoints_are_asked_for() {
        let zone = Zone::new("mesh.internal", config().ranges).unwrap();
        let mut ports = vec![port(80, 8080)];
        ports[0].name = Some("pg".into());
        let db = Service { mode: Mode::Dnsrr, ports, ..service("db") };
        let ends = (1..=12).map(|i| endpoint(&format!("10.244.1.{i}"), "n1")).collect();
        let context = Context { place: Place { node: "n1", zone: None }, vips: PerFamily::default() };
        let mut names = Names::new(zone.clone());
        names.set(&db.key, Some(ServiceNames::new(&db, &[slice("db", ends)], context, None)));
        let at: SocketAddr = ([127, 0, 54, 2], 5300).into();
        let config = Config {
            listen: vec![at],
            allow: vec!["127.0.0.0/8".parse().unwrap()],
            allow_outside: None,
            inside: vec![],
            allow_pods: false,
            rate: 0,
            forward: ForwardConfig::default(),
            remembered: HashSet::new(),
            ports: ports::DEFAULT,
        };
        let server = Server::start(&config, zone, BTreeSet::new(), DnsMetrics::default()).unwrap();
        server.publish(names.publish(true));
        let begun = Instant::now();
        while ask::addresses(at, "mesh.internal.", RecordType::A).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", server.problems());
            thread::sleep(Duration::from_millis(20));
        }
        let mut reports = of(&names, &db.key);
        assert_eq!((reports.len(), left_out(&names, &db.key)), (2 + 1 + 10, 2));
        ask(&mut reports, at);
        assert!(reports.iter().all(|report| report.state.as_deref() == Some("ok")), "{reports:#?}");
        // Something else than is answered.
        let mut port =
            of(&names, &db.key).into_iter().filter(|report| report.kind == "SRV").collect::<Vec<_>>();
        port[0].answers.pop();
        ask(&mut port, at);
        assert!(port[0].state.as_ref().unwrap().starts_with("answers "), "{port:?}");
        let texts = port[0].answers.clone();
        assert_eq!((verdict(&port[0], &texts[..3], true), fine(&port)), ("ok".into(), false));
        assert_ne!(verdict(&port[0], &texts[..3], false), "ok");
    }
}
