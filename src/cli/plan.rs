//! `meshlb plan`: every change, none made.

use std::{path::Path, process::ExitCode};

use anyhow::Result;
use serde::Serialize;

use super::{
    Output,
    options::Options,
    session::{Purpose, Session},
};
use crate::{plan::Op, reconcile::Engine, source::Origin};

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
    /// The changes that a prepared engine would make.
    pub(super) fn new(engine: &Engine, ops: &[Op]) -> Self {
        let change = |op: &Op| {
            let text = op.to_string();
            let (action, change) = text.split_at(1);
            let action = action.chars().next().unwrap_or('~');
            Change { action, change: change.trim_start().to_owned(), service: owner(engine, op) }
        };
        Self {
            node: engine.settings().node.name.to_string(),
            renderer: engine.dataplane.netfilter.name().to_owned(),
            changes: ops.iter().map(change).collect(),
        }
    }
}

fn owner(engine: &Engine, op: &Op) -> Option<String> {
    op.mark().and_then(|mark| engine.merged().owner(mark)).map(ToString::to_string)
}

/// Exit code 2 says that there are changes.
///
/// # Errors
/// What could not be read.
pub fn run(options: &Options, dir: Option<&Path>, output: Output) -> Result<ExitCode> {
    super::log_to_stderr(options)?;
    let mut session = Session::open(options, dir.map(Origin::folder).transpose()?, Purpose::Look)?;
    let wrong = session.report_problems();
    let (ops, _) = session.prepare()?;
    match output {
        Output::Text => {
            for op in &ops {
                let owner = owner(&session.engine, op).map_or(String::new(), |o| format!("  ({o})"));
                println!("{op}{owner}");
            }
            println!("{} changes", ops.len());
        }
        Output::Json => println!("{}", serde_json::to_string_pretty(&Plan::new(&session.engine, &ops))?),
    }
    Ok(match (wrong, ops.is_empty()) {
        (true, _) => ExitCode::FAILURE,
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::from(2),
    })
}
