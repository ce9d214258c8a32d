//! The control plane as its users reach it.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

/// What a command came to.
#[derive(Debug)]
pub struct Output {
    /// Whether its status was 0.
    pub ok: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A control plane that `tests/cluster/up.sh` has started.
#[derive(Debug, Clone)]
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    meshlb: PathBuf,
}

impl Cluster {
    /// The one that `tests/cluster/run.sh` names, if this was started by it.
    pub fn from_env() -> Option<Self> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        Some(Self { dir: path("MESHLB_CLUSTER")?, bin: path("KUBE_BIN")?, meshlb: path("MESHLB_BIN")? })
    }

    /// Runs kubectl as the administrator.
    pub fn kubectl(&self, args: &[&str], stdin: &str) -> Result<Output> {
        let mut command = Command::new(self.bin.join("kubectl"));
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(args);
        run(command, stdin)
    }

    /// Runs meshlb.
    pub fn meshlb(&self, args: &[&str], stdin: &str) -> Result<Output> {
        let mut command = Command::new(&self.meshlb);
        command.args(args).env("KUBECONFIG", self.kubeconfig());
        run(command, stdin)
    }

    /// The meshlb that is tested.
    pub fn program(&self) -> &Path {
        &self.meshlb
    }

    /// Applies manifests.
    pub fn apply(&self, text: &str) -> Result<()> {
        self.kubectl(&["apply", "-f", "-"], text)?.good().map(drop)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Ends a part of the control plane suddenly and keeps it down, or lets it start again.
    pub fn hold(&self, part: &str, down: bool) -> Result<()> {
        let file = self.dir.join("hold").join(part);
        if down {
            std::fs::write(file, "")?
        } else {
            std::fs::remove_file(file)?
        }
        Ok(())
    }

    /// Waits until the API server answers again.
    pub fn wait_ready(&self) -> Result<()> {
        for _ in 0..150 {
            if self.kubectl(&["get", "--raw", "/readyz"], "")?.ok {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        bail!("the API server does not come back")
    }

    /// Installs what `meshlb crd` prints, and waits until it is served.
    pub fn install_crds(&self) -> Result<()> {
        let crd = self.meshlb(&["crd"], "")?.good()?;
        self.kubectl(&["apply", "--server-side", "-f", "-"], &crd)?.good()?;
        let wait = ["wait", "--for=condition=Established", "--timeout=30s", "crd/meshservices.meshlb.dev"];
        self.kubectl(&wait, "")?.good()?;
        Ok(())
    }
}

fn run(mut command: Command, stdin: &str) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A command that does not read it may be gone already.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    let out = child.wait_with_output()?;
    Ok(Output {
        ok: out.status.success(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}

impl Output {
    /// Its standard output, if it went well.
    pub fn good(self) -> Result<String> {
        ensure!(self.ok, "failed:\n{}{}", self.stdout, self.stderr);
        Ok(self.stdout)
    }
}
