use std::sync::mpsc;

use super::*;
use crate::model::{fixtures::brief, ids::PerFamily, node::MarkMask};

const TIMING: Timing = Timing {
    settle: Duration::from_millis(20),
    quiet: Duration::from_millis(100),
    unclosed: Duration::from_secs(600),
    at_most: Duration::from_secs(1),
    // So long that a test which passes was served by inotify, unless it says otherwise.
    rescan: Duration::from_secs(600),
    retry: Duration::from_millis(50),
};

fn config() -> NodeConfig {
    NodeConfig {
        name: "n1".into(),
        ranges: PerFamily { v4: Some("10.200.0.0/16".parse().unwrap()), v6: None },
        publish_range: 30000..=32767,
        reserved: vec![],
        mask: MarkMask::default(),
        zone: None,
    }
}

fn service(name: &str, port: u32) -> String {
    format!(
        "---\napiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

struct Watched {
    messages: Receiver<SourceMessage>,
    dir: PathBuf,
    problems: Vec<String>,
}

impl Watched {
    fn new(dir: &Path, timing: Timing) -> Self {
        Self::after(dir, timing, None)
    }

    /// After an earlier run that has served services from this folder.
    fn after(dir: &Path, timing: Timing, before: Option<FolderId>) -> Self {
        let (sender, messages) = mpsc::channel();
        watch_with(dir, config(), sender, timing, before).unwrap();
        Self { messages, dir: dir.into(), problems: vec![] }
    }

    fn next(&mut self, wait: Duration) -> Option<Vec<String>> {
        match self.messages.recv_timeout(wait).ok()? {
            SourceMessage::Synced => Some(vec!["synced".into()]),
            SourceMessage::Lock(lock) => Some(
                std::iter::once("lock".into()).chain(lock.services.keys().map(ToString::to_string)).collect(),
            ),
            SourceMessage::Problems(now) => {
                let dir = format!("{}", self.dir.display());
                self.problems = now.iter().map(|p| p.to_string().replace(&dir, "DIR")).collect();
                Some(vec!["problems".into()])
            }
            SourceMessage::Node(_) | SourceMessage::Refused(_) => None,
            SourceMessage::Events(events, _) => Some(events.iter().map(brief).collect()),
        }
    }

    /// The next messages are these.
    #[track_caller]
    fn expect(&mut self, messages: &[&[&str]]) {
        for expected in messages {
            let got = self.next(Duration::from_secs(10));
            assert_eq!(got.as_deref().unwrap_or(&[]), *expected, "{:?}", self.problems);
        }
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        assert_eq!(self.next(Duration::from_millis(400)), None);
    }
}

#[test]
fn tells_what_is_there_and_then_what_changes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a.yaml"), service("x", 1)).unwrap();
    fs::write(at(".hidden.yaml"), service("h", 1)).unwrap();
    fs::write(at("notes.txt"), "{").unwrap();
    fs::create_dir(at("sub.yaml")).unwrap();
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["x:1"], &["synced"]]);
    // A new file, a changed one, a renamed one, one that is renamed over another, a removed one.
    fs::write(at("b.yml"), service("z", 2)).unwrap();
    watched.expect(&[&["z:2"]]);
    fs::write(at("a.yaml"), service("x", 3)).unwrap();
    watched.expect(&[&["x:3"]]);
    fs::rename(at("b.yml"), at("c.json")).unwrap();
    watched.expect_nothing();
    fs::write(at("tmp"), service("z", 4)).unwrap();
    fs::rename(at("tmp"), at("c.json")).unwrap();
    watched.expect(&[&["z:4"]]);
    fs::remove_file(at("c.json")).unwrap();
    watched.expect(&[&["-z"]]);
    // Nothing changes: nothing is told.
    fs::write(at("a.yaml"), service("x", 3)).unwrap();
    watched.expect_nothing();
    // Emptied is empty.
    fs::remove_file(at("a.yaml")).unwrap();
    watched.expect(&[&["-x"]]);
}

#[test]
fn half_a_file_takes_nothing_away() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    fs::write(&path, service("x", 1) + &service("z", 1)).unwrap();
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["x:1", "z:1"], &["synced"]]);
    // Written by a slow program: emptied first, each step alone would be a valid file. Others are read meanwhile, also when
    // everything is looked through.
    let mut file = fs::File::create(&path).unwrap();
    watched.expect_nothing();
    for (n, text) in [(1, service("x", 2)), (2, service("z", 2))] {
        file.write_all(text.as_bytes()).unwrap();
        fs::write(dir.path().join("b.yaml"), service("other", n)).unwrap();
        fs::create_dir(dir.path().join(format!("..{n}"))).unwrap();
        watched.expect(&[&[&*format!("other:{n}")]]);
        std::thread::sleep(TIMING.at_most);
        watched.expect_nothing();
    }
    drop(file);
    watched.expect(&[&["x:2", "z:2"]]);
    fs::write(&path, "apiVersion: [").unwrap();
    watched.expect(&[&["problems"]]);
    assert_eq!(watched.problems, ["DIR/a.yaml:1: is not valid YAML: unclosed bracket '['"]);
    watched.expect_nothing();
    fs::write(&path, service("x", 2)).unwrap();
    watched.expect(&[&["-z"], &["problems"]]);
    assert!(watched.problems.is_empty());
}

