//! What ends a program that runs on.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Is over when this process has got SIGTERM, SIGINT, or, since its terminal has gone, SIGHUP; from now on none of them ends it
/// by itself. Within a runtime.
///
/// # Errors
/// They can't be handled.
pub fn stop() -> io::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut hup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            _ = hup.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use super::*;

    #[test]
    fn a_terminal_that_goes_away_ends_a_program_as_sigterm_does() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
                let stop = stop().unwrap();
                raise(signal).unwrap();
                tokio::time::timeout(Duration::from_secs(10), stop).await.unwrap();
            }
        });
    }
}
