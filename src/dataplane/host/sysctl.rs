//! Kernel settings below /proc/sys, and those that the dataplane needs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use crate::dataplane::Error;

/// When a setting is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// On every node.
    Always,
    /// With an IPv6 VIP range.
    V6Range,
    /// While an IPv4 endpoint on this node is behind a bridge.
    V4EndpointOnBridge,
    /// While an IPv6 endpoint on this node is behind a bridge.
    V6EndpointOnBridge,
}

/// A setting that the dataplane needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Required {
    /// Path below /proc/sys.
    pub path: &'static str,
    /// The value.
    pub value: &'static str,
    /// When it is needed.
    pub when: When,
    /// What breaks without it, for people.
    pub reason: &'static str,
    /// What `cleanup` may put back, provided that the setting still has our value and nobody else has an
    /// IPVS service here; `None` is left alone, since others rely on it by then.
    pub restore: Option<&'static str>,
}

/// Everything that we set. The values are results of experiments with a 6.1 kernel.
pub const REQUIRED: &[Required] = &[
    Required {
        path: "net/ipv4/vs/conntrack",
        value: "1",
        when: When::Always,
        reason: "without it netfilter's nat does not see IPVS traffic: no masquerade for remote endpoints \
                 and hairpin, no published ports",
        restore: Some("0"),
    },
    Required {
        path: "net/ipv4/vs/expire_nodest_conn",
        value: "1",
        when: When::Always,
        reason: "without it connections to an endpoint that is gone are dropped silently until they time out",
        restore: Some("0"),
    },
    Required {
        path: "net/ipv4/vs/conn_reuse_mode",
        value: "1",
        when: When::Always,
        reason: "without it a client that reuses a source port stays with its old endpoint, also when that \
                 drains",
        // 1 is the kernel's default: somebody else has set what was there.
        restore: Some("1"),
    },
    Required {
        path: "net/ipv4/conf/all/arp_ignore",
        value: "1",
        when: When::Always,
        reason: "without it this node answers ARP for the whole VIP range on every link",
        restore: Some("0"),
    },
    Required {
        path: "net/ipv4/ip_forward",
        value: "1",
        when: When::Always,
        reason: "without it nothing reaches pods or remote endpoints",
        restore: None,
    },
    Required {
        path: "net/ipv6/conf/all/forwarding",
        value: "1",
        when: When::V6Range,
        reason: "without it nothing reaches IPv6 pods or remote endpoints",
        restore: None,
    },
    Required {
        path: "net/bridge/bridge-nf-call-iptables",
        value: "1",
        when: When::V4EndpointOnBridge,
        reason: "without it replies between two pods on one bridge bypass IPVS, and connections time out",
        restore: None,
    },
    Required {
        path: "net/bridge/bridge-nf-call-ip6tables",
        value: "1",
        when: When::V6EndpointOnBridge,
        reason: "without it replies between two IPv6 pods on one bridge bypass IPVS, and connections time out",
        restore: None,
    },
];

/// Path of the setting that makes the kernel stop taking default routes from router advertisements.
pub(crate) const V6_FORWARDING: &str = "net/ipv6/conf/all/forwarding";

/// /proc/sys, or where it is mounted.
#[derive(Clone, Debug)]
pub(crate) struct Sysctls {
    root: PathBuf,
}

