//! `meshlb check`: holds manifests against what the API server accepts, without one.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;

use super::print;
use crate::{
    allocate::Lock,
    source::{
        files,
        object::{ParsedFile, Verdict},
        problem::{Severity, one_line},
        store::Store,
    },
};

/// Checks files, folders and, for `-`, standard input.
///
/// Errors are what the API server would refuse; they make the exit code 1. Warnings are what it would accept but
/// this program does not act on.
///
/// # Errors
/// The result can't be printed.
pub fn run(files: &[PathBuf]) -> Result<ExitCode> {
    let mut told = Vec::new();
    let counts = check(files, &mut io::stdin().lock(), &mut told)?;
    // Where it can't be told, the exit code tells.
    let _ = io::stderr().lock().write_all(&told);
    if counts.errors > 0 {
        return Ok(ExitCode::FAILURE);
    }
    let (objects, files) = (plural(counts.objects, "object"), plural(counts.files, "file"));
    print::out(format_args!("{objects} in {files} checked: no errors\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// What [`check`] came across.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Files read.
    pub files: usize,
    /// Objects of our kinds that can be used.
    pub objects: usize,
    /// Problems that the API server would refuse the object for, and files that can't be read.
    pub errors: usize,
}

/// Checks and writes one line a problem.
///
/// # Errors
/// Only those of writing.
pub fn check(paths: &[PathBuf], stdin: &mut dyn Read, out: &mut dyn Write) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut lines: Vec<(Severity, String)> = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut bytes = Vec::new();
            let name = Path::new("standard input");
            match stdin.read_to_end(&mut bytes).map(|_| String::from_utf8(bytes)) {
                Ok(Ok(text)) => one(files::parse_text(name, &text, None), &mut counts, &mut lines),
                Ok(Err(_)) => lines.push((Severity::Error, "standard input: is not UTF-8".into())),
                Err(e) => lines.push((Severity::Error, format!("standard input: can't be read: {e}"))),
            }
        } else if path.is_dir() {
            folder(path, &mut counts, &mut lines);
        } else {
            one(files::read_file(path, None), &mut counts, &mut lines);
        }
    }
    for (severity, line) in lines {
        match severity {
            Severity::Note => writeln!(out, "note: {line}")?,
            Severity::Warning | Severity::Refused => writeln!(out, "warning: {line}")?,
            Severity::Error => {
                counts.errors += 1;
                writeln!(out, "error: {line}")?;
            }
        }
    }
    Ok(counts)
}

fn one(parsed: ParsedFile, counts: &mut Counts, lines: &mut Vec<(Severity, String)>) {
    counts.files += 1;
    counts.objects += parsed.entries.iter().filter(|e| e.verdict != Verdict::Wrong).count();
    lines.extend(parsed.problems.iter().map(|p| (p.severity, p.to_string())));
}

fn folder(dir: &Path, counts: &mut Counts, lines: &mut Vec<(Severity, String)>) {
    let names = match files::list(dir) {
        Ok(names) => names,
        Err(e) => {
            let problem = files::unreadable(dir, &e);
            return lines.push((problem.severity, problem.to_string()));
        }
    };
    let mut store = Store::default();
    for (name, parsed) in files::read_all(dir, &names, None) {
        counts.files += 1;
        counts.objects += parsed.entries.iter().filter(|e| e.verdict != Verdict::Wrong).count();
        store.replace(name, parsed);
    }
    lines.extend(store.problems(dir).iter().map(|p| (p.severity, p.to_string())));
    if let Err(e) = Lock::read(dir) {
        lines.push((Severity::Error, one_line(&format!("{}: {e}", dir.display())).into_owned()));
    }
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn lines(paths: &[PathBuf], stdin: &str) -> (Counts, Vec<String>) {
        let mut out = Vec::new();
        let counts = check(paths, &mut stdin.as_bytes(), &mut out).unwrap();
        (counts, String::from_utf8(out).unwrap().lines().map(Into::into).collect())
    }

    #[test]
    fn files_folders_and_standard_input() {
        let dir = tempfile::tempdir().unwrap();
        let service = "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {name: x}\nspec: {ports: [{port: 80}]}\n";
        fs::write(dir.path().join("a.yaml"), service).unwrap();
        fs::write(dir.path().join("b.yaml"), service).unwrap();
        let path = |name: &str| dir.path().join(name);
        let name = |name: &str| path(name).display().to_string();
        let (counts, out) =
            lines(&[path("a.yaml"), "-".into(), path("c.yaml"), path("")], &service.replace("80", "0"));
        assert_eq!(counts, Counts { files: 5, objects: 3, errors: 2 });
        assert_eq!(
            out,
            [
                "error: standard input:4: MeshService default/x: spec.ports[0].port: must be at least 1, not 0".into(),
                format!("error: {}: does not exist", name("c.yaml")),
                format!("warning: {}:1: MeshService default/x: is defined in a.yaml too; that one is used", name("b.yaml")),
            ]
        );
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo.yaml");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let link = |name: &str, to: &str| {
            let path = dir.path().join(name);
            std::os::unix::fs::symlink(to, &path).unwrap();
            path
        };
        // Reading this one waits for ever, or it has no end, or says that it is empty.
        let paths = [
            fifo,
            link("device.yaml", "/dev/zero"),
            link("proc.yaml", "/proc/kmsg"),
            link("a.yaml", "/proc/self/status"),
        ];
        for path in paths {
            let (counts, out) = lines(std::slice::from_ref(&path), "");
            assert_eq!(counts.errors, 1, "{out:?}");
            assert!(out[0].starts_with(&format!("error: {}: ", path.display())), "{out:?}");
            assert!(out[0].contains("it is not a regular file"), "{out:?}");
        }
        let (counts, out) = lines(&["/dev/null".into()], "");
        assert_eq!((counts.errors, out.len()), (1, 1));
    }

    #[test]
    fn one_problem_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a\nb.yaml");
        let name = "x\\ny\\u001b[31m";
        fs::write(
            &file,
            format!("apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: \"{name}\"}}\nspec: {{ports: [{{port: 80, \"no\\nfield\": 1}}]}}\n"),
        )
        .unwrap();
        let (counts, out) = lines(&[file, dir.path().to_owned(), "n\no".into()], "");
        assert_eq!(counts.errors, out.len(), "{out:#?}");
        assert!(out.iter().all(|line| line.starts_with("error: ") && !line.contains('\u{1b}')), "{out:#?}");
    }
}
