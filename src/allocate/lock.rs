//! `meshlb.lock`: the folder's allocations, written down so that every node given the folder agrees for good.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path};

use serde::{Deserialize, Serialize};

use super::Allocator;
use crate::{
    model::{
        ids::{PerFamily, PortId, ServiceKey},
        service::{Mode, Service},
    },
    whole_file::write_atomically,
};

/// Name of the file in the folder.
pub const FILE_NAME: &str = "meshlb.lock";

const VERSION: u32 = 1;
const HEADER: &str = "\
# Written by `meshlb lock`, as Cargo.lock is by Cargo: keep it beside the manifests, do not edit it.
# Every node that is given this folder uses these virtual IPs and published ports.
";

/// Values that are honoured like explicit ones, unless a manifest names them for another service.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Lock {
    /// By service.
    pub services: BTreeMap<ServiceKey, Locked>,
}

/// What one service keeps.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Locked {
    /// Virtual IPs that the manifest does not name.
    #[serde(default, skip_serializing_if = "PerFamily::is_empty")]
    pub vips: PerFamily<IpAddr>,
    /// Published ports that the manifest does not name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub published: BTreeMap<PortId, u16>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockFile {
    version: u32,
    #[serde(default)]
    services: BTreeMap<ServiceKey, Locked>,
}

/// Why a lock file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It can't be read or written.
    #[error("{FILE_NAME}: {0}")]
    Io(#[from] io::Error),
    /// It is not what `meshlb lock` writes.
    #[error(
        "{FILE_NAME} is damaged: {0}; restore it, or move it away and write a new one with `meshlb lock`"
    )]
    Damaged(String),
    /// A newer meshlb wrote it.
    #[error("{FILE_NAME} is of version {0}, which this meshlb does not know; use a newer one")]
    Version(u32),
}

impl Lock {
    /// The lock file of a folder; `None` when it has none.
    ///
    /// # Errors
    /// There is one, but it can't be used.
    pub fn read(dir: &Path) -> Result<Option<Self>, LockError> {
        match fs::read_to_string(dir.join(FILE_NAME)) {
            Ok(text) => Self::parse(&text).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The lock file's text.
    ///
    /// # Errors
    /// It is damaged, or newer than this program.
    pub fn parse(text: &str) -> Result<Self, LockError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |e: serde_saphyr::Error| LockError::Damaged(e.without_snippet().to_string());
        let Version { version } = serde_saphyr::from_str(text).map_err(damaged)?;
        if version != VERSION {
            return Err(LockError::Version(version));
        }
        let file: LockFile = serde_saphyr::from_str(text).map_err(damaged)?;
        Ok(Self { services: file.services })
    }

    /// What the file should hold for these services: all that their manifests leave open.
    pub fn of(services: &BTreeMap<ServiceKey, std::sync::Arc<Service>>, allocator: &Allocator) -> Self {
        let locked = services.iter().filter_map(|(key, service)| {
            let allocation = allocator.get(key)?;
            let mut locked = Locked::default();
            for (family, vip) in allocation.vips.iter().filter(|(_, vip)| !service.vips.contains(vip)) {
                if service.mode == Mode::Vip {
                    locked.vips.set(family, Some(*vip));
                }
            }
            let open = service.ports.iter().filter(|p| p.publish.as_ref().is_some_and(|p| p.port.is_none()));
            locked.published =
                open.filter_map(|p| Some((p.id(), *allocation.published.get(&p.id())?))).collect();
            (locked != Locked::default()).then(|| (key.clone(), locked))
        });
        Self { services: locked.collect() }
    }

    /// The file's text.
    ///
    /// # Errors
    /// It can't be serialized.
    pub fn to_text(&self) -> Result<String, LockError> {
        let file = LockFile { version: VERSION, services: self.services.clone() };
        let yaml = serde_saphyr::to_string(&file).map_err(|e| LockError::Damaged(e.to_string()))?;
        Ok(format!("{HEADER}{}", yaml.trim_start_matches("---\n")))
    }

    /// Writes the file into a folder; `false` when it was as it should be already.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, dir: &Path) -> Result<bool, LockError> {
        let text = self.to_text()?;
        let path = dir.join(FILE_NAME);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(false);
        }
        write_atomically(&path, text.as_bytes())?;
        Ok(true)
    }
}
