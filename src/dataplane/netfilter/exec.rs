//! Running iptables and nft: a clean environment, a time limit, and errors that a person can act on.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::dataplane::Error;

/// Where the programs are; a service manager may give us less.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longer than the 5 seconds that iptables waits for its lock.
const TIME_LIMIT: Duration = Duration::from_secs(30);
const XTABLES_LOCK: &str = "/run/xtables.lock";

/// Full path of a program, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let given = std::env::var("PATH").unwrap_or_default();
    given
        .split(':')
        .chain(PATH.split(':'))
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| PathBuf::from(dir).join(program))
        .find(|path| path.is_file())
}

/// Runs a program to its end with `input` on its standard input; returns its standard output.
pub(crate) fn run<A: AsRef<OsStr>>(program: &str, args: &[A], input: &str) -> Result<String, Error> {
    let Some(path) = find(program) else { return Err(missing(program)) };
    let failed = |reason: String| Error::Failed { object: program.into(), reason };
    let mut child = Command::new(path)
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(format!("cannot be run: {e}")))?;

    // Each pipe has a thread of its own, or a full one would stop the program.
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    }
    let (sender, receiver) = mpsc::channel();
    let pipes: [Option<Box<dyn Read + Send>>; 2] =
        [child.stdout.take().map(|p| Box::new(p) as _), child.stderr.take().map(|p| Box::new(p) as _)];
    for (which, pipe) in pipes.into_iter().enumerate() {
        let sender = sender.clone();
        if let Some(mut pipe) = pipe {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = pipe.read_to_end(&mut bytes);
                let _ = sender.send((which, bytes));
            });
        }
    }
    drop(sender);
    let end = Instant::now() + TIME_LIMIT;
    let mut texts = [String::new(), String::new()];
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((which, bytes)) => texts[which] = String::from_utf8_lossy(&bytes).into_owned(),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                let _ = child.wait();
                let reason = format!("did not end within {} s and was stopped", TIME_LIMIT.as_secs());
                return Err(Error::Transient { object: program.into(), reason });
            }
        }
    }
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    let [stdout, stderr] = texts;
    if status.success() { Ok(stdout) } else { Err(explain(program, status.code(), &stderr, input)) }
}

/// The error for a program that is not there.
pub(crate) fn missing(program: &str) -> Error {
    let packages = match program {
        "nft" => "install the package nftables (apt install nftables, dnf install nftables)",
        p if p.contains("legacy") => {
            "install iptables-legacy (apt install iptables, dnf install iptables-legacy)"
        }
        _ => "install iptables (apt install iptables, dnf install iptables-nft)",
    };
    Error::MissingProgram { program: program.into(), advice: packages.into() }
}

/// What a failed run means.
fn explain(program: &str, code: Option<i32>, stderr: &str, input: &str) -> Error {
    let said = first_lines(stderr);
    let lower = stderr.to_ascii_lowercase();
    let has = |text: &str| lower.contains(text);
    if has("xtables lock") || (code == Some(4) && has("lock")) {
        let holder = lock_holder().map(|h| format!(", held by {h}")).unwrap_or_default();
        return Error::Transient { object: format!("xtables lock {XTABLES_LOCK}{holder}"), reason: said };
    }
    if has("operation not permitted") || has("permission denied") || has("must be root") {
        return Error::Permission { object: program.into() };
    }
    let mut reason = said;
    if let Some((number, line)) = failing_line(stderr, input) {
        let _ = write!(reason, " [line {number}: {line}]");
    }
    if has("resource temporarily unavailable") || has("resource busy") || has("interrupted system call") {
        return Error::Transient { object: program.into(), reason };
    }
    if has("missing kernel module") || has("protocol not supported") || has("couldn't load match") {
        let advice =
            "load the modules xt_set, xt_ipvs, xt_mark, xt_conntrack, xt_comment and nf_tables".into();
        return Error::MissingFeature { feature: format!("what {program} needs: {reason}"), advice };
    }
    let reason = if reason.is_empty() { format!("ended with status {code:?}") } else { reason };
    Error::Failed { object: program.into(), reason }
}

fn first_lines(stderr: &str) -> String {
    let lines: Vec<_> = stderr
        .lines()
        .map(str::trim)
        .filter(|l| {
            !l.is_empty() && !l.starts_with("Try `") && !l.chars().all(|c| c == '^' || c == '~' || c == ' ')
        })
        .take(4)
        .collect();
    lines.join("; ")
}

/// The line of our text that the program names: `line 12`, `line: 12` or `/dev/stdin:12:5-9:`.
fn failing_line<'a>(stderr: &str, input: &'a str) -> Option<(usize, &'a str)> {
    let number = |text: &str| {
        let digits: String =
            text.trim_start_matches([':', ' ']).chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<usize>().ok()
    };
    let found = ["/dev/stdin:", "line"]
        .iter()
        .find_map(|mark| stderr.match_indices(mark).find_map(|(at, _)| number(&stderr[at + mark.len()..])))?;
    Some((found, input.lines().nth(found.checked_sub(1)?)?.trim()))
}

/// Which process holds the xtables lock, from /proc/locks.
fn lock_holder() -> Option<String> {
    let inode = format!(":{}", std::fs::metadata(XTABLES_LOCK).ok()?.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5)?.ends_with(&inode)).then(|| fields[4].to_owned())
    })?;
    // The one that took it may have ended and left the open file to its children.
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("process {pid} {}", name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failing_line_is_quoted() {
        let input = "*filter\n-A INPUT -j NOWHERE\nCOMMIT\n";
        for stderr in [
            "iptables-restore v1.8.9 (nf_tables): \nline 2: RULE_APPEND failed (No such file): rule in chain INPUT\n",
            "iptables-restore: line 2 failed\n",
            "Error occurred at line: 2\nTry `iptables-restore -h' or 'iptables-restore --help' for more information.\n",
            "/dev/stdin:2:5-9: Error: syntax error\n    ^^^^\n",
        ] {
            let text = explain("iptables-restore", Some(1), stderr, input).to_string();
            assert!(text.contains("[line 2: -A INPUT -j NOWHERE]"), "{text}");
            assert!(!text.contains("Try `"), "{text}");
        }
    }

    #[test]
    fn a_lock_and_missing_rights_are_told_apart() {
        let lock =
            "Another app is currently holding the xtables lock. Perhaps you want to use the -w option?";
        assert!(matches!(explain("x", Some(4), lock, ""), Error::Transient { .. }));
        let rights = "iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)";
        assert!(matches!(explain("x", Some(4), rights, ""), Error::Permission { .. }));
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let text = run("meshlb-no-such-nft", &["-f"], "").unwrap_err().to_string();
        assert!(text.contains("not installed"), "{text}");
        assert!(missing("nft").to_string().contains("apt install nftables"));
    }

    #[test]
    fn output_larger_than_a_pipe_passes() {
        let input = "x".repeat(300_000);
        assert_eq!(run("cat", &[] as &[&str], &input).unwrap(), input);
    }
}
