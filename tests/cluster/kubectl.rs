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

    /// The API server's port on loopback.
    pub fn port(&self) -> Result<u16> {
        let text = std::fs::read_to_string(self.dir.join("port"))?;
        text.trim().parse().with_context(|| format!("port {text:?}"))
    }

    /// A kubeconfig for a service account, with a token of its own.
    pub fn kubeconfig_of(
        &self,
        namespace: &str,
        account: &str,
        more: &[&str],
    ) -> Result<tempfile::NamedTempFile> {
        let token =
            self.kubectl(&[&["create", "token", account, "-n", namespace], more].concat(), "")?.good()?;
        let admin = std::fs::read_to_string(self.kubeconfig())?;
        let own =
            admin.lines().find_map(|l| l.split_once("token: ")).context("no token in the kubeconfig")?.1;
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), admin.replace(own.trim_end_matches(['}', ']']), token.trim()))?;
        Ok(file)
    }

    /// What a service account has asked for since `from`, a length of the audit log, as `VERB RESOURCE[/SUB] NAME`.
    pub fn asked_by(&self, account: &str, from: usize) -> Result<Vec<String>> {
        let text = std::fs::read(self.dir.join("audit.log"))?;
        let mut out = Vec::new();
        for line in String::from_utf8_lossy(text.get(from..).unwrap_or_default()).lines() {
            // The last line may be half written.
            let Ok(entry) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            let user = entry["user"]["username"].as_str().unwrap_or_default();
            if user.rsplit(':').next() != Some(account) {
                continue;
            }
            let object = &entry["objectRef"];
            let text = |field: &str| object[field].as_str().unwrap_or_default();
            let sub = object["subresource"].as_str().map_or_else(String::new, |sub| format!("/{sub}"));
            let verb = entry["verb"].as_str().unwrap_or_default();
            out.push(format!("{verb} {}{sub} {}", text("resource"), text("name")));
        }
        Ok(out)
    }

    /// The audit log's length at present.
    pub fn audited(&self) -> usize {
        let length = std::fs::metadata(self.dir.join("audit.log")).map_or(0, |meta| meta.len());
        usize::try_from(length).unwrap_or(0)
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

    /// Starts the API server anew with these ranges for cluster IPs, one for each family that the cluster has. Returns those of before.
    pub fn cluster_ips(&self, ranges: &str) -> Result<String> {
        let file = self.dir.join("kube-apiserver.args");
        let mut lines: Vec<String> = std::fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
        let flag =
            lines.iter().position(|line| line == "--service-cluster-ip-range").context("no such flag")?;
        let value = lines.get_mut(flag + 1).context("no value")?;
        let before = std::mem::replace(value, ranges.to_owned());
        std::fs::write(&file, lines.join("\n") + "\n")?;
        self.hold("kube-apiserver", true)?;
        while self.kubectl(&["get", "--raw", "/readyz"], "")?.ok {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        self.hold("kube-apiserver", false)?;
        self.wait_ready()?;
        Ok(before)
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
        let crds = ["crd/meshservices.meshlb.dev", "crd/meshnodes.meshlb.dev"];
        let wait = ["wait", "--for=condition=Established", "--timeout=30s", crds[0], crds[1]];
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
    // Older ones take what begins with a brace for JSON.
    let begin = if stdin.starts_with('{') { "---\n" } else { "" };
    let stdin = format!("{begin}{stdin}");
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
