//! Text of `meshlb explain`: the path of a packet, hop by hop, each with whether the kernel is as it
//! should be.

use std::{fmt::Write, net::SocketAddr, process::ExitCode};

use anyhow::Result;

use super::{
    Output,
    keeper::Purpose,
    names,
    options::Options,
    print,
    report::{PortReport, Report, ServerReport, ServiceReport},
    session::Session,
    show::{self, bytes},
};
use crate::{
    model::ids::{Family, Scope},
    source::problem::one_line,
};

/// Explains one service. Exit code 1 says that something is not as it should be.
///
/// # Errors
/// What could not be read, or that there is no such service.
pub fn run(options: &Options, name: &str, output: Output) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let mut session = Session::open(options, None, Purpose::Look)?;
    let mut report = show::read(&mut session, Some(name))?;
    let config = options.dns.config(session.engine.settings().node.ranges)?;
    // Whichever family it is asked by, it answers the same.
    let server = config.and_then(|config| config.listen.first().copied());
    // Where no agent runs nobody would answer.
    let server = server.filter(|_| crate::instance::other().is_some());
    if let Some(server) = server {
        for service in &mut report.services {
            names::ask(&mut service.names, server);
        }
    }
    match output {
        Output::Json => print::out(format_args!("{}\n", serde_json::to_string_pretty(&report)?))?,
        Output::Text => {
            let told = report.services.iter().map(|service| explain(&report, service, server));
            print::out(told.collect::<String>())?
        }
    };
    let service_fine = |s: &ServiceReport| show::state(s) == "ok" && names::fine(&s.names);
    let fine = report.node_problems.is_empty() && report.services.iter().all(service_fine);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The walk through one service.
pub fn explain(report: &Report, service: &ServiceReport, server: Option<SocketAddr>) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}/{} on node {}", service.namespace, service.name, report.node);
    for problem in &service.problems {
        let _ = writeln!(out, "  ! {problem}");
    }
    for note in &service.notes {
        let _ = writeln!(out, "  note: {note}");
    }
    if report.node_problems.is_empty() {
        let _ = writeln!(out, "  rules ({}), routes, sysctls, sentinel: as they should be", report.renderer);
    }
    for problem in &report.node_problems {
        let _ = writeln!(out, "  ! {problem}");
    }
    names::lines(&mut out, &service.names, service.more_names, server);
    for port in &service.ports {
        for server in &port.virtual_servers {
            for scope in &server.scopes {
                path(&mut out, service, port, server, *scope);
            }
        }
        if let Some(why) = &port.not_published {
            let _ =
                writeln!(out, "\npublished {}: not on this node: {why}", port.published_port.unwrap_or(0));
        }
        if port.virtual_servers.is_empty() {
            // Without a mark it was given nothing, which the problems above tell.
            let why = if service.problems.is_empty() {
                "no endpoint takes connections: they are refused at once"
            } else {
                "nothing in the kernel"
            };
            let _ = writeln!(out, "\nport {}/{}: {why}", port.port, port.protocol);
        }
    }
    out
}

/// Whether an entry is about an endpoint, whichever service or scope leads there.
fn is_shared(entry: &str) -> bool {
    ["local ", "endpoints ", "own "].iter().any(|set| entry.starts_with(set))
}

fn path(out: &mut String, service: &ServiceReport, port: &PortReport, server: &ServerReport, scope: Scope) {
    let family = server.family;
    let label = port.name.as_ref().map_or(String::new(), |n| format!(" ({n})"));
    match scope {
        Scope::Vip => {
            let vip = service.vips.iter().find(|v| Family::of(v) == family);
            let Some(vip) = vip else { return };
            let _ = writeln!(out, "\nport {}/{}{label} by VIP, {family}", port.port, port.protocol);
            let name = service.names.iter().find(|n| *n.answers == [vip.to_string()]);
            if let Some(name) = name {
                let state = name.state.as_ref().map_or(String::new(), |state| format!(": {state}"));
                let _ = writeln!(out, "  name       {} {} {vip}{state}", name.name, name.kind);
            }
        }
        Scope::Ingress => {
            let Some(published) = port.published_port else { return };
            let _ = writeln!(out, "\npublished port {published}/{}{label}, {family}", port.protocol);
        }
    }
    let of_scope = |entry: &str| match scope {
        Scope::Vip => {
            entry.starts_with("vips ")
                && service.vips.iter().any(|v| entry.starts_with(&format!("vips {v},")))
        }
        Scope::Ingress => !service.vips.iter().any(|v| entry.starts_with(&format!("vips {v},"))),
    };
    let (shared, own): (Vec<_>, Vec<_>) = server.entries.iter().partition(|e| is_shared(&e.entry));
    for entry in own.into_iter().filter(|e| of_scope(&e.entry)) {
        let _ = writeln!(out, "  set entry  {} -> mark {:#x}: {}", entry.entry, server.mark, entry.state);
    }
    let fine = shared.iter().filter(|e| e.state == "ok").count();
    if fine > 0 {
        let _ = writeln!(out, "  set entry  {fine} more for its endpoints: ok");
    }
    for entry in shared.iter().filter(|e| e.state != "ok") {
        let _ = writeln!(out, "  set entry  {}: {}", entry.entry, entry.state);
    }
    let connections: u64 = server.endpoints.iter().map(|e| e.connections).sum();
    if server.endpoints.is_empty() && server.state == "ok" {
        let _ = writeln!(out, "  ipvs       no FWM {} {family}, as there is no endpoint: ok", server.mark);
    } else {
        let _ = writeln!(
            out,
            "  ipvs       FWM {} {family} scheduler {}, {connections} connections: {}",
            server.mark, server.scheduler, server.state
        );
    }
    for packet in server.packets.iter().filter(|p| p.scope == scope) {
        let from = if packet.from == "pod" { "from a pod" } else { "from outside" };
        let _ = writeln!(out, "  packet     {from} to {}: {}", packet.to, packet.fate);
    }
    if server.endpoints.is_empty() {
        let _ = writeln!(out, "  endpoints  none: connections are refused at once");
    }
    for e in &server.endpoints {
        let named = |name: &Option<String>| name.as_deref().map(|name| one_line(name).into_owned());
        let place = match (named(&e.target), named(&e.node)) {
            (Some(target), Some(node)) => format!(" {target} on {node},"),
            (Some(target), None) => format!(" {target},"),
            (None, Some(node)) => format!(" on {node},"),
            (None, None) => String::new(),
        };
        let _ = writeln!(
            out,
            "  endpoint   {}{place} weight {}, {} active, {} connections, {} in, {} out: {}",
            std::net::SocketAddr::new(e.address, e.port),
            e.weight,
            e.active_connections,
            e.connections,
            bytes(e.in_bytes),
            bytes(e.out_bytes),
            e.state
        );
    }
}
