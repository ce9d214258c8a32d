//! The manifests in `tests/corpus`: what is good is accepted, what is bad is refused, and the message names the
//! place. Each bad file begins with its messages, as comments; `UPDATE_GOLDEN=1` writes them anew.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::PathBuf};

use proptest::prelude::*;

use meshlb::source::{
    files::parse_text,
    problem::{Problem, Severity},
};

fn corpus(kind: &str) -> Vec<(PathBuf, String)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

fn messages<'a>(problems: impl IntoIterator<Item = &'a Problem>) -> Vec<String> {
    problems.into_iter().map(|p| p.to_string().split_once(": ").unwrap().1.to_owned()).collect()
}

#[test]
fn good_ones_are_accepted() {
    for (path, text) in corpus("good") {
        let parsed = parse_text(&path, &text, None);
        let problems: Vec<&Problem> =
            parsed.problems.iter().filter(|p| p.severity > Severity::Note).collect();
        assert!(problems.iter().all(|p| p.severity < Severity::Error), "{}: {problems:?}", path.display());
        assert!(!parsed.entries.is_empty(), "{}", path.display());
        let expected: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# warning: ")).collect();
        let got: Vec<String> =
            messages(problems).iter().map(|m| m.split_once(": ").unwrap().1.to_owned()).collect();
        assert_eq!(got, expected, "{}", path.display());
    }
}

#[test]
fn bad_ones_are_refused_with_the_place() {
    let mut wrong = Vec::new();
    for (path, text) in corpus("bad") {
        let comments = text.lines().take_while(|l| l.starts_with("# error: ")).count();
        let manifest: String = text.lines().skip(comments).map(|l| format!("{l}\n")).collect();
        let parsed = parse_text("x".as_ref(), &manifest, None);
        let errors: Vec<&Problem> =
            parsed.problems.iter().filter(|p| p.severity == Severity::Error).collect();
        assert!(!errors.is_empty(), "{} is accepted", path.display());
        // Lines are those of the manifest below the comments.
        let got: String =
            errors.iter().map(|p| format!("# error: {}\n", p.to_string().trim_start_matches("x:"))).collect();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, format!("{got}{manifest}")).unwrap();
        } else if got != text.lines().take(comments).map(|l| format!("{l}\n")).collect::<String>() {
            wrong.push(format!("{}:\n{got}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Damaged manifests get a verdict, never a panic, and every message has its line.
    #[test]
    fn damaged_ones_get_a_verdict(
        pick in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(), change in any::<prop::sample::Index>(),
        with in "[\\[\\]{}:&*!|>'\"%@`#,?\\- \\t\\n0-9a-zé\u{0}]{0,3}",
    ) {
        let files = corpus("good");
        let (_, text) = &files[pick.index(files.len())];
        let chars: Vec<char> = text.chars().collect();
        let (cut, change) = (cut.index(chars.len() + 1), change.index(chars.len()));
        let damaged: String = chars[..change.min(cut)].iter().chain(&with.chars().collect::<Vec<_>>()).chain(&chars[(change + 1).min(cut)..cut]).collect();
        for problem in parse_text("x".as_ref(), &damaged, None).problems {
            prop_assert!(problem.line.is_some(), "{:?}", problem);
        }
    }
}
