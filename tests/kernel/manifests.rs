//! The MeshServices and EndpointSlices of a case: kept as values, written as the files that `meshlb` reads.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::runner::{Family, Proto};
use crate::topology::{Host, Topology};

/// A folder of manifests.
#[derive(Debug)]
pub struct Manifests {
    /// Where [`Manifests::write`] puts them.
    pub dir: PathBuf,
    /// The services.
    pub services: Vec<Service>,
    /// The slices.
    pub slices: Vec<Slice>,
    written: Vec<PathBuf>,
}

/// A MeshService.
#[derive(Debug, Clone)]
pub struct Service {
    /// `metadata.name`.
    pub name: String,
    /// `spec.vips`.
    pub vips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<Port>,
    /// Everything else in `spec`.
    pub spec: Map<String, Value>,
}

/// One of a service's ports.
#[derive(Debug, Clone)]
pub struct Port {
    /// The protocol.
    pub proto: Proto,
    /// The virtual address's port.
    pub port: u16,
    /// The endpoints' port.
    pub target: u16,
    /// The published port; `Some(0)` lets the program choose.
    pub publish: Option<u16>,
    /// More fields; `null` takes one away.
    pub more: Map<String, Value>,
}

/// An EndpointSlice.
#[derive(Debug, Clone)]
pub struct Slice {
    /// `metadata.name`.
    pub name: String,
    /// The service's name.
    pub service: String,
    /// The addresses' family.
    pub family: Family,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its ports: name, protocol, number.
    pub ports: Vec<(String, Proto, u16)>,
}

/// One endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its address.
    pub addr: IpAddr,
    /// `nodeName`.
    pub node: Option<String>,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `zone`.
    pub zone: Option<String>,
    /// The name of the `targetRef`, a Pod.
    pub target: String,
}

impl Endpoint {
    /// A ready endpoint on a pod or, for host networking, on a node.
    pub fn of(host: &Host, family: Family) -> Endpoint {
        Endpoint {
            addr: host.ip(family),
            node: (host.node > 0).then(|| format!("n{}", host.node)),
            ready: true,
            serving: true,
            terminating: false,
            zone: None,
            target: host.name.clone(),
        }
    }

    /// Not ready.
    pub fn not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Terminating, and still serving or not.
    pub fn terminating(mut self, serving: bool) -> Self {
        (self.ready, self.serving, self.terminating) = (false, serving, true);
        self
    }
}

impl Service {
    /// Its addresses, at most one a family.
    pub fn vips(&mut self, vips: &[&str]) -> Result<&mut Self> {
        for vip in vips {
            self.vips.push(vip.parse().with_context(|| format!("address {vip}"))?);
        }
        Ok(self)
    }

    /// A port; `publish` as in [`Port`].
    pub fn port(&mut self, proto: Proto, port: u16, target: u16, publish: Option<u16>) -> &mut Self {
        self.ports.push(Port { proto, port, target, publish, more: Map::new() });
        self
    }

    /// Any other field of `spec`.
    pub fn set(&mut self, field: &str, value: Value) -> &mut Self {
        self.spec.insert(field.to_owned(), value);
        self
    }

    fn to_value(&self) -> Value {
        let mut spec = self.spec.clone();
        if !self.vips.is_empty() {
            spec.insert("vips".to_owned(), json!(self.vips));
        }
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|p| {
                let mut port = json!({
                    "name": port_name(p.proto, p.port),
                    "protocol": p.proto.name(),
                    "port": p.port,
                    "targetPort": p.target,
                });
                if let Some(map) = port.as_object_mut() {
                    if let Some(number) = p.publish {
                        let mut publish = json!({"mode": "Ingress"});
                        if number != 0 {
                            publish["port"] = json!(number);
                        }
                        map.insert("publish".to_owned(), publish);
                    }
                    map.extend(p.more.clone());
                    map.retain(|_, value| !value.is_null());
                }
                port
            })
            .collect();
        spec.insert("ports".to_owned(), Value::Array(ports));
        json!({
            "apiVersion": "meshlb.dev/v1alpha1",
            "kind": "MeshService",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": spec,
        })
    }
}

/// The name that a port has in services and slices made here.
pub fn port_name(proto: Proto, port: u16) -> String {
    format!("{proto}-{port}")
}

