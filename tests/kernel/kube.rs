//! A real API server, and how nodes reach it: by a relay in each of their namespaces, so that no route or rule of the test
//! bed's stands beside those that are tested. `tests/cluster/packets.sh` says where it is.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{ApiResource, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::DynamicObject;
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::ns::Netns;
use crate::program;
use crate::topology::{Node, VIP_CIDRS};

/// Names the kubeconfig.
pub const KUBECONFIG: &str = "MESHLB_KUBECONFIG_FOR_TESTS";
/// Where an agent finds the API server: in its node's namespace.
const RELAY: &str = "127.0.0.1:6443";
/// Where the chart is installed.
pub const NAMESPACE: &str = "meshlb-system";

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
            plural: plural(&kind),
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

    /// Changes some of an object's spec (a merge patch).
    pub fn patch(&self, object: &Value, spec: &Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let patch = Patch::Merge(json!({"spec": spec}));
        self.runtime.block_on(self.api(object).patch(name, &PatchParams::default(), &patch))?;
        Ok(())
    }

    /// Writes an object's status, as kubelet does (a merge patch).
    pub fn patch_status(&self, object: &Value, status: &Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let patch = Patch::Merge(json!({"status": status}));
        self.runtime.block_on(self.api(object).patch_status(name, &PatchParams::default(), &patch))?;
        Ok(())
    }

    /// All objects of a kind: in `sample`'s namespace if it has one, or everywhere.
    pub fn list(&self, sample: &Value) -> Result<Vec<Value>> {
        let list = self.runtime.block_on(self.api(sample).list(&ListParams::default()))?;
        // Items of a list do not say what they are.
        list.items
            .into_iter()
            .map(|item| {
                let mut item = serde_json::to_value(item)?;
                item["apiVersion"] = sample["apiVersion"].clone();
                item["kind"] = sample["kind"].clone();
                Ok(item)
            })
            .collect()
    }

    /// A node of the cluster, and the pod there that its agent's token belongs to, as the chart's DaemonSet makes it.
    pub fn register(&self, node: &Node) -> Result<()> {
        let addresses = [node.v4.to_string(), node.v6.to_string()];
        let internal = addresses.each_ref().map(|a| json!({"type": "InternalIP", "address": a}));
        let labels = json!({"topology.kubernetes.io/zone": format!("zone-{}", node.index)});
        let metadata = json!({"name": node.name, "labels": labels});
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata});
        self.apply(&object)?;
        self.patch_status(&object, &json!({"addresses": internal}))?;
        let pod = agent_pod(node);
        self.delete(&pod)?;
        self.apply(&pod)?;
        self.pod_is(&pod, &addresses, true)
    }

    /// Says that a pod runs at these addresses, and whether it is ready.
    pub fn pod_is(&self, pod: &Value, addresses: &[String], ready: bool) -> Result<()> {
        let ready = if ready { "True" } else { "False" };
        let condition = |type_: &str| json!({"type": type_, "status": ready});
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        self.patch_status(
            pod,
            &json!({
                "phase": "Running", "podIP": addresses.first(), "podIPs": ips,
                "conditions": [condition("ContainersReady"), condition("Ready")],
            }),
        )
    }

    /// A token for an account of the chart's, bound to a pod if one is given.
    fn token(&self, account: &str, pod: Option<&str>) -> Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut spec = json!({"audiences": [], "expirationSeconds": 7200});
        if let Some(pod) = pod {
            spec["boundObjectRef"] = json!({"kind": "Pod", "apiVersion": "v1", "name": pod});
        }
        let request: TokenRequest = serde_json::from_value(json!({"spec": spec}))?;
        let made = self.runtime.block_on(accounts.create_token_request(
            account,
            &PostParams::default(),
            &request,
        ))?;
        Ok(made.status.context("no token")?.token)
    }

    /// The administrator's kubeconfig, with another token.
    fn kubeconfig_with(&self, token: &str) -> Result<String> {
        let text = fs::read_to_string(&self.kubeconfig)?;
        let Some((_, own)) = text.lines().find_map(|l| l.split_once("token: ")) else {
            bail!("no token in {}", self.kubeconfig.display());
        };
        Ok(text.replace(own.trim_end_matches(['}', ']', ' ']), token))
    }

    /// A token of an account that may do nothing.
    pub fn token_without_rights(&self) -> Result<String> {
        self.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": NAMESPACE}}))?;
        self.token("nobody", None)
    }

    /// A kubeconfig for a neighbour in a node's namespace, who may do everything.
    pub fn kubeconfig_of_nodes(&self, dir: &std::path::Path) -> Result<PathBuf> {
        let text = fs::read_to_string(&self.kubeconfig)?;
        let file = dir.join("kubeconfig");
        fs::write(&file, text.replace(&self.address, RELAY))?;
        Ok(file)
    }

    /// A kubeconfig for a node's agent, with the rights that the chart gives it there.
    pub fn kubeconfig_of_agent(&self, dir: &std::path::Path, node: &Node) -> Result<PathBuf> {
        let token = self.token("meshlb-agent", agent_pod(node)["metadata"]["name"].as_str())?;
        let file = dir.join(format!("kubeconfig-{}", node.name));
        fs::write(&file, self.kubeconfig_with(&token)?.replace(&self.address, RELAY))?;
        Ok(file)
    }

    /// Lets a namespace reach the API server until the value is dropped.
    pub fn relay(&self, ns: &Netns) -> Result<Relay> {
        Relay::start(ns, self.address.clone())
    }

    /// A controller, beside the nodes, with the rights that the chart gives it.
    pub fn controller(&self, dir: &std::path::Path) -> Result<Controller> {
        self.controller_of(dir, &VIP_CIDRS.join(","))
    }

    /// The same with other ranges of virtual IPs.
    pub fn controller_of(&self, dir: &std::path::Path, ranges: &str) -> Result<Controller> {
        let log = dir.join("controller.log");
        let kubeconfig = dir.join("kubeconfig-controller");
        fs::write(&kubeconfig, self.kubeconfig_with(&self.token("meshlb-controller", None)?)?)?;
        let child = Command::new(program::binary())
            .args(["controller", "--namespace", NAMESPACE, "--metrics-listen", "off"])
            .args(["--vip-cidr", ranges])
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        Ok(Controller { child, log })
    }
}

