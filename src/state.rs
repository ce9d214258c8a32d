//! What an agent remembers across restarts: `state.json` and `drains.json` in its state directory.
//!
//! Both are versioned and written atomically. A file that can't be understood is set aside, never overwritten;
//! addresses, ports and marks are then read from the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    hash::{DefaultHasher, Hasher},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    allocate::Allocations,
    model::{
        ids::{Family, Mark, PerFamily, Protocol, ServiceKey},
        kernel::Timeouts,
        unread::Nameless,
    },
    source::Origin,
    whole_file::{is_unfinished, write_atomically},
};

/// Version of both files.
pub const VERSION: u32 = 1;
const STATE: &str = "state.json";
const DRAINS: &str = "drains.json";

/// What an agent remembers.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// The node that it is about.
    pub node: String,
    /// VIP ranges.
    pub ranges: PerFamily<IpNet>,
    /// VIP ranges of runs before that, whose routes may still be there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub earlier_ranges: BTreeSet<IpNet>,
    /// Bits of the packet mark that are ours.
    pub mark_mask: u32,
    /// Which start of the machine it is about (`/proc/sys/kernel/random/boot_id`); empty where that is not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub boot_id: String,
    /// Renderer in use: `iptables-nft`, `iptables-legacy` or `nftables`.
    pub renderer: String,
    /// Where services come from.
    pub source: Option<Origin>,
    /// The folder itself, while there were manifests in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<crate::source::watch::FolderId>,
    /// Kubeconfig file, where one was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// Other flags that decide what is programmed, as they were given: `node_ip`, `zone` and so on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub flags: BTreeMap<String, String>,
    /// Where an agent answers names, as `--dns-listen` takes it; empty where none does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_listen: Vec<String>,
    /// First labels of the names that services answer, besides those of services in `allocations`: aliases, and names of services
    /// that have nothing there. As of when those changed last.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub labels: BTreeSet<String>,
    /// Who has what.
    pub allocations: Allocations,
    /// Values of sysctls before we changed them, by name.
    pub sysctls: BTreeMap<String, String>,
    /// IPVS timeouts that we set, and those before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipvs_timeouts: Option<(Timeouts, Timeouts)>,
    /// Published ports that this node serves, by service: a socket that comes later does not get them, even
    /// when somebody has emptied our sets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub served: BTreeMap<ServiceKey, Vec<PublishedPorts>>,
    /// What the kernel has of services whose names were lost with an earlier state.
    #[serde(skip_serializing_if = "Nameless::is_empty")]
    pub nameless: Nameless,
    /// What the netfilter renderer wrote last; only it knows what that means.
    pub netfilter: serde_json::Value,
}

/// Published ports with consecutive numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PublishedPorts {
    /// Protocol.
    pub protocol: Protocol,
    /// First number.
    pub first: u16,
    /// Last number.
    pub last: u16,
}

impl PublishedPorts {
    /// Sorted ports as runs of consecutive numbers.
    pub fn runs(ports: &BTreeSet<(Protocol, u16)>) -> Vec<Self> {
        let mut out: Vec<Self> = Vec::new();
        for &(protocol, port) in ports {
            match out.last_mut() {
                Some(run) if run.protocol == protocol && run.last.checked_add(1) == Some(port) => {
                    run.last = port
                }
                _ => out.push(Self { protocol, first: port, last: port }),
            }
        }
        out
    }

    /// Each of them.
    pub fn ports(self) -> impl Iterator<Item = (Protocol, u16)> {
        (self.first..=self.last).map(move |port| (self.protocol, port))
    }
}

/// A destination whose connections may go on until a deadline.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Family of the IPVS service.
    pub family: Family,
    /// Mark of the IPVS service.
    pub mark: Mark,
    /// Address of the destination.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// When it is taken out at the latest, in milliseconds since the Unix epoch.
    pub deadline_unix_ms: u64,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

#[derive(Serialize, Deserialize, Default)]
struct Drains {
    #[serde(default)]
    drains: Vec<Drain>,
}

impl State {
    /// The state in a directory, for those who only want to know: nothing is made or set aside. A missing file is an
    /// empty state.
    ///
    /// # Errors
    /// The file can't be read or understood; the text says which and why.
    pub fn peek(dir: &Path) -> io::Result<Self> {
        Ok(look::<Self>(&dir.join(STATE))?.0)
    }
}

/// The draining destinations in a directory, in the same way.
///
/// # Errors
/// As [`State::peek`].
pub fn peek_drains(dir: &Path) -> io::Result<Vec<Drain>> {
    Ok(look::<Drains>(&dir.join(DRAINS))?.0.drains)
}

