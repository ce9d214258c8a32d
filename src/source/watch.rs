//! Follows a folder: tells what changes in it, and what is wrong with it.
//!
//! inotify says where to look; every [`Timing::rescan`] all files are compared by their stamps, for what it
//! does not tell (network file systems, a lost event). Only changed files are read.
//!
//! Nothing is ever taken back because the folder can't be read: not at the start, not when it vanishes later,
//! and not when an empty one takes its place (as when a file system is unmounted).

use std::{
    collections::{BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};

use super::{
    SourceMessage,
    files::{is_manifest, list, read_all, unreadable},
    problem::{Problem, Severity, unread},
    store::Store,
};
use crate::{
    allocate::{Lock, lock::FILE_NAME},
    model::{node::NodeConfig, unread::Hides},
};

/// How patient the watcher is.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After a file was closed, renamed or removed: others may follow at once.
    pub settle: Duration,
    /// After anything else.
    pub quiet: Duration,
    /// A file that somebody writes to is read when it is closed, or so long after the last write: half of it would take away
    /// what the other half says.
    pub unclosed: Duration,
    /// Changes that never pause are read after this time all the same.
    pub at_most: Duration,
    /// All files are compared this often.
    pub rescan: Duration,
    /// The same while the folder can't be read.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            settle: Duration::from_millis(20),
            quiet: Duration::from_millis(200),
            unclosed: Duration::from_secs(60),
            at_most: Duration::from_secs(2),
            rescan: Duration::from_secs(10),
            retry: Duration::from_secs(1),
        }
    }
}

/// A comparison of all files is not repeated before this many times as long as it took: a fifth of a percent
/// of a core. inotify has told of almost everything meanwhile.
const RESCAN_REST: u32 = 500;
/// But at least this often.
const RESCAN_AT_LEAST: Duration = Duration::from_secs(60);

/// Follows a folder in a thread of its own, until the receiver of the messages is gone.
///
/// The first messages are the problems and events of the whole folder, then [`SourceMessage::Synced`]. A folder
/// that can't be read never syncs; it is reported and tried again. So does an empty one in the place of `before`, the folder
/// that an earlier run has served services from ([`filled`]).
///
/// # Errors
/// The thread can't be started.
pub fn watch(
    dir: &Path,
    config: NodeConfig,
    sender: Sender<SourceMessage>,
    before: Option<FolderId>,
) -> io::Result<JoinHandle<()>> {
    watch_with(dir, config, sender, Timing::default(), before)
}

/// Whether there is nothing in a folder that is another one than it was: its file system is not mounted, mostly.
pub fn emptied(dir: &Path, before: FolderId) -> bool {
    identity(dir).is_ok_and(|now| now != before) && list(dir).is_ok_and(|names| names.is_empty())
}

/// [`watch`] with another patience.
///
/// # Errors
/// The thread can't be started.
pub fn watch_with(
    dir: &Path,
    config: NodeConfig,
    sender: Sender<SourceMessage>,
    timing: Timing,
    before: Option<FolderId>,
) -> io::Result<JoinHandle<()>> {
    let follower = Follower {
        dir: dir.into(),
        config,
        sender,
        timing,
        store: Store::default(),
        stamps: HashMap::new(),
        unclosed: HashMap::new(),
        identity: None,
        before,
        synced: false,
        told: Vec::new(),
        trouble: None,
        unwatched: None,
        lock: Lock::default(),
        bad_lock: None,
        watcher: None,
        survey_cost: Duration::ZERO,
    };
    std::thread::Builder::new().name("files".into()).spawn(move || follower.run())
}

/// What tells one version of a file from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let m = fs::metadata(path).ok()?;
        Some(Self {
            file: (m.dev(), m.ino()),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        })
    }

    /// Whether a further write might leave no trace in it: file times are only as fine as the kernel's tick.
    fn is_fresh(&self) -> bool {
        let (secs, nanos) = self.changed;
        let changed =
            u64::try_from(secs).ok().zip(u32::try_from(nanos).ok()).map(|(s, n)| Duration::new(s, n));
        let Some(changed) = changed.map(|changed| SystemTime::UNIX_EPOCH + changed) else { return false };
        // One in the future was made by another clock, or by this one before it was set.
        let now = SystemTime::now();
        let apart = now.duration_since(changed).or_else(|_| changed.duration_since(now));
        apart.is_ok_and(|apart| apart < Duration::from_millis(50))
    }
}

