//! What a source could not use, for people.

use std::{borrow::Cow, fmt, path::PathBuf};

use crate::model::unread::{Hides, Unread};

/// One thing that is wrong in a source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The file, or the folder itself; none in an API server.
    pub file: Option<PathBuf>,
    /// Line in the file, counted from 1.
    pub line: Option<u64>,
    /// `Kind namespace/name`.
    pub object: Option<String>,
    /// Path of the field.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// How bad it is.
    pub severity: Severity,
    /// What can't be known for it.
    pub hides: Hides,
}

/// What can't be known for all of these.
pub fn unread(problems: &[Problem]) -> Unread {
    problems.iter().map(|problem| &problem.hides).collect()
}

/// How bad a problem is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Severity {
    /// Nothing to act on: an object of a kind that we don't use.
    Note,
    /// Part of an object is left out.
    Warning,
    /// An object is knowingly not used as it stands: it asks for what this program can't do yet, or another
    /// one of the same name goes before it. Nothing is kept in its place.
    Refused,
    /// An object, a file or the folder can't be used. What it stood for is meant to exist all the same: its last
    /// good version stays in force.
    Error,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        if let Some(file) = &self.file {
            text += &file.display().to_string();
            if let Some(line) = self.line {
                text += &format!(":{line}");
            }
            text += ": ";
        }
        for part in self.object.iter().chain(self.field.as_ref().filter(|field| !field.is_empty())) {
            text += part;
            text += ": ";
        }
        f.write_str(&one_line(&(text + &self.message)))
    }
}

/// A text with its control characters spelled out: names are other people's, and one message is one line.
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let spelled = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(spelled).collect::<String>().into()
}
