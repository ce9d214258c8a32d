//! What two watches say, turned into events. No network: what comes in is what the API server sent.

use std::collections::{BTreeMap, HashMap};

use kube::{
    core::{DynamicObject, TypeMeta},
    runtime::watcher::Event as Watched,
};
use serde_json::Value;

use super::listing::Listing;
use crate::{
    api::{self, SERVICE_NAME_LABEL},
    model::{ids::ServiceKey, node::NodeConfig, refusal::Refusal, snapshot::Event, unread::Hides},
    source::{
        judge::{At, Judgement, judge},
        object::{Kind, Object, ObjectId, Verdict},
        problem::{Problem, Severity},
    },
};

/// Which objects are in force. It keeps their names and uids alone: the objects are with whoever takes the events.
#[derive(Debug)]
pub struct Feed {
    config: NodeConfig,
    /// With the uid of the object whose version it is.
    in_force: HashMap<ObjectId, Box<str>>,
    /// What is wrong, of objects with which something is.
    problems: BTreeMap<ObjectId, Vec<Problem>>,
    /// Services whose spec the controller has accepted and this node has not, and why.
    refused: BTreeMap<ServiceKey, Refusal>,
    listings: BTreeMap<Kind, Listing>,
}

/// The kinds that are watched.
pub const KINDS: [Kind; 2] = [Kind::Service, Kind::Slice];

impl Feed {
    /// A feed that knows of nothing yet. `config` judges VIPs and published ports.
    pub fn new(config: NodeConfig) -> Self {
        Self {
            config,
            in_force: HashMap::new(),
            problems: BTreeMap::new(),
            refused: BTreeMap::new(),
            listings: BTreeMap::new(),
        }
    }

    /// Whether every kind has been listed to its end once.
    pub fn is_synced(&self) -> bool {
        KINDS.iter().all(|kind| self.listings.get(kind).is_some_and(Listing::is_complete))
    }

    /// All that is wrong with objects now.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// Services that the controller has accepted as they are now and this node does not, and why: its program or its flags are
    /// others.
    pub fn refused(&self) -> &BTreeMap<ServiceKey, Refusal> {
        &self.refused
    }

    /// Takes in what a watch says; appends what changes by it.
    pub fn take(&mut self, kind: Kind, said: Watched<DynamicObject>, out: &mut Vec<Event>) {
        let known = self.in_force.keys().chain(self.problems.keys());
        let known = known.filter(|id| id.kind == kind).map(|id| &id.key);
        let change = self.listings.entry(kind).or_default().take(said, known);
        if let Some((key, object)) = change.put {
            out.extend(self.put(ObjectId { kind, key }, object));
        }
        out.extend(change.gone.into_iter().filter_map(|key| self.remove(ObjectId { kind, key })));
    }

    fn put(&mut self, id: ObjectId, object: DynamicObject) -> Option<Event> {
        let value = without_bulk(id.kind, object);
        // Where every object has a name, one that is wrong hides itself alone.
        let hidden = match id.kind {
            Kind::Service => Hides::Service(id.key.clone()),
            Kind::Slice => {
                let group = value["metadata"]["labels"][SERVICE_NAME_LABEL].as_str().unwrap_or_default();
                Hides::EndpointsOf(ServiceKey::new(id.key.namespace.clone(), group))
            }
        };
        let accepted = if id.kind == Kind::Service { accepted(&value) } else { None };
        let uid: Box<str> = value["metadata"]["uid"].as_str().unwrap_or_default().into();
        let granted = (id.kind == Kind::Service).then(|| api::granted(&value["status"]));
        let Judgement { verdict, findings, severity } = judge(id.kind, value, At::ApiServer(&self.config));
        let accepted = accepted.filter(|_| !matches!(verdict, Verdict::Good(_)));
        if let Some(generation) = accepted {
            let why: Vec<String> = findings.iter().map(ToString::to_string).collect();
            self.refused.insert(id.key.clone(), Refusal { generation, why: why.join("; ") });
        } else if id.kind == Kind::Service {
            self.refused.remove(&id.key);
        }
        let problem = |finding: api::FieldError| Problem {
            file: None,
            line: None,
            object: Some(id.to_string()),
            field: Some(finding.field),
            message: finding.message,
            severity,
            hides: if severity == Severity::Error { hidden.clone() } else { Hides::Nothing },
        };
        let problems: Vec<Problem> = findings.into_iter().map(problem).collect();
        if problems.is_empty() {
            self.problems.remove(&id);
        } else {
            self.problems.insert(id.clone(), problems);
        }
        match verdict {
            Verdict::Good(mut object) => {
                if let (Object::Service(service), Some(granted)) = (&mut object, granted) {
                    std::sync::Arc::make_mut(service).granted = Some(granted);
                }
                self.in_force.insert(id, uid);
                Some(object.event())
            }
            Verdict::Withheld => self.withdraw(&id),
            Verdict::Wrong => match self.in_force.get(&id) {
                // What is in force is that of another object, which is gone although no watch has said so.
                Some(of) if *of != uid => self.withdraw(&id),
                // Its last good version stays, with what is its own now: what it had may be another's.
                Some(_) => granted.map(|granted| Event::Granted(id.key, granted)),
                None => None,
            },
        }
    }

