//! `meshlb plan`: every change, none made.

use std::{fmt::Write as _, path::Path, process::ExitCode};

use anyhow::Result;
use serde::Serialize;

use super::{Output, keeper::Purpose, options::Options, print, session::Session};
use crate::{
    dataplane::{ElementChange, ProgramState},
    model::kernel::Program,
    plan::{Observed, Op},
    reconcile::Engine,
    source::Origin,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Change {
    /// `+`, `~` or `-`.
    action: char,
    /// The rest of the text line.
    change: String,
    /// The service it belongs to, where it belongs to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
}

/// What `-o json` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Plan {
    node: String,
    renderer: String,
    changes: Vec<Change>,
}

impl Plan {
    /// The changes that a prepared engine would make; `observed` is what it was prepared against.
    pub(super) fn new(engine: &Engine, ops: &[Op], observed: &Observed) -> Self {
        let mut changes = Vec::new();
        for op in ops {
            changes.push(Change::new(engine, op));
            if let Op::Install { program, .. } = op {
                changes.extend(brought(engine, program, observed));
            }
        }
        Self {
            node: engine.settings().node.name.to_string(),
            renderer: engine.dataplane.netfilter.name().to_owned(),
            changes,
        }
    }

    /// A line each, and how many they are.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for Change { action, change, service } in &self.changes {
            let owner = service.as_ref().map_or(String::new(), |service| format!("  ({service})"));
            let _ = writeln!(text, "{action} {change}{owner}");
        }
        let _ = writeln!(text, "{} changes", self.changes.len());
        text
    }
}

impl Change {
    fn new(engine: &Engine, op: &Op) -> Self {
        let text = op.to_string();
        let (action, change) = text.split_at(1);
        let action = action.chars().next().unwrap_or('~');
        Self { action, change: change.trim_start().to_owned(), service: owner(engine, op) }
    }
}

/// What comes with an installation of the rules, which is one step: chains, jumps, and set entries that are not there
/// as they should be.
fn brought(engine: &Engine, program: &Program, observed: &Observed) -> Vec<Change> {
    let action = if matches!(observed.program, ProgramState::Absent) { '+' } else { '~' };
    let chain = |change: String| Change { action, change, service: None };
    let mut out: Vec<Change> = engine.dataplane.netfilter.outline(program).into_iter().map(chain).collect();
    let desired = &engine.with_left_alone().elements;
    let puts = desired.iter().filter(|(element, mark)| observed.elements.get(element) != Some(mark));
    let puts = puts.map(|(element, mark)| ElementChange::Put(*element, *mark));
    let dels = observed.elements.keys().filter(|element| !desired.contains_key(element));
    let all = puts.chain(dels.map(|element| ElementChange::Del(*element)));
    out.extend(all.map(|change| Change::new(engine, &Op::Element(change))));
    out
}

fn owner(engine: &Engine, op: &Op) -> Option<String> {
    op.owner(engine.merged()).map(ToString::to_string)
}

/// Exit code 2 says that there are changes.
///
/// # Errors
/// What could not be read.
pub fn run(options: &Options, dir: Option<&Path>, output: Output) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let mut session = Session::open(options, dir.map(Origin::folder).transpose()?, Purpose::Look)?;
    session.keeper.refuse_emptied()?;
    let wrong = session.report_problems();
    let (ops, observed) = session.prepare()?;
    let plan = Plan::new(&session.engine, &ops, &observed);
    match output {
        Output::Text => print::out(plan.text())?,
        Output::Json => print::out(format_args!("{}\n", serde_json::to_string_pretty(&plan)?))?,
    };
    Ok(match (wrong, ops.is_empty()) {
        (true, _) => ExitCode::FAILURE,
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::from(2),
    })
}