impl Slice {
    fn to_value(&self) -> Value {
        let endpoints: Vec<Value> = self
            .endpoints
            .iter()
            .map(|e| {
                let mut endpoint = json!({
                    "addresses": [e.addr],
                    "conditions": {"ready": e.ready, "serving": e.serving, "terminating": e.terminating},
                    "targetRef": {"kind": "Pod", "name": e.target, "namespace": "default"},
                });
                if let Some(node) = &e.node {
                    endpoint["nodeName"] = json!(node);
                }
                if let Some(zone) = &e.zone {
                    endpoint["zone"] = json!(zone);
                }
                endpoint
            })
            .collect();
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(name, proto, port)| json!({"name": name, "protocol": proto.name(), "port": port}))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": self.name,
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": self.service},
            },
            "addressType": self.family.address_type(),
            "endpoints": endpoints,
            "ports": ports,
        })
    }
}

impl Manifests {
    /// An empty folder.
    pub fn new(dir: &Path) -> Result<Manifests> {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir)?;
        Ok(Manifests { dir: dir.to_owned(), services: Vec::new(), slices: Vec::new(), written: Vec::new() })
    }

    /// The service of that name; a new one is dual-stack and has no ports yet.
    pub fn service(&mut self, name: &str) -> &mut Service {
        let index = self.services.iter().position(|s| s.name == name).unwrap_or_else(|| {
            let mut spec = Map::new();
            spec.insert("ipFamilies".to_owned(), json!(["IPv4", "IPv6"]));
            spec.insert("ipFamilyPolicy".to_owned(), json!("RequireDualStack"));
            self.services.push(Service { name: name.to_owned(), vips: Vec::new(), ports: Vec::new(), spec });
            self.services.len() - 1
        });
        &mut self.services[index]
    }

    /// One slice per family for a service, with these hosts as ready endpoints (in place of what it had); the slice's
    /// ports are the service's ports with their targets, so give the service its ports first.
    pub fn endpoints(&mut self, service: &str, hosts: &[&Host]) -> &mut Self {
        for family in Family::ALL {
            let endpoints = hosts.iter().map(|h| Endpoint::of(h, family)).collect();
            self.slice(service, family, endpoints);
        }
        self
    }

    /// The slice of a service and family, in place of what it had.
    pub fn slice(&mut self, service: &str, family: Family, endpoints: Vec<Endpoint>) -> &mut Slice {
        let ports = self
            .services
            .iter()
            .filter(|s| s.name == service)
            .flat_map(|s| &s.ports)
            .map(|p| (port_name(p.proto, p.port), p.proto, p.target))
            .collect();
        let name = format!("{service}-{family}");
        self.slices.retain(|s| s.name != name);
        self.slices.push(Slice { name, service: service.to_owned(), family, endpoints, ports });
        let last = self.slices.len() - 1;
        &mut self.slices[last]
    }

    /// The usual service: `name` at these addresses, TCP, UDP and (if this kernel has it) SCTP port 80, published as
    /// 30080, on port 8080 of all pods.
    pub fn standard(&mut self, topology: &Topology, name: &str, vips: &[&str]) -> Result<&mut Self> {
        let service = self.service(name).vips(vips)?;
        for proto in Proto::ALL.into_iter().filter(|p| p.available()) {
            service.port(proto, 80, 8080, Some(30080));
        }
        let pods: Vec<&Host> = topology.pods.iter().collect();
        Ok(self.endpoints(name, &pods))
    }

    /// Takes a service and its slices away.
    pub fn remove(&mut self, service: &str) {
        self.services.retain(|s| s.name != service);
        self.slices.retain(|s| s.service != service);
    }

    /// Writes every file anew, each in one step, and removes those of what is no longer there.
    pub fn write(&mut self) -> Result<()> {
        let mut files = Vec::new();
        for service in &self.services {
            files.push((format!("{}.yaml", service.name), service.to_value()));
        }
        for slice in &self.slices {
            files.push((format!("{}-slice.yaml", slice.name), slice.to_value()));
        }
        let mut now = Vec::new();
        for (name, value) in files {
            let path = self.dir.join(name);
            // JSON is YAML, and what a person would write by hand is tried elsewhere.
            let text = serde_json::to_string_pretty(&value)? + "\n";
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                let draft = self.dir.join(".draft");
                fs::write(&draft, text)?;
                fs::rename(&draft, &path)?;
            }
            now.push(path);
        }
        for old in self.written.iter().filter(|p| !now.contains(p)) {
            fs::remove_file(old)?;
        }
        self.written = now;
        Ok(())
    }
}