    fn remove(&mut self, id: ObjectId) -> Option<Event> {
        self.problems.remove(&id);
        if id.kind == Kind::Service {
            self.refused.remove(&id.key);
        }
        self.withdraw(&id)
    }

    fn withdraw(&mut self, id: &ObjectId) -> Option<Event> {
        self.in_force.remove(id).map(|_| match id.kind {
            Kind::Service => Event::ServiceGone(id.key.clone()),
            Kind::Slice => Event::SliceGone(id.key.clone()),
        })
    }
}

/// The generation of a MeshService whose spec the controller has accepted as it is now. What it refuses itself it tells itself: a thousand nodes need
/// not say so too.
fn accepted(object: &Value) -> Option<i64> {
    let status = &object["status"];
    let now = object["metadata"]["generation"].as_i64();
    let generation = status["observedGeneration"].as_i64().filter(|seen| Some(*seen) == now)?;
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == "Accepted" && c["status"] == "True").then_some(generation)
}

/// The object without what nobody here reads and what can be larger than all the rest.
pub fn without_bulk(kind: Kind, mut object: DynamicObject) -> Value {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    // A list names the type once, for all of its objects.
    object.types = Some(TypeMeta { api_version: kind.api_version().into(), kind: kind.as_str().into() });
    serde_json::to_value(object).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::fixtures::{brief, config};

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn service(name: &str, port: u32) -> DynamicObject {
        object(json!({
            "apiVersion": "meshlb.dev/v1alpha1", "kind": "MeshService", "metadata": {"name": name, "namespace": "default",
            "annotations": {"a": "b"}, "managedFields": [{"manager": "x"}]}, "spec": {"ports": [{"port": port}]},
            "status": {"vips": ["10.200.7.7"], "ports": [{"port": 80, "protocol": "TCP", "publishedPort": 30080}]},
        }))
    }

    fn slice(name: &str, address: &str) -> DynamicObject {
        object(json!({
            "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "x"}},
            "endpoints": [{"addresses": [address]}], "ports": [{"port": 8080}],
        }))
    }

    fn take(feed: &mut Feed, kind: Kind, said: Vec<Watched<DynamicObject>>) -> Vec<String> {
        let mut events = Vec::new();
        said.into_iter().for_each(|said| feed.take(kind, said, &mut events));
        events.iter().map(brief).collect()
    }

    fn listed(objects: Vec<DynamicObject>) -> Vec<Watched<DynamicObject>> {
        let all = objects.into_iter().map(Watched::InitApply);
        std::iter::once(Watched::Init).chain(all).chain([Watched::InitDone]).collect()
    }

    fn problems(feed: &Feed) -> Vec<String> {
        feed.problems().map(ToString::to_string).collect()
    }

    #[test]
    fn both_kinds_have_to_be_listed() {
        let mut feed = Feed::new(config());
        assert_eq!(take(&mut feed, Kind::Service, listed(vec![service("x", 80)])), ["x:80"]);
        assert!(!feed.is_synced());
        assert_eq!(
            take(&mut feed, Kind::Slice, vec![Watched::Init, Watched::InitApply(slice("a", "10.0.0.1"))]),
            ["slice a"]
        );
        assert!(!feed.is_synced());
        assert!(take(&mut feed, Kind::Slice, vec![Watched::InitDone]).is_empty());
        assert!(feed.is_synced());
    }

    #[test]
    fn what_a_later_list_lacks_is_gone() {
        let mut feed = Feed::new(config());
        take(&mut feed, Kind::Service, listed(vec![service("x", 80), service("w", 80), service("bad", 0)]));
        take(&mut feed, Kind::Slice, listed(vec![slice("x", "10.0.0.1")]));
        assert_eq!(problems(&feed).len(), 1);
        assert_eq!(take(&mut feed, Kind::Service, listed(vec![service("w", 81)])), ["w:81", "-x"]);
        assert!(problems(&feed).is_empty());
        assert_eq!(take(&mut feed, Kind::Slice, vec![Watched::Delete(slice("x", "10.0.0.1"))]), ["-slice x"]);
        assert!(take(&mut feed, Kind::Slice, vec![Watched::Delete(slice("x", "10.0.0.1"))]).is_empty());
    }

    #[test]
    fn what_is_wrong_keeps_its_last_good_version() {
        let mut feed = Feed::new(config());
        take(&mut feed, Kind::Service, listed(vec![service("x", 80)]));
        assert_eq!(
            take(&mut feed, Kind::Service, vec![Watched::Apply(service("x", 70_000))]),
            ["x has 10.200.7.7 30080"]
        );
        assert_eq!(
            problems(&feed),
            ["MeshService default/x: spec.ports[0].port: must be at most 65535, not 70000"]
        );
        assert_eq!(take(&mut feed, Kind::Service, vec![Watched::Apply(service("x", 81))]), ["x:81"]);
        assert!(problems(&feed).is_empty());
        let mut more = service("x", 81);
        more.data["spec"]["sourceRanges"] = json!(["10.0.0.0/8"]);
        assert_eq!(take(&mut feed, Kind::Service, vec![Watched::Apply(more)]), ["-x"]);
    }

    #[test]
    fn what_this_node_alone_refuses_is_told_apart() {
        let seen = |spec: Value, observed: i64, accepted: &str| {
            object(json!({
                "metadata": {"name": "x", "namespace": "default", "generation": 2}, "spec": spec,
                "status": {"observedGeneration": observed, "conditions": [{"type": "Accepted", "status": accepted,
                    "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            }))
        };
        let refused = |object: &DynamicObject| {
            let mut feed = Feed::new(config());
            take(&mut feed, Kind::Service, vec![Watched::Apply(object.clone())]);
            let refusal = feed.refused().get(&ServiceKey::new("default", "x")).cloned();
            refusal.inspect(|refusal| assert_eq!(refusal.generation, 2)).map(|refusal| refusal.why)
        };
        let elsewhere = json!({"vips": ["10.9.9.9"], "ports": [{"port": 80}]});
        let why = refused(&seen(elsewhere.clone(), 2, "True")).unwrap();
        assert!(why.starts_with("spec.vips[0]: "), "{why}");
        // One of a later version, and one that only a later version acts on.
        let later = refused(&seen(json!({"later": 1, "ports": [{"port": 80}]}), 2, "True")).unwrap();
        assert!(later.starts_with("spec.later: is not a field here"), "{later}");
        let unsupported = json!({"sourceRanges": ["10.0.0.0/8"], "ports": [{"port": 80}]});
        assert!(refused(&seen(unsupported, 2, "True")).unwrap().starts_with("spec.sourceRanges: "));
        // The controller refuses it too, or has not seen it yet.
        assert_eq!(refused(&seen(elsewhere.clone(), 2, "False")), None);
        assert_eq!(refused(&seen(elsewhere.clone(), 1, "True")), None);
        assert_eq!(refused(&seen(json!({"ports": [{"port": 80}]}), 2, "True")), None);
        // It is over when the object is another one, or gone.
        for end in [Watched::Apply(service("x", 80)), Watched::Delete(service("x", 80))] {
            let mut feed = Feed::new(config());
            take(&mut feed, Kind::Service, vec![Watched::Apply(seen(elsewhere.clone(), 2, "True")), end]);
            assert!(feed.refused().is_empty());
        }
    }

    #[test]
    fn what_is_wrong_has_what_it_is_given_now() {
        let mut feed = Feed::new(config());
        take(&mut feed, Kind::Service, listed(vec![service("x", 80)]));
        let mut moved = service("x", 70_000);
        moved.data["status"]["vips"] = json!(["10.200.8.8"]);
        moved.data["status"]["ports"][0]["publishedPort"] = json!(30081);
        assert_eq!(
            take(&mut feed, Kind::Service, vec![Watched::Apply(moved.clone())]),
            ["x has 10.200.8.8 30081"]
        );
        // Of one that never was in force nothing is.
        let mut other = Feed::new(config());
        assert!(take(&mut other, Kind::Service, vec![Watched::Apply(moved)]).is_empty());
    }

    #[test]
    fn another_object_of_a_name_does_not_go_on_as_the_one_before() {
        let of = |mut object: DynamicObject, uid: &str| {
            object.metadata.uid = Some(uid.to_owned());
            object
        };
        let mut feed = Feed::new(config());
        take(&mut feed, Kind::Service, listed(vec![of(service("x", 80), "1")]));
        // It went and came while no watch was there.
        assert_eq!(take(&mut feed, Kind::Service, listed(vec![of(service("x", 70_000), "2")])), ["-x"]);
        assert_eq!(problems(&feed).len(), 1);
        assert!(take(&mut feed, Kind::Service, listed(vec![of(service("x", 70_000), "2")])).is_empty());
        assert_eq!(take(&mut feed, Kind::Service, listed(vec![of(service("x", 81), "2")])), ["x:81"]);
        let mut wrong = of(slice("s", "10.0.0.1"), "2");
        wrong.data["ports"][0]["port"] = json!(70_000);
        take(&mut feed, Kind::Slice, listed(vec![of(slice("s", "10.0.0.1"), "1")]));
        assert_eq!(take(&mut feed, Kind::Slice, listed(vec![wrong])), ["-slice s"]);
    }

    #[test]
    fn granted_is_what_the_status_says() {
        let mut feed = Feed::new(config());
        let mut events = Vec::new();
        feed.take(Kind::Service, Watched::Apply(service("x", 80)), &mut events);
        let Some(Event::Service(service)) = events.first() else { panic!("{events:?}") };
        let granted = service.granted.as_ref().unwrap();
        assert_eq!(granted.vips.v4, Some("10.200.7.7".parse().unwrap()));
        assert_eq!(granted.published.get(&"80/TCP".parse().unwrap()), Some(&30080));
    }
}
