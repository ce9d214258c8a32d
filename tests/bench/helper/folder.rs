//! The folder that is served, on disk.

use std::{fs, path::Path};

use anyhow::Result;

use crate::manifests::text;

/// Writes the file of one service in one step, as editors and the kubelet do; `last` is its fifth endpoint (4 or 5).
pub fn write(dir: &Path, service: u32, last: u32) -> Result<()> {
    let hidden = dir.join(format!(".s{service:05}.new"));
    fs::write(&hidden, text(service, last))?;
    fs::rename(hidden, dir.join(format!("s{service:05}.yaml")))?;
    Ok(())
}

/// Writes a folder anew.
pub fn write_all(dir: &Path, count: u32) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir_all(dir)?;
    (0..count).try_for_each(|service| write(dir, service, 4))
}
