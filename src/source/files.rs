//! Reads manifests: one file, or a whole folder once.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    document::{self, Node},
    judge::{At, Judgement, judge},
    object::{Entry, Kind, ObjectId, ParsedFile},
    problem::{Problem, Severity},
    store::Store,
};
use crate::{
    api,
    model::{
        endpoints::Slice,
        ids::ServiceKey,
        node::{NodeConfig, NodeSays},
        service::Service,
        snapshot::Event,
        unread::Hides,
    },
};

/// Files bigger than this are not read: 10,000 services fit in half of it.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A folder read once.
#[derive(Default, Debug)]
pub struct Loaded {
    /// The services that can be used.
    pub services: BTreeMap<ServiceKey, Arc<Service>>,
    /// The slices that can be used.
    pub slices: BTreeMap<ServiceKey, Arc<Slice>>,
    /// All that is wrong.
    pub problems: Vec<Problem>,
    /// What the source knows of this node, where it knows any.
    pub node: Option<NodeSays>,
}

impl Loaded {
    /// What a first read has told.
    pub(super) fn new(events: Vec<Event>, problems: Vec<Problem>) -> Self {
        let mut loaded = Self { problems, ..Self::default() };
        for event in events {
            match event {
                Event::Service(service) => drop(loaded.services.insert(service.key.clone(), service)),
                Event::Slice(slice) => drop(loaded.slices.insert(slice.key.clone(), slice)),
                // What is read once has every object once.
                Event::Granted(..) | Event::ServiceGone(_) | Event::SliceGone(_) => {}
            }
        }
        loaded
    }

    /// Whether nothing in the folder is wrong that should be served.
    pub fn is_complete(&self) -> bool {
        self.problems.iter().all(|p| p.severity < Severity::Error)
    }

    /// The whole content as events.
    pub fn events(&self) -> Vec<Event> {
        let slices = self.slices.values().cloned().map(Event::Slice);
        slices.chain(self.services.values().cloned().map(Event::Service)).collect()
    }
}

/// Reads a folder once.
///
/// With a `config`, the rules that depend on it (VIP ranges, reserved ports) are applied too.
///
/// # Errors
/// The folder itself can't be read: that is not an empty folder.
pub fn load(dir: &Path, config: Option<&NodeConfig>) -> Result<Loaded, Box<Problem>> {
    let names = list(dir).map_err(|e| unreadable(dir, &e))?;
    let mut store = Store::default();
    for (name, parsed) in read_all(dir, &names, config) {
        store.replace(name, parsed);
    }
    Ok(Loaded::new(store.take_events(), store.problems(dir)))
}

/// The problem of a folder or file that can't be read.
pub fn unreadable(path: &Path, error: &io::Error) -> Problem {
    let message = match error.kind() {
        io::ErrorKind::NotFound => "does not exist".into(),
        io::ErrorKind::PermissionDenied => "may not be read: permission denied".into(),
        io::ErrorKind::NotADirectory => "is not a directory".into(),
        _ => format!("can't be read: {error}"),
    };
    Problem {
        file: Some(path.into()),
        line: None,
        object: None,
        field: None,
        message,
        severity: Severity::Error,
        hides: Hides::Anything,
    }
}