/// The state directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Hashes of what the files hold, as far as we know. (The text of thousands of services takes megabytes.)
    state_hash: Option<u64>,
    drains_hash: Option<u64>,
    /// Locked as long as it is open; `None` to look only.
    _lock: Option<fs::File>,
}

impl State {
    /// Whether the kernel can have what this tells of, as far as is known: it is not, when the machine was started anew.
    pub fn is_of_boot(&self, boot_id: &str) -> bool {
        self.boot_id.is_empty() || boot_id.is_empty() || self.boot_id == boot_id
    }
}

impl StateDir {
    /// Opens the directory, makes it if need be, and keeps it from others: agents in several network namespaces of a machine
    /// would take each other's marks and addresses for their own.
    ///
    /// # Errors
    /// It can't be made, or another process has it.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path)?;
        let lock = fs::File::open(&path)?;
        if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) {
            return Err(io::Error::other(
                "another meshlb uses it, in another network namespace: give each a --state-dir of its own",
            ));
        }
        sweep(&path);
        Ok(Self { path, state_hash: None, drains_hash: None, _lock: Some(lock) })
    }

    /// The directory as it is, to look at: it is not made.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), state_hash: None, drains_hash: None, _lock: None }
    }

    /// The state, and a message where the file had to be set aside. Without a file the state is empty.
    ///
    /// # Errors
    /// The file is there but can't be read or set aside.
    pub fn load(&mut self) -> io::Result<(State, Option<String>)> {
        let (state, hash, note) = read::<State>(&self.path.join(STATE))?;
        self.state_hash = hash;
        Ok((state, note))
    }

    /// The draining destinations, in the same way.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_drains(&mut self) -> io::Result<(Vec<Drain>, Option<String>)> {
        let (drains, hash, note) = read::<Drains>(&self.path.join(DRAINS))?;
        self.drains_hash = hash;
        Ok((drains.drains, note))
    }

    /// Writes the state; `false` when the file holds it already.
    ///
    /// # Errors
    /// It can't be written. The file is then as it was.
    pub fn save(&mut self, state: &State) -> io::Result<bool> {
        write(&self.path.join(STATE), state, &mut self.state_hash)
    }

    /// Writes the draining destinations, in the same way.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_drains(&mut self, drains: &[Drain]) -> io::Result<bool> {
        write(&self.path.join(DRAINS), &Drains { drains: drains.to_vec() }, &mut self.drains_hash)
    }

    /// Removes both files: for `cleanup`.
    ///
    /// # Errors
    /// One of them is there but can't be removed.
    pub fn clear(&mut self) -> io::Result<()> {
        (self.state_hash, self.drains_hash) = (None, None);
        for name in [STATE, DRAINS] {
            match fs::remove_file(self.path.join(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Removes what a process left that was killed while it wrote. It is in nobody's way: not being able to is no error.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let unfinished = |of: &str| is_unfinished(&name, of);
        if [STATE, DRAINS].into_iter().any(unfinished) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// What a file holds, with the hash of its text; the default without a file.
fn look<T: DeserializeOwned + Default>(path: &Path) -> io::Result<(T, Option<u64>)> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((T::default(), None)),
        Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    };
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let why = match serde_json::from_slice::<Version>(&bytes) {
        Ok(Version { version }) if version != VERSION => {
            format!("is of version {version}; this meshlb knows version {VERSION}")
        }
        Ok(_) => match serde_json::from_slice::<Versioned<T>>(&bytes) {
            Ok(file) => return Ok((file.content, Some(hash(&bytes)))),
            Err(e) => format!("is damaged ({e})"),
        },
        Err(e) => format!("is damaged ({e})"),
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} {why}", path.display())))
}

/// The same; a file that can't be understood is set aside, with a message.
fn read<T: DeserializeOwned + Default>(path: &Path) -> io::Result<(T, Option<u64>, Option<String>)> {
    let why = match look(path) {
        Ok((content, hash)) => return Ok((content, hash, None)),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => e,
        Err(e) => return Err(e),
    };
    let aside = set_aside(path)?;
    let note = format!(
        "{why}; it was set aside as {}, and what it said is read from the kernel where that has it",
        aside.display()
    );
    Ok((T::default(), None, Some(note)))
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    for n in 1_u32.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".corrupt-{n}"));
        let aside = PathBuf::from(name);
        // A link fails where the name is taken; a rename would overwrite it.
        match fs::hard_link(path, &aside) {
            Ok(()) => {
                fs::remove_file(path)?;
                return Ok(aside);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) if !aside.exists() => {
                // A file system without hard links.
                fs::rename(path, &aside)?;
                return Ok(aside);
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("no name is left for it"))
}

fn write<T: Serialize>(path: &Path, content: T, known: &mut Option<u64>) -> io::Result<bool> {
    let mut text = serde_json::to_string_pretty(&Versioned { version: VERSION, content })?;
    text.push('\n');
    let now = Some(hash(text.as_bytes()));
    if *known == now {
        return Ok(false);
    }
    write_atomically(path, text.as_bytes())?;
    *known = now;
    Ok(true)
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_of_another_start_of_the_machine_only_where_both_are_known() {
        let of = |boot_id: &str| State { boot_id: boot_id.into(), ..State::default() };
        assert!(of("a").is_of_boot("a") && !of("a").is_of_boot("b"));
        // One that an earlier version wrote, and a kernel that does not say.
        assert!(of("").is_of_boot("b") && of("a").is_of_boot(""));
    }

    #[test]
    fn comes_back_as_it_was_and_is_only_written_when_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = StateDir::open(dir.path().join("sub")).unwrap();
        assert_eq!(files.load().unwrap(), (State::default(), None));
        let mut state = State { node: "n1".into(), mark_mask: 0x3fff, ..State::default() };
        state.ranges.v4 = Some("10.200.0.0/16".parse().unwrap());
        let kept = state.allocations.services.entry("default/vote".parse().unwrap()).or_default();
        kept.vips.v4 = Some("10.200.1.2".parse().unwrap());
        kept.published.insert("80/TCP".parse().unwrap(), 30080);
        kept.marks.insert("80/TCP".parse().unwrap(), Mark(0x100));
        state.allocations.retired_marks.insert(Mark(0x101));
        assert!(files.save(&state).unwrap());
        assert!(!files.save(&state).unwrap());
        let drain = Drain {
            family: Family::V4,
            mark: Mark(0x100),
            address: "10.0.0.1".parse().unwrap(),
            port: 80,
            deadline_unix_ms: 1,
        };
        assert!(files.save_drains(std::slice::from_ref(&drain)).unwrap());

        let taken = StateDir::open(dir.path().join("sub")).unwrap_err().to_string();
        assert!(taken.contains("another meshlb uses it"), "{taken}");
        drop(files);
        // Of a process that was killed while it wrote.
        for unfinished in [".state.json.4711.tmp", ".drains.json.1.tmp"] {
            fs::write(dir.path().join("sub").join(unfinished), "{").unwrap();
        }
        let mut again = StateDir::open(dir.path().join("sub")).unwrap();
        assert_eq!(again.load().unwrap(), (state.clone(), None));
        assert_eq!(again.load_drains().unwrap(), (vec![drain], None));
        assert_eq!(State::peek(&dir.path().join("sub")).unwrap(), state);
        assert_eq!(State::peek(dir.path()).unwrap(), State::default());
        assert!(!again.save(&state).unwrap());
        state.renderer = "nftables".into();
        assert!(again.save(&state).unwrap());
        again.clear().unwrap();
        assert_eq!(fs::read_dir(dir.path().join("sub")).unwrap().count(), 0, "a file is left over");
    }

    #[test]
    fn published_ports_are_kept_as_runs() {
        let ports = [(Protocol::Udp, 65_535), (Protocol::Tcp, 80), (Protocol::Tcp, 82), (Protocol::Tcp, 81)];
        let ports: BTreeSet<_> = ports.into_iter().chain([(Protocol::Udp, 65_534)]).collect();
        let runs = PublishedPorts::runs(&ports);
        assert_eq!(runs.iter().map(|r| (r.first, r.last)).collect::<Vec<_>>(), [(80, 82), (65_534, 65_535)]);
        assert_eq!(runs.into_iter().flat_map(PublishedPorts::ports).collect::<BTreeSet<_>>(), ports);
    }

    #[test]
    fn what_it_does_not_understand_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STATE);
        for (n, text) in
            ["{\"version\": 1, \"node\"", "{\"version\": 99}", "", "[1]", "{\"version\": 1, \"node\": 3}"]
                .iter()
                .enumerate()
        {
            fs::write(&path, text).unwrap();
            let (state, note) = StateDir::open(dir.path()).unwrap().load().unwrap();
            assert_eq!(state, State::default());
            let aside = format!("state.json.corrupt-{}", n + 1);
            assert!(note.unwrap().contains(&aside));
            assert_eq!(&fs::read_to_string(dir.path().join(aside)).unwrap(), text);
            assert!(!path.exists());
        }
    }
}
