//! Files that are either as they were or as they should be, never half written.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Replaces a file so that after a crash it is either the old or the new one, whole.
///
/// # Errors
/// It can't be written. The file is then as it was.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    let temporary = dir.join(hidden);
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        // It may not even have been made.
        fs::remove_file(&temporary).ok();
    }
    written
}

/// Whether this is the name of what a process was writing to replace the file of that name with.
pub fn is_unfinished(name: &OsStr, file: &str) -> bool {
    let process =
        name.to_str().and_then(|name| name.strip_prefix('.')?.strip_prefix(file)?.strip_prefix('.'));
    let process = process.and_then(|rest| rest.strip_suffix(".tmp"));
    process.is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()))
}