#[test]
fn a_file_that_is_never_closed_is_read_in_the_end() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join("a.yaml")).unwrap();
    let timing = Timing { unclosed: Duration::from_secs(1), ..TIMING };
    let mut watched = Watched::new(dir.path(), timing);
    watched.expect(&[&["synced"]]);
    let written = Instant::now();
    file.write_all(service("x", 1).as_bytes()).unwrap();
    watched.expect(&[&["x:1"]]);
    assert!(written.elapsed() >= timing.unclosed, "{:?}", written.elapsed());
}

#[test]
fn follows_a_config_map() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let version = |n: u32, names: &[&str]| {
        let data = format!("..2026_{n}");
        fs::create_dir(at(&data)).unwrap();
        for name in names {
            fs::write(at(&data).join(format!("{name}.yaml")), service(name, n)).unwrap();
        }
        symlink(&data, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    version(1, &["x", "z"]);
    for name in ["x.yaml", "z.yaml"] {
        symlink(Path::new("..data").join(name), at(name)).unwrap();
    }
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["x:1", "z:1"], &["synced"]]);
    version(2, &["x", "z"]);
    fs::remove_dir_all(at("..2026_1")).unwrap();
    watched.expect(&[&["x:2", "z:2"]]);
    // A key that goes: its link leads nowhere for a moment, which takes nothing away yet.
    version(3, &["x"]);
    watched.expect(&[&["problems"], &["x:3"]]);
    assert_eq!(watched.problems, ["DIR/z.yaml: does not exist"]);
    fs::remove_file(at("z.yaml")).unwrap();
    watched.expect(&[&["-z"], &["problems"]]);
}

#[test]
fn a_folder_that_vanishes_takes_nothing_away() {
    let base = tempfile::tempdir().unwrap();
    let (dir, away) = (base.path().join("services"), base.path().join("away"));
    // Not there at the start: that is not an empty folder.
    let mut watched = Watched::new(&dir, TIMING);
    watched.expect(&[&["problems"]]);
    assert_eq!(watched.problems, ["DIR: does not exist"]);
    watched.expect_nothing();
    fs::create_dir(&away).unwrap();
    fs::write(away.join("a.yaml"), service("x", 1)).unwrap();
    fs::rename(&away, &dir).unwrap();
    watched.expect(&[&["x:1"], &["problems"], &["synced"]]);
    fs::rename(&dir, &away).unwrap();
    watched.expect(&[&["problems"]]);
    assert_eq!(watched.problems, ["DIR: does not exist; what was in it stays in force"]);
    // An empty one takes its place, as when a file system is unmounted.
    fs::create_dir(&dir).unwrap();
    watched.expect(&[&["problems"]]);
    assert!(
        watched.problems[0].starts_with("DIR: was replaced by an empty folder"),
        "{:?}",
        watched.problems
    );
    fs::remove_dir(&dir).unwrap();
    watched.expect(&[&["problems"]]);
    fs::rename(&away, &dir).unwrap();
    watched.expect(&[&["problems"]]);
    assert!(watched.problems.is_empty());
    // The watch is on the folder that is there now.
    fs::write(dir.join("a.yaml"), service("x", 2)).unwrap();
    watched.expect(&[&["x:2"]]);
    // By one rename, so that no file is seen to go before its folder.
    fs::rename(&dir, &away).unwrap();
    while watched.next(Duration::from_millis(400)).is_some_and(|m| m == ["problems"]) {}
    // A restored folder that holds less than before: now that counts.
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("b.yaml"), service("z", 1)).unwrap();
    let mut events = Vec::new();
    while events.len() < 2 {
        events.extend(watched.next(Duration::from_secs(10)).unwrap().into_iter().filter(|m| m != "problems"));
    }
    events.sort();
    assert_eq!(events, ["-x", "z:1"]);
}

