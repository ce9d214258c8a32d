//! Which source: a folder or the API server.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Where services come from. As text: `kube`, or the folder's absolute path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Origin {
    /// The API server.
    Kube,
    /// A folder of manifests, by its absolute path.
    Folder(PathBuf),
}

impl Origin {
    /// A folder.
    ///
    /// # Errors
    /// The working directory that a relative path starts from is gone.
    pub fn folder(dir: &Path) -> io::Result<Self> {
        Ok(Self::Folder(std::path::absolute(dir)?))
    }

    /// What `--source` means. A folder that is called `kube` is `./kube`.
    ///
    /// # Errors
    /// As [`Self::folder`].
    pub fn from_flag(text: &str) -> io::Result<Self> {
        if text == "kube" { Ok(Self::Kube) } else { Self::folder(Path::new(text)) }
    }

    /// The folder, if it is one.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            Self::Kube => None,
            Self::Folder(dir) => Some(dir),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kube => f.write_str("the API server"),
            Self::Folder(dir) => write!(f, "{}", dir.display()),
        }
    }
}

impl From<String> for Origin {
    fn from(text: String) -> Self {
        if text == "kube" { Self::Kube } else { Self::Folder(text.into()) }
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Kube => "kube".into(),
            Origin::Folder(dir) => dir.to_string_lossy().into_owned(),
        }
    }
}
