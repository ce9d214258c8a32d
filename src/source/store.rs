//! What is in force: per file what it says, per object its last good version, and the changes between.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    path::Path,
    sync::Arc,
};

use super::{
    object::{Kind, Object, ObjectId, ParsedFile, Verdict},
    problem::{Problem, Severity},
};
use crate::model::{
    small::{SmallMap, SmallSet},
    snapshot::Event,
    unread::Hides,
};

/// Objects of a folder. Work is in proportion to what changes.
#[derive(Default, Debug)]
pub struct Store {
    files: HashMap<OsString, Entries>,
    /// What is wrong, of files with which something is.
    problems: BTreeMap<OsString, Vec<Problem>>,
    /// Files that name an object; the first one wins.
    owners: HashMap<ObjectId, SmallSet<OsString>>,
    /// Objects that several files name.
    contested: BTreeSet<ObjectId>,
    /// What readers of the events know: the last good versions.
    emitted: HashMap<ObjectId, Object>,
    /// Objects to look at before the next events go out.
    touched: BTreeSet<ObjectId>,
    /// Files of which nobody knows all that they name.
    incomplete: BTreeSet<OsString>,
    /// Services that no file names any more, unless it is one of those: they stay until it is known. Slices don't: an endpoint
    /// that is gone must not be waited for until somebody has mended another file.
    aside: BTreeSet<ObjectId>,
}

/// Line and verdict of each object of a file.
type Entries = SmallMap<ObjectId, (u64, Verdict)>;

impl Store {
    /// Whether no object is in force.
    pub fn is_empty(&self) -> bool {
        self.emitted.is_empty()
    }

    /// Names of the files that it knows.
    pub fn files(&self) -> impl Iterator<Item = &OsString> {
        self.files.keys()
    }

    /// Takes in what a file says now.
    pub fn replace(&mut self, name: OsString, parsed: ParsedFile) {
        if parsed.incomplete {
            self.incomplete.insert(name.clone());
        } else {
            self.completed(&name);
        }
        let mut entries: Entries = parsed.entries.into_iter().map(|e| (e.id, (e.line, e.verdict))).collect();
        let old = self.files.remove(&name).unwrap_or_default();
        for (id, held) in old {
            match entries.get(&id) {
                Some(now) if *now == held => {}
                Some(_) => drop(self.touched.insert(id)),
                None if parsed.incomplete => drop(entries.insert(id, held)),
                None => {
                    self.disown(&id, &name);
                    self.touched.insert(id);
                }
            }
        }
        for id in entries.keys() {
            let owners = self.owners.entry(id.clone()).or_default();
            if owners.insert(name.clone()) {
                self.touched.insert(id.clone());
                if owners.len() > 1 {
                    self.contested.insert(id.clone());
                }
            }
        }
        if parsed.problems.is_empty() {
            self.problems.remove(&name);
        } else {
            self.problems.insert(name.clone(), parsed.problems);
        }
        // Kept for as long as the file is.
        let mut entries = entries.into_tuple_vec();
        entries.shrink_to_fit();
        let entries = Entries::from_sorted_store_unchecked(entries);
        self.files.insert(name, entries);
    }

    /// A file is gone, and with it what only it named.
    pub fn remove(&mut self, name: &OsStr) {
        self.problems.remove(name);
        self.completed(name);
        let Some(entries) = self.files.remove(name) else { return };
        for (id, _) in entries {
            self.disown(&id, name);
            self.touched.insert(id);
        }
    }

    /// Nothing is hidden in this file.
    fn completed(&mut self, name: &OsStr) {
        if self.incomplete.remove(name) && self.incomplete.is_empty() {
            self.touched.append(&mut self.aside);
        }
    }

    fn disown(&mut self, id: &ObjectId, name: &OsStr) {
        let Some(owners) = self.owners.get_mut(id) else { return };
        owners.remove(name);
        if owners.len() < 2 {
            self.contested.remove(id);
        }
        if owners.is_empty() {
            self.owners.remove(id);
        }
    }