#[test]
fn an_empty_folder_in_the_place_of_an_earlier_one_is_not_believed_at_the_start() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("services");
    fs::create_dir(&dir).unwrap();
    assert_eq!(filled(&dir), None);
    fs::write(dir.join("a.yaml"), service("x", 1)).unwrap();
    let before = filled(&dir);
    assert!(before.is_some());
    // Not mounted yet.
    fs::rename(&dir, base.path().join("away")).unwrap();
    fs::create_dir(&dir).unwrap();
    let mut watched = Watched::after(&dir, TIMING, before);
    watched.expect(&[&["problems"]]);
    assert!(
        watched.problems[0].starts_with("DIR: was replaced by an empty folder"),
        "{:?}",
        watched.problems
    );
    watched.expect_nothing();
    // It is meant.
    fs::write(dir.join("none.yaml"), "").unwrap();
    watched.expect(&[&["problems"], &["synced"]]);
    // The same folder, emptied while no agent was there.
    fs::remove_dir_all(&dir).unwrap();
    fs::rename(base.path().join("away"), &dir).unwrap();
    fs::remove_file(dir.join("a.yaml")).unwrap();
    let mut watched = Watched::after(&dir, TIMING, before);
    watched.expect(&[&["synced"]]);
}

#[test]
fn an_unreadable_file_keeps_what_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a.yaml"), service("x", 1)).unwrap();
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["x:1"], &["synced"]]);
    fs::write(at("a.yaml"), [0xff, 0xfe, 0, 0x41]).unwrap();
    watched.expect(&[&["problems"]]);
    assert_eq!(watched.problems, ["DIR/a.yaml: is not UTF-8 text"]);
    fs::remove_file(at("a.yaml")).unwrap();
    watched.expect(&[&["-x"], &["problems"]]);
}

#[test]
fn a_rescan_finds_what_nobody_told() {
    let base = tempfile::tempdir().unwrap();
    let (dir, outside) = (base.path().join("dir"), base.path().join("outside.yaml"));
    fs::create_dir(&dir).unwrap();
    fs::write(&outside, service("x", 1)).unwrap();
    std::os::unix::fs::symlink(&outside, dir.join("a.yaml")).unwrap();
    let mut watched = Watched::new(&dir, Timing { rescan: Duration::from_millis(100), ..TIMING });
    watched.expect(&[&["x:1"], &["synced"]]);
    // What a link leads to is changed where it is.
    fs::write(&outside, service("x", 2)).unwrap();
    watched.expect(&[&["x:2"]]);
}

#[test]
fn a_link_that_leads_to_another_folder_is_followed_at_once() {
    let base = tempfile::tempdir().unwrap();
    let (real, link) = (base.path().join("real"), base.path().join("link"));
    fs::create_dir(&real).unwrap();
    fs::write(real.join("a.yaml"), service("x", 1)).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let mut watched = Watched::new(&link, TIMING);
    watched.expect(&[&["x:1"], &["synced"]]);
    let other = base.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("a.yaml"), service("x", 2)).unwrap();
    std::os::unix::fs::symlink(&other, base.path().join("new")).unwrap();
    // What else happens beside it is nobody's business.
    fs::write(base.path().join("a.yaml"), service("x", 3)).unwrap();
    fs::rename(base.path().join("new"), &link).unwrap();
    watched.expect(&[&["x:2"]]);
    fs::write(other.join("a.yaml"), service("x", 4)).unwrap();
    watched.expect(&[&["x:4"]]);
    watched.expect_nothing();
}

#[test]
fn the_lock_file_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let lock = dir.path().join("meshlb.lock");
    let text =
        |name: &str| format!("version: 1\nservices:\n  default/{name}:\n    vips: {{v4: 10.200.0.9}}\n");
    fs::write(dir.path().join("a.yaml"), service("a", 80)).unwrap();
    fs::write(&lock, text("a")).unwrap();
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["lock", "default/a"], &["a:80"], &["synced"]]);
    let draft = dir.path().join(".meshlb.lock.new");
    fs::write(&draft, text("b")).unwrap();
    fs::rename(&draft, &lock).unwrap();
    watched.expect(&[&["lock", "default/b"]]);
    // A damaged one changes nothing but is told; so does one that says the same.
    fs::write(&lock, "version: 7\n").unwrap();
    watched.expect(&[&["problems"]]);
    assert!(watched.problems[0].contains("version 7") && watched.problems[0].contains("stays in force"));
    fs::write(&lock, text("b")).unwrap();
    watched.expect(&[&["problems"]]);
    assert_eq!(watched.problems, [] as [&str; 0]);
    fs::remove_file(&lock).unwrap();
    watched.expect(&[&["lock"]]);
    watched.expect_nothing();
}

/// Whoever is told that all can be read now must know what was read, or it takes the service for gone.
#[test]
fn a_service_that_can_be_read_again_comes_before_the_news_that_all_can() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    std::os::unix::fs::symlink("/nonexistent/a.yaml", &file).unwrap();
    let mut watched = Watched::new(dir.path(), TIMING);
    watched.expect(&[&["problems"], &["synced"]]);
    let draft = dir.path().join(".draft");
    fs::write(&draft, service("a", 80)).unwrap();
    fs::rename(&draft, &file).unwrap();
    watched.expect(&[&["a:80"], &["problems"]]);
    assert!(watched.problems.is_empty());
}