/// What to look at.
#[derive(Default, Debug)]
struct Todo {
    /// These files, whatever their stamps say.
    names: BTreeSet<OsString>,
    /// The whole folder.
    everything: bool,
    /// `meshlb.lock`.
    lock: bool,
    /// The folder itself has changed: the watch on it may be worth nothing.
    folder: bool,
}

/// The receiver is gone.
struct Gone;

struct Follower {
    dir: PathBuf,
    config: NodeConfig,
    sender: Sender<SourceMessage>,
    timing: Timing,
    store: Store,
    stamps: HashMap<OsString, Stamp>,
    /// Files that were written to and not closed since, and until when that is waited for.
    unclosed: HashMap<OsString, Instant>,
    /// Device and inode of the folder when it was last read.
    identity: Option<FolderId>,
    /// The folder that an earlier run has served services from.
    before: Option<FolderId>,
    synced: bool,
    told: Vec<Problem>,
    /// Why the folder can't be used now.
    trouble: Option<Problem>,
    /// Why inotify does not help.
    unwatched: Option<Problem>,
    /// What `meshlb.lock` said when it could last be used.
    lock: Lock,
    /// Why it can't be used now.
    bad_lock: Option<Problem>,
    watcher: Option<((u64, u64), RecommendedWatcher)>,
    /// How long the last comparison of all files took.
    survey_cost: Duration,
}

impl Follower {
    fn run(mut self) {
        let (notify, hints) = channel();
        let mut todo = Todo { everything: true, ..Todo::default() };
        let mut since = Instant::now();
        loop {
            self.watch_folder(&notify, todo.folder);
            if self.turn(todo, since).is_err() {
                return;
            }
            (todo, since) = self.wait(&hints);
        }
    }

    /// Waits for something to do, and until the folder is quiet.
    fn wait(&mut self, hints: &Receiver<notify::Result<notify::Event>>) -> (Todo, Instant) {
        let rescan = Instant::now() + self.pause();
        let mut todo = Todo::default();
        let mut since = None;
        let mut due = self.unclosed.values().copied().min().map_or(rescan, |until| until.min(rescan));
        loop {
            let left = due.saturating_duration_since(Instant::now());
            match hints.recv_timeout(left) {
                Ok(hint) => {
                    let Some(patience) = self.note(hint, &mut todo) else { continue };
                    let now = Instant::now();
                    let first = *since.get_or_insert(now);
                    due = (now + patience).min(first + self.timing.at_most);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let now = Instant::now();
                    let late = self.unclosed.extract_if(|_, until| *until <= now);
                    todo.names.extend(late.map(|(name, _)| name));
                    todo.everything |= since.is_none() && todo.names.is_empty();
                    return (todo, since.unwrap_or_else(Instant::now));
                }
                // We hold a sender ourselves.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(left),
            }
        }
    }

    /// How long nothing has to be compared.
    fn pause(&self) -> Duration {
        match (&self.trouble, &self.watcher) {
            (Some(_), _) => self.timing.retry,
            // Nobody else tells of changes.
            (None, None) => self.timing.rescan,
            (None, Some(_)) => {
                let rest = (self.survey_cost * RESCAN_REST).min(RESCAN_AT_LEAST);
                self.timing.rescan.max(rest)
            }
        }
    }

