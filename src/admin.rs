//! The admin server: `/metrics`, `/livez`, `/readyz`.
//!
//! It runs on a thread of its own, so that it answers while the dataplane is busy; and whoever holds connections open, or takes all
//! files, keeps nobody from being answered after it: kubelet would end an agent that does its work.

mod connections;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::sync::oneshot;

use self::connections::Connections;
use crate::metrics::Series;

/// What `/livez` and `/readyz` answer from. Clones are handles to the same state.
#[derive(Clone)]
pub struct Health {
    /// What has to be in order.
    subject: &'static str,
    stalled_after: Duration,
    state: Arc<Mutex<HealthState>>,
}

struct HealthState {
    /// Whether the sources have been read; `None` where there is nothing to read.
    synced: Option<bool>,
    /// How it is, or what is wrong.
    in_sync: Result<String, String>,
    last_beat: Instant,
    /// What is wrong without making the node unready.
    notes: Vec<String>,
}

impl Health {
    /// Alive now, not ready yet. `stalled_after` is how long the reconcile loop may go without
    /// [`Health::beat`]: longer than its idle wait and its slowest round together.
    pub fn new(stalled_after: Duration) -> Self {
        Self::of("kernel", stalled_after)
    }

    /// The same, of something else than the kernel.
    pub fn of(subject: &'static str, stalled_after: Duration) -> Self {
        let state = HealthState {
            synced: Some(false),
            in_sync: Err("nothing has been programmed yet".into()),
            last_beat: Instant::now(),
            notes: Vec::new(),
        };
        Self { subject, stalled_after, state: Arc::new(Mutex::new(state)) }
    }

    /// Whether every source has delivered everything once.
    pub fn set_synced(&self, synced: bool) {
        self.with(|s| s.synced = Some(synced));
    }

    /// Nothing has to be read at present, since it is as `state` says.
    pub fn set_idle(&self, state: impl Into<String>) {
        self.with(|s| (s.synced, s.in_sync) = (None, Ok(state.into())));
    }

    /// All is well, in other words than "as it should be".
    pub fn set_good(&self, state: impl Into<String>) {
        self.with(|s| s.in_sync = Ok(state.into()));
    }

    /// Whether the kernel is as it should be; `reason` tells why not and is ignored otherwise.
    pub fn set_in_sync(&self, in_sync: bool, reason: impl Into<String>) {
        let result = if in_sync { Ok("as it should be".to_owned()) } else { Err(reason.into()) };
        self.with(|s| s.in_sync = result);
    }

    /// What is wrong and no reason to send nobody here.
    pub fn set_notes(&self, notes: &[String]) {
        self.with(|s| {
            if s.notes != notes {
                s.notes = notes.to_vec();
            }
        });
    }

    /// The reconcile loop has come round.
    pub fn beat(&self) {
        self.with(|s| s.last_beat = Instant::now());
    }

    /// Whether the process should be left running, and a line that says why.
    pub fn live(&self) -> (bool, String) {
        let silent = self.with(|s| s.last_beat.elapsed());
        let limit = self.stalled_after.as_secs();
        if silent <= self.stalled_after {
            (true, format!("[+] reconcile loop: ran {} s ago\n", silent.as_secs()))
        } else {
            (
                false,
                format!(
                    "[-] reconcile loop: has not run for {} s, {limit} s are allowed\n",
                    silent.as_secs()
                ),
            )
        }
    }

