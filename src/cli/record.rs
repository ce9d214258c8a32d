//! A second record of what we did to this kernel, in the run directory: it lives as long as the kernel, and is
//! there when the state directory was lost.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{state::State, whole_file::write_atomically};

const FILE: &str = "kernel.json";

/// What only the one who changed the kernel knows of it.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    renderer: String,
    /// Absent in records of earlier versions.
    #[serde(default)]
    mark_mask: u32,
    netfilter: serde_json::Value,
    sysctls: std::collections::BTreeMap<String, String>,
    ipvs_timeouts: Option<(crate::model::kernel::Timeouts, crate::model::kernel::Timeouts)>,
}

/// The record.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    /// It is a help, and no more: that it can't be written is told once.
    told: bool,
}

impl Record {
    /// The one in this run directory.
    pub fn new(run_dir: &Path) -> Self {
        Self { path: run_dir.join(FILE), told: false }
    }

    /// Completes a state that knows nothing of the kernel, and says whether it could. Whether the kernel still is as the
    /// record says is found out by looking at it.
    pub fn complete(&self, state: &mut State) -> bool {
        if !state.netfilter.is_null() {
            return false;
        }
        let Ok(bytes) = fs::read(&self.path) else { return false };
        let Ok(content) = serde_json::from_slice::<Content>(&bytes) else { return false };
        state.renderer = content.renderer;
        if state.mark_mask == 0 {
            state.mark_mask = content.mark_mask;
        }
        state.netfilter = content.netfilter;
        for (path, value) in content.sysctls {
            state.sysctls.entry(path).or_insert(value);
        }
        state.ipvs_timeouts = state.ipvs_timeouts.or(content.ipvs_timeouts);
        true
    }

    /// Writes it.
    pub fn save(&mut self, state: &State) {
        let content = Content {
            renderer: state.renderer.clone(),
            mark_mask: state.mark_mask,
            netfilter: state.netfilter.clone(),
            sysctls: state.sysctls.clone(),
            ipvs_timeouts: state.ipvs_timeouts,
        };
        if let Err(e) = self.write(&content)
            && !std::mem::replace(&mut self.told, true)
        {
            warn!(
                "{} can't be written: {e}; if the state directory is lost too, the rules are written once more",
                self.path.display()
            );
        }
    }

    fn write(&self, content: &Content) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        write_atomically(&self.path, &serde_json::to_vec_pretty(content)?)
    }

    /// Removes it: for `cleanup`.
    ///
    /// # Errors
    /// It is there but can't be removed.
    pub fn clear(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completes_only_a_state_that_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new(&dir.path().join("run"));
        let mut state = State::default();
        record.complete(&mut state);
        assert_eq!(state, State::default());
        let kept = State {
            renderer: "nftables".into(),
            mark_mask: 0xff,
            netfilter: serde_json::json!({"program": 7}),
            sysctls: [("a".to_owned(), "1".to_owned())].into(),
            ..State::default()
        };
        record.save(&kept);
        record.complete(&mut state);
        assert_eq!(state, kept);
        let mut other = State { netfilter: serde_json::json!({}), ..State::default() };
        record.complete(&mut other);
        assert_eq!(other.renderer, "");
        record.clear().unwrap();
        record.clear().unwrap();
        let mut lost = State::default();
        record.complete(&mut lost);
        assert_eq!(lost, State::default());
    }
}
