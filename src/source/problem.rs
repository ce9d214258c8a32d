//! What a source could not use, for people.

use std::{fmt, path::PathBuf};

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
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
            f.write_str(": ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if let Some(field) = self.field.as_ref().filter(|field| !field.is_empty()) {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}