    /// Whether this node serves what it should, and lines that say why.
    pub fn ready(&self) -> (bool, String) {
        self.with(|s| {
            let synced = match s.synced {
                Some(true) => "[+] sources: read\n",
                Some(false) => "[-] sources: not all read yet\n",
                None => "",
            };
            let in_sync = match &s.in_sync {
                Ok(state) => format!("[+] {}: {state}\n", self.subject),
                Err(reason) => format!("[-] {}: {reason}\n", self.subject),
            };
            let notes: String = s.notes.iter().map(|note| format!("[!] {note}\n")).collect();
            (s.synced.unwrap_or(true) && s.in_sync.is_ok(), format!("{synced}{in_sync}{notes}"))
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut HealthState) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A running admin server; it stops when this is dropped.
pub struct AdminServer {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminServer {
    /// Listens on `addr` (port 0: any) and answers from a thread of its own.
    ///
    /// # Errors
    /// When the address can't be listened on, or no thread can be made; one line for people.
    pub fn start(addr: SocketAddr, metrics: Arc<dyn Series>, health: Health) -> io::Result<Self> {
        let failed = |e: io::Error| {
            let line = format!("can't serve metrics on {addr}: {e}; choose another --metrics-listen");
            io::Error::new(e.kind(), line)
        };
        let listener = TcpListener::bind(addr).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let app = router(metrics, health);
        let serve = async move {
            let served = match Connections::of(listener) {
                // A connection that a scraper keeps open must not keep the process: no graceful end.
                Ok(connections) => tokio::select! {
                    served = async { axum::serve(connections, app).await } => served,
                    _ = stopped => Ok(()),
                },
                Err(e) => Err(e),
            };
            if let Err(e) = served {
                tracing::error!("the admin server on {addr} has ended: {e}");
            }
        };
        let thread = std::thread::Builder::new()
            .name("meshlb-admin".into())
            .spawn(move || {
                runtime.block_on(serve);
                // A scrape that waits for the dataplane must not hold up the end.
                runtime.shutdown_background();
            })
            .map_err(failed)?;
        Ok(Self { addr, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn router(metrics: Arc<dyn Series>, health: Health) -> Router {
    Router::new()
        .route("/livez", get(|State(h): State<Health>| async move { answer(h.live()) }))
        .route("/readyz", get(|State(h): State<Health>| async move { answer(h.ready()) }))
        .with_state(health)
        .merge(Router::new().route("/metrics", get(serve_metrics)).with_state(metrics))
}

async fn serve_metrics(State(metrics): State<Arc<dyn Series>>, headers: HeaderMap) -> Response {
    let accepted = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let openmetrics = accepted.contains("application/openmetrics-text");
    // The traffic source may wait for the dataplane; health checks are answered meanwhile.
    match tokio::task::spawn_blocking(move || metrics.render(openmetrics)).await {
        Ok((kind, text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")).into_response(),
    }
}

fn answer((good, lines): (bool, String)) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, lines).into_response()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        sync::mpsc,
    };

    use super::*;
    use crate::metrics::{Metrics, ServiceTraffic, TrafficSource};

    /// Status line, headers and body.
    fn fetch(addr: SocketAddr, path: &str, accept: &str) -> (String, String) {
        let mut stream = TcpStream::connect(addr).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    fn start(stalled_after: Duration) -> (AdminServer, Metrics, Health) {
        let (metrics, health) = (Metrics::new(), Health::new(stalled_after));
        let any = "127.0.0.1:0".parse().unwrap();
        (AdminServer::start(any, Arc::new(metrics.clone()), health.clone()).unwrap(), metrics, health)
    }

    #[test]
    fn metrics_are_scraped_in_both_formats() {
        let (server, metrics, _) = start(Duration::from_secs(30));
        metrics.services(3);
        let (head, body) = fetch(server.addr(), "/metrics", "*/*");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        assert!(body.contains("\nmeshlb_services 3\n"), "{body}");
        let (head, body) = fetch(server.addr(), "/metrics", "application/openmetrics-text;version=1.0.0");
        assert!(head.contains("content-type: application/openmetrics-text"), "{head}");
        assert!(body.ends_with("# EOF\n"), "{body}");
        assert!(fetch(server.addr(), "/other", "*/*").0.starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn readiness_says_what_is_missing() {
        let (server, _, health) = start(Duration::from_secs(30));
        let ready = || fetch(server.addr(), "/readyz", "*/*");
        let (head, body) = ready();
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert_eq!(body, "[-] sources: not all read yet\n[-] kernel: nothing has been programmed yet\n");
        health.set_synced(true);
        health.set_in_sync(false, "ipset: kernel error");
        assert_eq!(ready().1, "[+] sources: read\n[-] kernel: ipset: kernel error\n");
        health.set_in_sync(true, "");
        assert!(ready().0.starts_with("HTTP/1.1 200"));
        assert_eq!(ready().1, "[+] sources: read\n[+] kernel: as it should be\n");
        health.set_notes(&["DNS: taken".to_owned()]);
        let (head, body) = ready();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(body.ends_with("[!] DNS: taken\n"), "{body}");
        health.set_notes(&[]);
        health.set_idle("another one does it");
        assert_eq!(ready().1, "[+] kernel: another one does it\n");
        health.set_synced(false);
        health.set_good("done");
        assert_eq!(ready().1, "[-] sources: not all read yet\n[+] kernel: done\n");
        assert!(ready().0.starts_with("HTTP/1.1 503"));
    }

    #[test]
    fn liveness_follows_the_heartbeat() {
        let (server, _, health) = start(Duration::from_millis(300));
        let live = || fetch(server.addr(), "/livez", "*/*").0;
        assert!(live().starts_with("HTTP/1.1 200"));
        std::thread::sleep(Duration::from_millis(400));
        assert!(live().starts_with("HTTP/1.1 503"));
        health.beat();
        assert!(live().starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn a_scrape_that_waits_holds_up_nothing_else() {
        struct Blocked(mpsc::Receiver<()>);
        impl TrafficSource for Blocked {
            fn snapshot(&self) -> Arc<Vec<ServiceTraffic>> {
                let _ = self.0.recv();
                Arc::default()
            }
        }
        let (server, metrics, _) = start(Duration::from_secs(30));
        let (release, blocked) = mpsc::channel();
        metrics.set_traffic_source(Box::new(Blocked(blocked)));
        let addr = server.addr();
        let scrape = std::thread::spawn(move || fetch(addr, "/metrics", "*/*").0);
        std::thread::sleep(Duration::from_millis(200));
        assert!(fetch(addr, "/livez", "*/*").0.starts_with("HTTP/1.1 200"));
        release.send(()).unwrap();
        assert!(scrape.join().unwrap().starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn whoever_holds_connections_open_keeps_nobody_out() {
        let (server, _, _) = start(Duration::from_secs(30));
        let held: Vec<_> = (0..2 * connections::MOST)
            .map(|i| {
                let mut stream = TcpStream::connect(server.addr()).unwrap();
                stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n").unwrap();
                // Those that wait to be accepted are not many.
                if i % 16 == 0 {
                    assert!(fetch(server.addr(), "/livez", "*/*").0.starts_with("HTTP/1.1 200"));
                }
                stream
            })
            .collect();
        assert!(fetch(server.addr(), "/livez", "*/*").0.starts_with("HTTP/1.1 200"));
        // The first of them were closed, and the last ones are served when they ask to the end.
        let mut first = &held[0];
        first.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        match first.read(&mut [0; 16]) {
            Ok(0) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("it is not closed: {other:?}"),
        }
        let mut last = &held[held.len() - 1];
        last.write_all(b"\r\n").unwrap();
        let mut status = [0; 12];
        last.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
    }

    #[test]
    fn an_address_in_use_is_told_and_a_dropped_server_frees_it() {
        let (server, metrics, health) = start(Duration::from_secs(30));
        let addr = server.addr();
        let open = TcpStream::connect(addr).unwrap();
        let error = AdminServer::start(addr, Arc::new(metrics.clone()), health.clone()).err().unwrap();
        assert!(error.to_string().contains("--metrics-listen"), "{error}");
        drop(server);
        drop(open);
        drop(AdminServer::start(addr, Arc::new(metrics), health).unwrap());
    }
}
