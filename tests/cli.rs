//! The program as people run it: what it prints where, and what it ends with.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::{self, File},
    process::{Command, Output, Stdio},
};

fn meshlb(line: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshlb"));
    command.args(line).env_clear().stdin(Stdio::null());
    command
}

/// Its stdout as a pipe that nobody reads.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), "kind: nothing").unwrap();
    let folder = dir.path().to_str().unwrap();
    for (line, code) in [
        (&["crd"][..], 0),
        (&["completions", "bash"], 0),
        (&["--help"], 0),
        (&["check", "tests/corpus/good/minimal.yaml"], 0),
        (&["check", folder], 1),
    ] {
        let output = meshlb(line).stdout(closed()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{line:?}: {}", stderr(&output));
        assert!(
            !stderr(&output).contains("panicked") && !stderr(&output).contains("ipe"),
            "{}",
            stderr(&output)
        );
        let output = meshlb(line).stdout(closed()).stderr(closed()).status().unwrap();
        assert_eq!(output.code(), Some(code), "{line:?}");
    }
}

#[test]
fn a_full_disk_is_told_in_one_line() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for line in [
        &["crd"][..],
        &["completions", "bash"],
        &["check", "tests/corpus/good/minimal.yaml"],
        &["--help"],
        &["show", "--help"],
        &["--version"],
    ] {
        let output = meshlb(line).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{line:?}");
        let said = stderr(&output);
        assert!(
            said.starts_with("meshlb: standard output: ") && said.lines().count() == 1,
            "{line:?}: {said}"
        );
        // Nor does it matter that it can't be told.
        let status = meshlb(line).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(1), "{line:?}");
    }
    let status = meshlb(&["check", "/nowhere"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    let status = meshlb(&["--log-level", "foo", "check", "/nowhere"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn help_has_no_flags_that_do_nothing() {
    for command in ["crd", "check", "completions"] {
        let output = meshlb(&[command, "--help"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("Usage"), "{text}");
        for flag in ["--node", "--vip-cidr", "--renderer", "--state-dir", "--metrics-listen", "--zone"] {
            assert!(!text.contains(flag), "{command}: {flag}\n{text}");
        }
    }
    let output = meshlb(&["plan", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("--vip-cidr"));
}