    /// What an event means, and how long to wait for more; `None` for reads, our own among them.
    fn note(&mut self, hint: notify::Result<notify::Event>, todo: &mut Todo) -> Option<Duration> {
        let event = match hint {
            Ok(event) => event,
            Err(e) => {
                tracing::debug!("inotify: {e}");
                self.unclosed.clear();
                todo.everything = true;
                return Some(self.timing.quiet);
            }
        };
        let complete = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
            EventKind::Access(_) => return None,
            EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::From | RenameMode::Both)) => true,
            EventKind::Remove(_) => true,
            _ => false,
        };
        let written = matches!(event.kind, EventKind::Modify(ModifyKind::Data(_)));
        if event.need_rescan() || event.paths.is_empty() {
            // Events are lost: what was closed meanwhile, nobody tells.
            self.unclosed.clear();
            todo.everything = true;
        }
        let concerns = |path: &PathBuf| *path == self.dir || path.parent() == Some(&self.dir);
        if !event.paths.is_empty() && !event.paths.iter().any(concerns) {
            return None;
        }
        for path in &event.paths {
            match path.file_name() {
                _ if *path == self.dir => (todo.everything, todo.folder) = (true, true),
                // Beside the link that leads to our folder.
                _ if path.parent() != Some(&self.dir) => {}
                Some(name) if name == FILE_NAME => todo.lock = true,
                Some(name) if is_manifest(name) => {
                    if written {
                        self.unclosed.insert(name.to_owned(), Instant::now() + self.timing.unclosed);
                    } else if complete {
                        self.unclosed.remove(name);
                    }
                    todo.names.insert(name.to_owned());
                }
                // `..data` of a ConfigMap: every file may have changed.
                Some(name) if name.as_encoded_bytes().starts_with(b"..") => todo.everything = true,
                _ => {}
            }
        }
        Some(if complete { self.timing.settle } else { self.timing.quiet })
    }

    /// Keeps an inotify watch on the folder that is at our path now.
    fn watch_folder(&mut self, notify: &Sender<notify::Result<notify::Event>>, again: bool) {
        let Ok(identity) = identity(&self.dir) else {
            self.watcher = None;
            return;
        };
        if !again && self.watcher.as_ref().is_some_and(|(watched, _)| *watched == identity) {
            return;
        }
        self.watcher = None;
        let hints = notify.clone();
        let watcher = notify::recommended_watcher(move |event| {
            // The receiver goes only with the thread that owns the watcher.
            hints.send(event).ok();
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::NonRecursive)?;
            // The folder itself is not told of when a link leads to another one: that happens where the link is.
            if let Some(parent) = self.dir.parent().filter(|_| self.dir.is_symlink()) {
                watcher.watch(parent, RecursiveMode::NonRecursive)?;
            }
            Ok(watcher)
        });
        self.unwatched = match watcher {
            Ok(watcher) => {
                self.watcher = Some((identity, watcher));
                None
            }
            Err(e) => Some(self.about_folder(
                format!(
                    "can't be watched: {e} (limits: sysctl fs.inotify.max_user_instances, max_user_watches); \
                     changes are seen every {} s",
                    self.timing.rescan.as_secs()
                ),
                Severity::Warning,
            )),
        };
    }

    fn about_folder(&self, message: String, severity: Severity) -> Problem {
        let hides = if severity == Severity::Error { Hides::Anything } else { Hides::Nothing };
        Problem {
            file: Some(self.dir.clone()),
            line: None,
            object: None,
            field: None,
            message,
            severity,
            hides,
        }
    }

    /// Looks at what there is to look at and tells what came of it.
    fn turn(&mut self, mut todo: Todo, since: Instant) -> Result<(), Gone> {
        todo.names.retain(|name| !self.unclosed.contains_key(name));
        let whole = todo.everything || self.trouble.is_some() || !self.synced;
        let lock = whole || todo.lock;
        let start = Instant::now();
        let names = if whole { self.survey(todo.names) } else { self.forget_missing(todo.names) };
        if whole {
            self.survey_cost = start.elapsed();
        }
        for name in &names {
            match Stamp::of(&self.dir.join(name)).filter(|stamp| !stamp.is_fresh()) {
                Some(stamp) => drop(self.stamps.insert(name.clone(), stamp)),
                // The next rescan reads it again, to be sure.
                None => drop(self.stamps.remove(name)),
            }
        }
        for (name, parsed) in read_all(&self.dir, &names, Some(&self.config)) {
            self.store.replace(name, parsed);
        }
        // Before the services that it is about. A folder that can't be used now says nothing about its lock either.
        if lock && self.trouble.is_none() {
            self.read_lock()?;
        }
        self.tell(since)
    }

    fn read_lock(&mut self) -> Result<(), Gone> {
        match Lock::read(&self.dir) {
            Ok(lock) => {
                self.bad_lock = None;
                let lock = lock.unwrap_or_default();
                if lock != self.lock {
                    self.lock = lock;
                    self.send(SourceMessage::Lock(self.lock.clone()))?;
                }
            }
            // What it is about is served as before: no reason to leave anything else as it is.
            Err(e) => {
                let message = format!("{e}; what it said before stays in force");
                self.bad_lock = Some(self.about_folder(message, Severity::Warning));
            }
        }
        Ok(())
    }

    /// The whole folder: which files are new or changed. Files that are gone are forgotten.
    fn survey(&mut self, forced: BTreeSet<OsString>) -> Vec<OsString> {
        self.trouble = None;
        let found = identity(&self.dir).and_then(|identity| Ok((identity, list(&self.dir)?)));
        let (identity, names) = match found {
            Ok(found) => found,
            Err(e) => {
                let mut problem = unreadable(&self.dir, &e);
                if self.synced {
                    problem.message.push_str("; what was in it stays in force");
                }
                self.trouble = Some(problem);
                return Vec::new();
            }
        };
        let other = self.identity.or(self.before).is_some_and(|before| before != identity);
        let served = !self.store.is_empty() || (self.identity.is_none() && self.before.is_some());
        if names.is_empty() && other && served {
            let message = "was replaced by an empty folder (unmounted?); what was in it stays in force. \
                           If it is meant to be empty, put an empty file none.yaml into it";
            self.trouble = Some(self.about_folder(message.into(), Severity::Error));
            return Vec::new();
        }
        self.identity = Some(identity);
        let present: BTreeSet<&OsString> = names.iter().collect();
        let gone: Vec<OsString> =
            self.store.files().filter(|name| !present.contains(name)).cloned().collect();
        for name in gone {
            self.forget(&name);
        }
        let changed = |name: &OsString| {
            let stamp = Stamp::of(&self.dir.join(name));
            let other = stamp.is_none() || self.stamps.get(name) != stamp.as_ref();
            forced.contains(name) || (other && !self.unclosed.contains_key(name))
        };
        names.iter().filter(|name| changed(name)).cloned().collect()
    }

    /// Single files: those that are still there.
    fn forget_missing(&mut self, names: BTreeSet<OsString>) -> Vec<OsString> {
        let (there, gone): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| fs::symlink_metadata(self.dir.join(name)).is_ok());
        if !gone.is_empty() && identity(&self.dir).ok() != self.identity {
            // It is the folder that is gone, and not a file of it.
            return self.survey(there.into_iter().collect());
        }
        gone.iter().for_each(|name| self.forget(name));
        there.into_iter().filter(|name| !self.dir.join(name).is_dir()).collect()
    }

    fn forget(&mut self, name: &OsStr) {
        self.stamps.remove(name);
        self.store.remove(name);
    }

    fn tell(&mut self, since: Instant) -> Result<(), Gone> {
        let events = self.store.take_events();
        let folder = self.trouble.iter().chain(&self.unwatched).chain(&self.bad_lock).cloned();
        let problems: Vec<Problem> = folder.chain(self.store.problems(&self.dir)).collect();
        // That all can be read again is told after what was read: until then, what is missing may be in it.
        let mended = !unread(&self.told).is_within(&unread(&problems));
        if !mended {
            self.tell_problems(&problems)?;
        }
        if !events.is_empty() {
            self.send(SourceMessage::Events(events, since))?;
        }
        self.tell_problems(&problems)?;
        if !self.synced && self.trouble.is_none() {
            self.synced = true;
            self.send(SourceMessage::Synced)?;
        }
        Ok(())
    }

    fn tell_problems(&mut self, problems: &[Problem]) -> Result<(), Gone> {
        if problems == self.told {
            return Ok(());
        }
        self.told = problems.to_vec();
        self.send(SourceMessage::Problems(problems.to_vec()))
    }

    fn send(&self, message: SourceMessage) -> Result<(), Gone> {
        self.sender.send(message).map_err(|_| Gone)
    }
}

/// A folder: its file system and its number there. The path may lead to another one at any time.
pub type FolderId = (u64, u64);

/// The folder that this path leads to, if there is a manifest in it.
pub fn filled(dir: &Path) -> Option<FolderId> {
    let found = identity(dir).ok()?;
    list(dir).is_ok_and(|names| !names.is_empty()).then_some(found)
}

fn identity(dir: &Path) -> io::Result<FolderId> {
    fs::metadata(dir).map(|m| (m.dev(), m.ino()))
}

#[cfg(test)]
mod tests;
