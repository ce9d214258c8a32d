//! What ends a program that runs on.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use crate::dataplane::preflight;

/// Is over when this process has got SIGTERM, SIGINT, or, since its terminal has gone, SIGHUP, unless that was to be ignored
/// (nohup); from now on none of them ends it by itself. Within a runtime.
///
/// # Errors
/// They can't be handled.
pub fn stop() -> io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut hup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
    Ok(async move {
        let hangup = async {
            match &mut hup {
                Some(hup) => drop(hup.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = hangup => {}
        }
    })
}

/// Whether this process was started with SIGHUP ignored: the first bit of `SigIgn` in proc(5)'s `status`.
fn ignores_hangup() -> bool {
    preflight::mask(&preflight::own_status(), "SigIgn:").is_some_and(|ignored| ignored & 1 == 1)
}