    /// What has changed since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for id in std::mem::take(&mut self.touched) {
            let owner = self.owners.get(&id).and_then(SmallSet::first);
            let verdict = owner.and_then(|name| self.files.get(name)).and_then(|f| f.get(&id));
            self.aside.remove(&id);
            if verdict.is_none() && id.kind == Kind::Service && !self.incomplete.is_empty() {
                events.extend(self.set_created(&id, u64::MAX));
                if self.emitted.contains_key(&id) {
                    self.aside.insert(id);
                }
                continue;
            }
            match verdict.map(|(_, verdict)| verdict) {
                // It may have been set aside, and is named again.
                Some(Verdict::Wrong) => events.extend(self.set_created(&id, 0)),
                Some(Verdict::Good(object)) => {
                    if self.emitted.get(&id) != Some(object) {
                        events.push(object.event());
                        self.emitted.insert(id, object.clone());
                    }
                }
                Some(Verdict::Withheld) | None => {
                    if self.emitted.remove(&id).is_some() {
                        events.push(match id.kind {
                            Kind::Service => Event::ServiceGone(id.key),
                            Kind::Slice => Event::SliceGone(id.key),
                        });
                    }
                }
            }
        }
        events
    }

    /// Where two want the same address or number the one that was made first has it. In a folder that is always 0, but for what is
    /// set aside, which gives way to whoever is named.
    fn set_created(&mut self, id: &ObjectId, created: u64) -> Option<Event> {
        let Some(Object::Service(service)) = self.emitted.get_mut(id) else { return None };
        (service.created != created).then(|| {
            Arc::make_mut(service).created = created;
            Event::Service(service.clone())
        })
    }

    /// All that is wrong now, in order of files and lines.
    pub fn problems(&self, dir: &Path) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.problems.values().flatten().cloned().collect();
        for id in &self.contested {
            let Some(owners) = self.owners.get(id) else { continue };
            let Some(winner) = owners.first() else { continue };
            for loser in owners.iter().skip(1) {
                let line = self.files.get(loser).and_then(|f| f.get(id)).map(|(line, _)| *line);
                problems.push(Problem {
                    file: Some(dir.join(loser)),
                    line: line.filter(|l| *l > 0),
                    object: Some(id.to_string()),
                    field: None,
                    message: format!("is defined in {} too; that one is used", winner.to_string_lossy()),
                    severity: Severity::Refused,
                    hides: Hides::Nothing,
                });
            }
        }
        if let (Some(file), Some(first)) = (self.incomplete.first(), self.aside.first()) {
            let message = match self.aside.len() {
                1 => format!("{first} is in no other file any more, and stays until this one can be read"),
                n => format!(
                    "{n} services are in no other file any more, and stay until this one can be read: {first} and others"
                ),
            };
            problems.push(Problem {
                file: Some(dir.join(file)),
                line: None,
                object: None,
                field: None,
                message,
                severity: Severity::Note,
                hides: Hides::Nothing,
            });
        }
        problems.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::fixtures::brief, source::files::parse_text};

    fn service(name: &str, port: u32) -> String {
        format!(
            "---\napiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: {name}}}\nspec:\n  ports:\n  - port: {port}\n"
        )
    }

    fn put(store: &mut Store, file: &str, text: &str) -> Vec<String> {
        store.replace(file.into(), parse_text(Path::new(file), text, None));
        events(store)
    }

    fn events(store: &mut Store) -> Vec<String> {
        store.take_events().iter().map(brief).collect()
    }

    fn problems(store: &Store) -> Vec<String> {
        store.problems(Path::new("")).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_changes_come_out() {
        let mut store = Store::default();
        assert_eq!(put(&mut store, "a.yaml", &(service("x", 1) + &service("w", 2))), ["w:2", "x:1"]);
        assert!(put(&mut store, "a.yaml", &(service("x", 1) + &service("w", 2))).is_empty());
        assert_eq!(put(&mut store, "a.yaml", &(service("x", 1) + &service("w", 3))), ["w:3"]);
        assert_eq!(put(&mut store, "a.yaml", &service("w", 3)), ["-x"]);
        assert_eq!(put(&mut store, "b.yaml", &service("x", 1)), ["x:1"]);
        store.remove(OsStr::new("a.yaml"));
        assert_eq!(events(&mut store), ["-w"]);
    }

    #[test]
    fn what_is_wrong_keeps_its_last_good_version() {
        let mut store = Store::default();
        put(&mut store, "a.yaml", &(service("x", 1) + &service("w", 2)));
        assert!(put(&mut store, "a.yaml", &(service("x", 70000) + &service("w", 2))).is_empty());
        assert_eq!(
            problems(&store),
            ["a.yaml:7: MeshService default/x: spec.ports[0].port: must be at most 65535, not 70000"]
        );
        assert_eq!(put(&mut store, "a.yaml", &(service("x", 7) + &service("w", 2))), ["x:7"]);
        assert!(problems(&store).is_empty());
        // Half a file, and an object without a name: nobody knows what is still meant to be there.
        assert!(put(&mut store, "a.yaml", "apiVersion: [").is_empty());
        assert!(put(&mut store, "a.yaml", &(service("''", 1) + &service("w", 2))).is_empty());
        assert_eq!(put(&mut store, "a.yaml", &service("w", 2)), ["-x"]);
        // Nothing good was ever seen of z.
        assert!(put(&mut store, "b.yaml", &service("z", 0)).is_empty());
        assert_eq!(put(&mut store, "b.yaml", ""), Vec::<String>::new());
    }

    /// It may have been moved there.
    #[test]
    fn what_is_in_no_file_stays_while_one_can_not_be_read() {
        let mut store = Store::default();
        put(&mut store, "a.yaml", &(service("x", 1) + &service("w", 2)));
        put(&mut store, "c.yaml", &service("v", 3));
        assert!(put(&mut store, "b.yaml", "apiVersion: [").is_empty());
        store.remove(OsStr::new("a.yaml"));
        // They are told once more: as what gives way to others.
        assert_eq!(events(&mut store), ["w:2", "x:1"]);
        let told = problems(&store);
        assert!(told.iter().any(|p| p.starts_with("b.yaml: 2 services are in no other file")), "{told:?}");
        // Of a file that can be read it is known.
        assert_eq!(put(&mut store, "c.yaml", &service("v", 4)), ["v:4"]);
        assert_eq!(put(&mut store, "d.yaml", &service("w", 2)), ["w:2"]);
        assert_eq!(put(&mut store, "b.yaml", &service("z", 1)), ["-x", "z:1"]);
        assert!(problems(&store).is_empty());
        // One that comes back wrong is what it was.
        put(&mut store, "b.yaml", "apiVersion: [");
        assert_eq!(put(&mut store, "c.yaml", ""), ["v:4"]);
        assert_eq!(put(&mut store, "b.yaml", &(service("v", 70000) + &service("z", 1))), ["v:4"]);
        assert_eq!(put(&mut store, "b.yaml", &service("z", 1)), ["-v"]);
        // Nor when it is gone.
        put(&mut store, "b.yaml", "apiVersion: [");
        assert_eq!(put(&mut store, "d.yaml", ""), ["w:2"]);
        store.remove(OsStr::new("b.yaml"));
        assert_eq!(events(&mut store), ["-w", "-z"]);
    }

    #[test]
    fn what_asks_for_more_than_we_can_do_is_not_served() {
        let mut store = Store::default();
        put(&mut store, "a.yaml", &service("x", 1));
        assert_eq!(put(&mut store, "a.yaml", &(service("x", 1) + "  sourceRanges: [10.0.0.0/8]\n")), ["-x"]);
        assert_eq!(
            problems(&store),
            [
                "a.yaml:8: MeshService default/x: spec.sourceRanges: is not supported yet; the service is not served while it is set"
            ]
        );
        assert_eq!(put(&mut store, "a.yaml", &service("x", 1)), ["x:1"]);
    }

    #[test]
    fn the_first_file_wins() {
        let mut store = Store::default();
        assert_eq!(put(&mut store, "b.yaml", &service("x", 2)), ["x:2"]);
        assert_eq!(put(&mut store, "a.yaml", &service("x", 1)), ["x:1"]);
        assert_eq!(
            problems(&store),
            ["b.yaml:2: MeshService default/x: is defined in a.yaml too; that one is used"]
        );
        assert!(put(&mut store, "b.yaml", &service("x", 3)).is_empty());
        store.remove(OsStr::new("a.yaml"));
        assert_eq!(events(&mut store), ["x:3"]);
        assert!(problems(&store).is_empty());
        assert_eq!(put(&mut store, "b.yaml", &(service("x", 3) + &service("x", 4))), Vec::<String>::new());
        assert_eq!(
            problems(&store),
            ["b.yaml:9: MeshService default/x: is defined twice; the one in line 2 is used"]
        );
    }
}
