//! A real API server, and how nodes reach it: by a relay in each of their namespaces, so that no route or rule of the test
//! bed's stands beside those that are tested. `tests/cluster/packets.sh` says where it is.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::api::{ApiResource, DeleteParams, Patch, PatchParams};
use kube::core::DynamicObject;
use kube::{Api, Client};
use serde_json::Value;

use crate::ns::Netns;
use crate::program;

/// Names the kubeconfig.
pub const KUBECONFIG: &str = "MESHLB_KUBECONFIG_FOR_TESTS";
/// Where an agent finds the API server: in its node's namespace.
const RELAY: &str = "127.0.0.1:6443";

/// The API server.
pub struct Kube {
    runtime: tokio::runtime::Runtime,
    client: Client,
    kubeconfig: PathBuf,
    address: String,
}

impl Kube {
    /// The one that the environment names.
    pub fn find() -> Result<Kube> {
        let kubeconfig =
            PathBuf::from(std::env::var_os(KUBECONFIG).context("tests/cluster/packets.sh runs these")?);
        let access = meshlb::source::kube::config(Some(&kubeconfig))?;
        let address = access.cluster_url.authority().context("no server in the kubeconfig")?.to_string();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async { Client::try_from(access) })?;
        Ok(Kube { runtime, client, kubeconfig, address })
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            plural: format!("{}s", kind.to_lowercase()),
            api_version: api_version.clone(),
            kind,
        };
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// Applies an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let params = PatchParams::apply("test").force();
        self.runtime.block_on(self.api(object).patch(name, &params, &Patch::Apply(object)))?;
        Ok(())
    }

    /// Deletes an object, if it is there.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        match self.runtime.block_on(self.api(object).delete(name, &DeleteParams::default())) {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            done => Ok(done.map(drop)?),
        }
    }

    /// An object as it is now.
    pub fn get(&self, object: &Value) -> Result<Value> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        Ok(serde_json::to_value(self.runtime.block_on(self.api(object).get(name))?)?)
    }

    /// A kubeconfig for programs in a node's namespace.
    pub fn kubeconfig_of_nodes(&self, dir: &std::path::Path) -> Result<PathBuf> {
        let text = fs::read_to_string(&self.kubeconfig)?;
        let file = dir.join("kubeconfig");
        fs::write(&file, text.replace(&self.address, RELAY))?;
        Ok(file)
    }

    /// Lets a namespace reach the API server until the value is dropped.
    pub fn relay(&self, ns: &Netns) -> Result<Relay> {
        Relay::start(ns, self.address.clone())
    }

    /// A controller, beside the nodes.
    pub fn controller(&self, dir: &std::path::Path) -> Result<Controller> {
        let log = dir.join("controller.log");
        let child = Command::new(program::binary())
            .args(["controller", "--namespace", "meshlb-system", "--metrics-listen", "off"])
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        Ok(Controller { child, log })
    }
}

/// A running controller; dropping it ends it as Kubernetes would.
pub struct Controller {
    child: Child,
    log: PathBuf,
}

impl Controller {
    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        for _ in 0..50 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connections from a namespace to the API server.
pub struct Relay {
    stopped: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relay {
    fn start(ns: &Netns, to: String) -> Result<Relay> {
        let listener = ns.enter(|| Ok(TcpListener::bind(RELAY)?))?;
        listener.set_nonblocking(true)?;
        let stopped = Arc::new(AtomicBool::new(false));
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (stop, open) = (stopped.clone(), streams.clone());
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A connection that can't be passed on ends here, as a dead API server's would.
                    Ok((near, _)) => drop(pass(near, &to, &open)),
                    Err(_) => thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        Ok(Relay { stopped, streams, thread: Some(thread) })
    }
}

fn pass(near: TcpStream, to: &str, open: &Mutex<Vec<TcpStream>>) -> io::Result<()> {
    near.set_nonblocking(false)?;
    let far = TcpStream::connect(to)?;
    let mut list = open.lock().unwrap_or_else(PoisonError::into_inner);
    for (mut from, mut into) in [(near.try_clone()?, far.try_clone()?), (far.try_clone()?, near.try_clone()?)]
    {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut into);
            let _ = into.shutdown(Shutdown::Write);
        });
    }
    list.extend([near, far]);
    Ok(())
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
