//! `meshlb show`: services with their VIPs, marks, endpoints and counters.

use std::{fmt::Write, process::ExitCode, time::Duration};

use anyhow::{Result, bail};

use super::{
    ShowOutput,
    keeper::Purpose,
    notes::is_elsewhere,
    options::Options,
    print,
    report::{PortReport, Report, ServerReport, ServiceReport, report},
    session::Session,
};
use crate::{model::ids::ServiceKey, source::problem::one_line};

/// Shows all services, or those of one name.
///
/// # Errors
/// What could not be read, or that there is no such service.
pub fn run(options: &Options, name: Option<&str>, output: ShowOutput, watch: bool) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    loop {
        let mut session = Session::open(options, None, Purpose::Look)?;
        let report = read(&mut session, name)?;
        let text = match output {
            ShowOutput::Text if name.is_some() => wide(&report),
            ShowOutput::Text => summary(&report),
            ShowOutput::Wide => wide(&report),
            ShowOutput::Json => format!("{}\n", serde_json::to_string_pretty(&report)?),
        };
        if !watch {
            print::out(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        // Clear the screen, go to its first line.
        if !print::out(format_args!("\x1b[2J\x1b[H{text}"))? {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// Reads the report of all services, or of those that `name` means: `NAMESPACE/NAME` or `NAME`.
///
/// # Errors
/// What could not be read, or that there is no such service.
pub fn read(session: &mut Session, name: Option<&str>) -> Result<Report> {
    let (_, observed) = session.prepare()?;
    session.engine.recheck_listeners()?;
    let means = |key: &ServiceKey| match name {
        None => true,
        Some(name) if name.contains('/') => key.to_string() == name,
        Some(name) => &*key.name == name,
    };
    let problems: std::collections::BTreeMap<ServiceKey, Vec<String>> = session
        .engine
        .merged()
        .services()
        .values()
        .map(|service| (service.key.clone(), session.problems_of(service)))
        .collect();
    let source_problems = session.source_problems();
    session.names();
    let Session { engine, names, .. } = session;
    let Some(names) = names.get() else { bail!("names of services were not worked out") };
    let report = report(
        engine,
        &observed,
        source_problems,
        names,
        &|service| problems.get(&service.key).cloned().unwrap_or_default(),
        &|service| means(&service.key),
    )?;
    if let (Some(name), true) = (name, report.services.is_empty()) {
        let why = session.problems.iter().find(|p| {
            p.object
                .as_deref()
                .is_some_and(|o| o.ends_with(&format!("/{name}")) || o.ends_with(&format!(" {name}")))
        });
        let held = session.engine.held().iter().any(means);
        match why {
            Some(problem) if held => bail!(
                "{name} can't be read: {problem}; what the kernel has for it stays as it is, and a running agent goes on with \
                 the last good version"
            ),
            Some(problem) => bail!("no service {name} is in force: {problem}"),
            // The problem is a file's, which does not say what is in it.
            None if held => bail!(
                "{name} is in nothing that can be read{}; what the kernel has for it stays as it is, and a running agent goes on \
                 with the last good version",
                session
                    .problems
                    .iter()
                    .find(|p| p.object.is_none())
                    .map_or(String::new(), |p| format!(": {p}"))
            ),
            None => bail!("no service {name} in {}", session.keeper.source),
        }
    }
    Ok(report)
}

/// One line a service.
pub fn summary(report: &Report) -> String {
    let mut rows = vec![
        ["SERVICE", "MODE", "VIPS", "PORTS", "READY", "ACTIVE", "CONNS", "IN", "OUT", "STATE"]
            .map(String::from),
    ];
    for service in &report.services {
        let servers = || service.ports.iter().flat_map(|p| &p.virtual_servers);
        let endpoints = || servers().flat_map(|s| &s.endpoints);
        rows.push([
            format!("{}/{}", service.namespace, service.name),
            service.mode.to_owned(),
            join(service.vips.iter().map(ToString::to_string)),
            join(service.ports.iter().map(port_text)),
            format!("{}/{}", service.ready_endpoints, service.total_endpoints),
            endpoints().map(|e| u64::from(e.active_connections)).sum::<u64>().to_string(),
            endpoints().map(|e| e.connections).sum::<u64>().to_string(),
            bytes(endpoints().map(|e| e.in_bytes).sum()),
            bytes(endpoints().map(|e| e.out_bytes).sum()),
            state(service),
        ]);
    }
    let mut out = table(&rows);
    tail(&mut out, report);
    out
}

/// A block a service, with marks, schedulers and every endpoint.
pub fn wide(report: &Report) -> String {
    let mut out = String::new();
    for service in &report.services {
        let _ = writeln!(
            out,
            "{}/{}  mode {}  vips {}  endpoints {}/{} ready  {}",
            service.namespace,
            service.name,
            service.mode,
            join(service.vips.iter().map(ToString::to_string)),
            service.ready_endpoints,
            service.total_endpoints,
            state(service)
        );
        for problem in &service.problems {
            let _ = writeln!(out, "  ! {problem}");
        }
        // One of two records is one name.
        let mut names: Vec<String> = service.names.iter().map(|n| n.name.clone()).collect();
        names.dedup();
        if !names.is_empty() {
            if service.more_names > 0 {
                names.push(format!("and those of {} more endpoints", service.more_names));
            }
            let _ = writeln!(out, "  names {}", names.join(", "));
        }
        for port in &service.ports {
            let _ = write!(out, "  port {}", port_text(port));
            let _ = writeln!(out, "{}", port.name.as_ref().map_or(String::new(), |n| format!("  ({n})")));
            if let Some(why) = &port.not_published {
                let sign = if is_elsewhere(why) { "" } else { "! " };
                let _ = writeln!(out, "    {sign}not published here: {why}");
            }
            for server in &port.virtual_servers {
                server_block(&mut out, server);
            }
        }
    }
    tail(&mut out, report);
    out
}

fn server_block(out: &mut String, server: &ServerReport) {
    let scopes = join(server.scopes.iter().map(|s| format!("{s:?}").to_lowercase()));
    let _ = writeln!(
        out,
        "    FWM {} ({:#x})  {}  {}  scheduler {}  {}",
        server.mark, server.mark, server.family, scopes, server.scheduler, server.state
    );
    let mut rows = vec![
        ["      ENDPOINT", "TARGET", "NODE", "WEIGHT", "ACTIVE", "INACTIVE", "CONNS", "IN", "OUT", "STATE"]
            .map(String::from),
    ];
    for e in &server.endpoints {
        rows.push([
            format!("      {}", std::net::SocketAddr::new(e.address, e.port)),
            e.target.as_deref().map_or("-".into(), |name| one_line(name).into_owned()),
            e.node.as_deref().map_or("-".into(), |name| one_line(name).into_owned()),
            e.weight.to_string(),
            e.active_connections.to_string(),
            e.inactive_connections.to_string(),
            e.connections.to_string(),
            bytes(e.in_bytes),
            bytes(e.out_bytes),
            e.state.clone(),
        ]);
    }
    out.push_str(&table(&rows));
}

fn tail(out: &mut String, report: &Report) {
    if report.services.is_empty() {
        out.push_str("no services\n");
    }
    for problem in report.node_problems.iter().chain(&report.source_problems) {
        let _ = writeln!(out, "! {problem}");
    }
    for advice in &report.advice {
        let _ = writeln!(out, "note: {advice}");
    }
}

/// `80→30080/TCP`, `80-90/UDP`.
pub fn port_text(port: &PortReport) -> String {
    let range = port.end_port.map_or(String::new(), |end| format!("-{end}"));
    let published = match (port.published_port, &port.not_published) {
        (Some(p), None) => format!(":{p}"),
        (Some(p), Some(_)) => format!(":({p})"),
        (None, _) => String::new(),
    };
    format!("{}{range}{published}/{}", port.port, port.protocol)
}

/// Whether all of a service is in the kernel as it should be.
pub fn state(service: &ServiceReport) -> String {
    let servers = || service.ports.iter().flat_map(|p| &p.virtual_servers);
    let wrong = servers().filter(|s| s.state != "ok").count()
        + servers().flat_map(|s| &s.entries).filter(|e| e.state != "ok").count()
        + servers()
            .flat_map(|s| &s.endpoints)
            .filter(|e| !matches!(e.state.as_str(), "ready" | "draining" | "kept"))
            .count();
    match (wrong, service.problems.is_empty()) {
        (0, true) => "ok".into(),
        (0, false) => "see problems (-o wide)".into(),
        (n, _) => format!("{n} parts wrong (explain)"),
    }
}

fn join(items: impl Iterator<Item = String>) -> String {
    let text = items.collect::<Vec<_>>().join(",");
    if text.is_empty() { "-".into() } else { text }
}

/// Bytes in binary units.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}

fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0usize; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}