/// The name by which the API server knows objects of a kind.
fn plural(kind: &str) -> String {
    let kind = kind.to_lowercase();
    if kind.ends_with('y') { format!("{}ies", kind.trim_end_matches('y')) } else { format!("{kind}s") }
}

/// The pod of a node's agent, with the labels and the port that the chart gives it.
pub fn agent_pod(node: &Node) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("meshlb-agent-{}", node.name), "namespace": NAMESPACE, "labels": {
            "app.kubernetes.io/name": "meshlb", "app.kubernetes.io/instance": "meshlb",
            "app.kubernetes.io/component": "agent"}},
        "spec": {"nodeName": node.name, "serviceAccountName": "meshlb-agent", "hostNetwork": true,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "agent", "image": "meshlb", "ports": [{"name": "metrics", "containerPort": 9477, "hostPort": 9477}]}]},
    })
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
    streams: Arc<Mutex<Vec<Weak<TcpStream>>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relay {
    fn start(ns: &Netns, to: String) -> Result<Relay> {
        let listener = ns.enter(|| Ok(TcpListener::bind(RELAY)?))?;
        listener.set_nonblocking(true)?;
        let stopped = Arc::new(AtomicBool::new(false));
        let streams: Arc<Mutex<Vec<Weak<TcpStream>>>> = Arc::default();
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

fn pass(near: TcpStream, to: &str, open: &Mutex<Vec<Weak<TcpStream>>>) -> io::Result<()> {
    near.set_nonblocking(false)?;
    let (near, far) = (Arc::new(near), Arc::new(TcpStream::connect(to)?));
    for (from, into) in [(near.clone(), far.clone()), (far.clone(), near.clone())] {
        thread::spawn(move || {
            let _ = io::copy(&mut &*from, &mut &*into);
            let _ = into.shutdown(Shutdown::Write);
        });
    }
    // Those that have ended are closed: without an API server there are many.
    let mut list = open.lock().unwrap_or_else(PoisonError::into_inner);
    list.retain(|stream| stream.strong_count() > 0);
    list.extend([Arc::downgrade(&near), Arc::downgrade(&far)]);
    Ok(())
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in
            self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade)
        {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