/// Names of the manifests in a folder, sorted.
///
/// # Errors
/// The folder can't be read to its end.
pub fn list(dir: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !is_manifest(&entry.file_name()) {
            continue;
        }
        let kind = entry.file_type()?;
        let is_dir = kind.is_dir() || (kind.is_symlink() && entry.path().is_dir());
        // A directory called x.yaml is none of ours; a link that leads nowhere is reported by whoever reads it.
        if !is_dir {
            names.push(entry.file_name());
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a file of this name is read: `*.yaml`, `*.yml` or `*.json`, and not hidden.
pub fn is_manifest(name: &OsStr) -> bool {
    let hidden = name.as_encoded_bytes().starts_with(b".");
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Reads and parses files, on all cores where there are many.
pub fn read_all(dir: &Path, names: &[OsString], config: Option<&NodeConfig>) -> Vec<(OsString, ParsedFile)> {
    let read = |name: &OsString| (name.clone(), read_file(&dir.join(name), config));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if threads == 1 || names.len() < 64 {
        return names.iter().map(read).collect();
    }
    std::thread::scope(|scope| {
        let parts: Vec<_> = names
            .chunks(names.len().div_ceil(threads))
            .map(|part| scope.spawn(move || part.iter().map(read).collect::<Vec<_>>()))
            .collect();
        parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Reads and parses one file.
pub fn read_file(path: &Path, config: Option<&NodeConfig>) -> ParsedFile {
    match read_regular(path) {
        Ok(text) => parse_text(path, &text, config),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            whole_file(path, None, "is not UTF-8 text".into())
        }
        Err(e) => {
            ParsedFile { problems: vec![unreadable(path, &e)], incomplete: true, ..ParsedFile::default() }
        }
    }
}

/// The text of a file that has an end, within bounds: some files of the kernel's own call themselves regular and empty,
/// and reading them waits for ever.
fn read_regular(path: &Path) -> io::Result<String> {
    let not_regular = || io::Error::other("it is not a regular file");
    // A pipe without a writer keeps who opens it waiting: asked first, opened then, and asked again.
    if !fs::metadata(path)?.is_file() {
        return Err(not_regular());
    }
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || is_of_kernel(&file) {
        return Err(not_regular());
    }
    let too_big = || io::Error::other(format!("it is bigger than {} MiB", MAX_FILE_BYTES >> 20));
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_big());
    }
    let mut text = String::new();
    // It may grow while it is read.
    if file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)? as u64 > MAX_FILE_BYTES {
        return Err(too_big());
    }
    Ok(text)
}

/// Whether a file is one of /proc, where the kernel makes up the content (`PROC_SUPER_MAGIC` of `linux/magic.h`).
fn is_of_kernel(file: &fs::File) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

fn whole_file(path: &Path, line: Option<u64>, message: String) -> ParsedFile {
    let problem = Problem {
        file: Some(path.into()),
        line,
        object: None,
        field: None,
        message,
        severity: Severity::Error,
        hides: Hides::Anything,
    };
    ParsedFile { problems: vec![problem], incomplete: true, ..ParsedFile::default() }
}

/// Parses the text of a file in the folder of the node with this `config`; without one, as `check` does. `path` is only used to speak of it.
pub fn parse_text(path: &Path, text: &str, config: Option<&NodeConfig>) -> ParsedFile {
    let documents = match document::parse(text) {
        Ok(documents) => documents,
        Err(e) => return whole_file(path, e.line, format!("is not valid YAML: {}", e.message)),
    };
    let mut reader = Reader { path, config, out: ParsedFile::default(), lines: HashMap::new() };
    for node in &documents {
        reader.object(node);
    }
    reader.out
}

struct Reader<'a> {
    path: &'a Path,
    config: Option<&'a NodeConfig>,
    out: ParsedFile,
    /// Lines of the objects that are in there.
    lines: HashMap<ObjectId, u64>,
}

impl Reader<'_> {
    fn object(&mut self, node: &Node) {
        let kind = node.text("kind");
        let version = node.text("apiVersion");
        match (kind, version) {
            (Some("List" | "MeshServiceList" | "EndpointSliceList"), Some(_)) => {
                match node.get("items").map(|items| &items.content) {
                    Some(document::Content::List(items)) => items.iter().for_each(|item| self.object(item)),
                    _ => self.nameless(node, "items", "must be a list"),
                }
            }
            (Some(api::KIND), Some(_)) => self.named(node, Kind::Service),
            (Some("EndpointSlice"), Some(version)) if version.starts_with("discovery.k8s.io/") => {
                self.named(node, Kind::Slice);
            }
            (Some(kind), Some(version)) if version.starts_with("meshlb.dev/") => {
                let message = format!("{version} has no kind {kind:?}; it is {:?}", api::KIND);
                self.nameless(node, "kind", &message);
            }
            (Some(kind), Some(version)) => {
                let message = format!("{version} {kind} is not used here and ignored");
                self.problem(node.line, None, None, message, (Severity::Note, Hides::Nothing));
            }
            (None, _) => self.nameless(node, "kind", "is required"),
            (_, None) => self.nameless(node, "apiVersion", "is required"),
        }
    }

    /// A document that can't be told what it is.
    fn nameless(&mut self, node: &Node, field: &str, message: &str) {
        self.out.incomplete = true;
        let line = node.line_of(field);
        self.problem(line, None, Some(field.into()), message.into(), (Severity::Error, Hides::Anything));
    }

    fn named(&mut self, node: &Node, kind: Kind) {
        let metadata = node.get("metadata");
        let name = metadata.and_then(|m| m.text("name")).unwrap_or_default();
        let namespace =
            metadata.and_then(|m| m.text("namespace")).filter(|n| !n.is_empty()).unwrap_or("default");
        let id = ObjectId { kind, key: ServiceKey::new(namespace, name) };
        let known = !name.is_empty();
        let label = if known { id.to_string() } else { kind.as_str().to_owned() };
        if let Some(first) = self.lines.get(&id) {
            let message = format!("is defined twice; the one in line {first} is used");
            return self.problem(node.line, Some(label), None, message, (Severity::Refused, Hides::Nothing));
        }
        let at = self.config.map_or(At::Manifest, At::Folder);
        let Judgement { verdict, findings, severity } = judge(kind, node.to_json(), at);
        let hides = match severity {
            Severity::Error if known => hides(&id, node),
            Severity::Error => Hides::Anything,
            _ => Hides::Nothing,
        };
        for finding in findings {
            let line = node.line_of(&finding.field);
            let bad = (severity, hides.clone());
            self.problem(line, Some(label.clone()), Some(finding.field), finding.message, bad);
        }
        if known {
            self.lines.insert(id.clone(), node.line);
            self.out.entries.push(Entry { id, line: node.line, verdict });
        } else {
            self.out.incomplete = true;
        }
    }

    fn problem(
        &mut self,
        line: u64,
        object: Option<String>,
        field: Option<String>,
        message: String,
        (severity, hides): (Severity, Hides),
    ) {
        let line = (line > 0).then_some(line);
        self.out.problems.push(Problem {
            file: Some(PathBuf::from(self.path)),
            line,
            object,
            field,
            message,
            severity,
            hides,
        });
    }
}

/// What can't be known while an object can't be used.
fn hides(id: &ObjectId, node: &Node) -> Hides {
    let label = || node.get("metadata")?.get("labels")?.text(api::SERVICE_NAME_LABEL);
    match id.kind {
        Kind::Service => Hides::Service(id.key.clone()),
        Kind::Slice => match label() {
            Some(group) => Hides::EndpointsOf(ServiceKey::new(id.key.namespace.clone(), group)),
            None => Hides::Anything,
        },
    }
}