impl Sysctls {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The value without its newline; `None` where the file is missing.
    pub(crate) fn read(&self, path: &str) -> Result<Option<String>, Error> {
        let file = self.file(path)?;
        match fs::read_to_string(&file) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                Err(Error::Permission { object: format!("read {}", file.display()) })
            }
            Err(e) => {
                Err(Error::Failed { object: format!("read {}", file.display()), reason: e.to_string() })
            }
        }
    }

    /// Whether it has the value or could be given it. Nothing is written.
    pub(crate) fn can_have(&self, path: &str, value: &str) -> Result<bool, Error> {
        Ok(match self.read(path)? {
            None => false,
            Some(current) => {
                current == value || fs::OpenOptions::new().write(true).open(self.file(path)?).is_ok()
            }
        })
    }

    /// Writes unless the value is there already. Returns whether it wrote.
    pub(crate) fn write(&self, path: &str, value: &str) -> Result<bool, Error> {
        match self.read(path)? {
            None => return Err(missing(path)),
            Some(current) if current == value => return Ok(false),
            Some(_) => {}
        }
        let file = self.file(path)?;
        fs::write(&file, value).map(|()| true).map_err(|e| self.write_error(path, &file, value, &e))
    }

    fn write_error(&self, path: &str, file: &Path, value: &str, e: &io::Error) -> Error {
        let object = format!("set {} to {value}", file.display());
        match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EROFS) => Error::Permission {
                object: format!(
                    "{object}: {} is mounted read-only; make the container privileged, or mount the host's \
                     /proc/sys/net into it writable",
                    self.root.display()
                ),
            },
            Some(Errno::EPERM | Errno::EACCES) => Error::Permission { object },
            Some(Errno::ENOENT) => missing(path),
            _ => Error::Failed { object, reason: e.to_string() },
        }
    }

    /// Only settings of the network, and no way out of the folder.
    fn file(&self, path: &str) -> Result<PathBuf, Error> {
        let good = |part: &str| {
            !part.is_empty() && part != "." && part != ".." && !part.contains(|c: char| c.is_control())
        };
        if path.starts_with("net/") && path.split('/').all(good) {
            Ok(self.root.join(path))
        } else {
            Err(Error::Failed {
                object: format!("sysctl {path:?}"),
                reason: "not a path below net/ in /proc/sys".into(),
            })
        }
    }
}

/// The interface can be gone between two looks (ENODEV).
fn is_missing(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(Errno::ENODEV as i32)
}

fn missing(path: &str) -> Error {
    let advice = if path.starts_with("net/ipv4/vs/") {
        "load the module ip_vs: modprobe ip_vs"
    } else if path.starts_with("net/bridge/") {
        "load the module br_netfilter: modprobe br_netfilter"
    } else if path.starts_with("net/ipv6/") {
        "enable IPv6 on this node, or give no IPv6 --vip-cidr"
    } else {
        "use a kernel that has it"
    };
    Error::MissingFeature { feature: format!("setting {}", path.replace('/', ".")), advice: advice.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake() -> (tempfile::TempDir, Sysctls) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("net/ipv4")).unwrap();
        fs::write(dir.path().join("net/ipv4/ip_forward"), "0\n").unwrap();
        let sysctls = Sysctls::new(dir.path().to_owned());
        (dir, sysctls)
    }

    #[test]
    fn writes_only_what_differs() {
        let (_dir, sysctls) = fake();
        assert_eq!(sysctls.read("net/ipv4/ip_forward"), Ok(Some("0".into())));
        assert_eq!(sysctls.write("net/ipv4/ip_forward", "0"), Ok(false));
        assert_eq!(sysctls.write("net/ipv4/ip_forward", "1"), Ok(true));
        assert_eq!(sysctls.read("net/ipv4/ip_forward"), Ok(Some("1".into())));
    }

    #[test]
    fn a_missing_setting_names_its_module() {
        let (_dir, sysctls) = fake();
        assert_eq!(sysctls.read("net/ipv4/vs/conntrack"), Ok(None));
        assert_eq!(
            sysctls.write("net/ipv4/vs/conntrack", "1").unwrap_err().to_string(),
            "the kernel has no setting net.ipv4.vs.conntrack; load the module ip_vs: modprobe ip_vs"
        );
    }

    #[test]
    fn paths_stay_below_net() {
        let (_dir, sysctls) = fake();
        for bad in ["kernel/panic", "net/../kernel/panic", "/etc/passwd", "net//x", "net/./x", "net/", ""] {
            assert!(sysctls.read(bad).is_err(), "{bad}");
            assert!(sysctls.write(bad, "1").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_read_only_mount_says_what_to_mount() {
        let (dir, sysctls) = fake();
        let error = sysctls.write_error(
            "net/ipv4/ip_forward",
            &dir.path().join("net/ipv4/ip_forward"),
            "1",
            &io::Error::from(Errno::EROFS),
        );
        assert!(matches!(error, Error::Permission { .. }));
        assert!(error.to_string().contains("mounted read-only"), "{error}");
    }

    #[test]
    fn nothing_that_others_rely_on_is_restored() {
        for required in REQUIRED {
            if required.path.contains("forward") || required.path.contains("bridge") {
                assert_eq!(required.restore, None, "{}", required.path);
            }
        }
    }
}
