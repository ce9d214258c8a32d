//! The one way to print: a reader that has gone, or a full disk, is no reason to panic.

use std::{
    fmt::Display,
    io::{self, ErrorKind, Write},
};

use anyhow::{Context, Result};

/// Writes to standard output as it is. False where nobody reads it any more: the command then goes on and ends with
/// the code that it would have ended with, as nothing that it did is wrong.
///
/// # Errors
/// It can't be written, as on a full disk.
pub fn out(text: impl Display) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("standard output"),
    }
}

/// Writes one message to standard error. Where that can't be done there is nobody to tell.
pub fn err(message: impl Display) {
    let _ = writeln!(io::stderr().lock(), "meshlb: {message}");
}
