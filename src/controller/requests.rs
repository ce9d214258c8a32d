//! What is asked of the API server: statuses, headless Services, Events.

use k8s_openapi::api::core::v1::{ObjectReference, Service as CoreService};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::DynamicObject,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::debug;

use super::{PATIENCE, headless::Todo, mesh::Meta, status::News, timed};
use crate::{
    api::{self, MeshService, status::MeshServiceStatus},
    metrics::controller::{ControllerMetrics, Written},
    model::ids::ServiceKey,
};

/// Field manager of all that the controller writes.
pub const MANAGER: &str = "meshlb-controller";

/// Whether a request was refused because its object has changed, has gone or is there already.
pub fn has_changed(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 || status.code == 404)
}

/// How a write ended, for metrics.
pub fn outcome<T>(result: &Result<T, kube::Error>) -> Written {
    match result {
        Ok(_) => Written::Done,
        Err(e) if has_changed(e) => Written::Conflict,
        Err(_) => Written::Error,
    }
}

/// Writes a status, unless the object has changed since. Returns its new version.
///
/// # Errors
/// The API server's; 409 when it has changed.
pub async fn write(
    client: &Client,
    key: &ServiceKey,
    meta: &Meta,
    status: &MeshServiceStatus,
) -> Result<Option<String>, kube::Error> {
    let resource = ApiResource::erase::<MeshService>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &resource);
    let body = json!({
        "apiVersion": api::API_VERSION,
        "kind": api::KIND,
        "metadata": {"name": &*key.name, "namespace": &*key.namespace, "resourceVersion": meta.resource_version},
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    let object = timed(PATIENCE, api.patch_status(&key.name, &params, &Patch::Apply(&body))).await?;
    Ok(object.resource_version())
}

/// Does something about a headless Service. Only what is surely ours is changed or deleted: making never takes over, and the others name the uid.
///
/// # Errors
/// The API server's; 409 when there is one, or another one.
pub async fn keep_headless(client: &Client, key: &ServiceKey, todo: Todo) -> Result<(), kube::Error> {
    let resource = ApiResource::erase::<CoreService>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &resource);
    match todo {
        Todo::Create(wanted) => {
            let object: DynamicObject = serde_json::from_value(wanted).map_err(kube::Error::SerdeError)?;
            let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            timed(PATIENCE, api.create(&params, &object)).await.map(drop)
        }
        Todo::Change(uid, mut patch) => {
            patch["metadata"]["uid"] = uid.into();
            let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
            timed(PATIENCE, api.patch(&key.name, &params, &Patch::Merge(&patch))).await.map(drop)
        }
        Todo::Delete(uid) => {
            let preconditions = Some(Preconditions { uid: Some(uid), resource_version: None });
            let params = DeleteParams { preconditions, ..DeleteParams::default() };
            timed(PATIENCE, api.delete(&key.name, &params)).await.map(drop)
        }
    }
}

/// Writes Events, one after another.
pub async fn publish(
    client: Client,
    reporter: Reporter,
    mut queue: mpsc::Receiver<(News, ObjectReference)>,
    metrics: ControllerMetrics,
) {
    while let Some((news, about)) = queue.recv().await {
        // A new one each time: one that remembers would repeat the text of the first Event of a reason.
        let recorder = Recorder::new(client.clone(), reporter.clone());
        let event = Event {
            type_: if news.good { EventType::Normal } else { EventType::Warning },
            reason: news.reason,
            // At most 1 kB.
            note: Some(news.message.chars().take(250).collect()),
            action: "Allocate".into(),
            secondary: None,
        };
        let result = timed(PATIENCE, recorder.publish(&event, &about)).await;
        metrics.wrote("event", outcome(&result));
        if let Err(e) = result {
            debug!("an Event can't be written: {e}");
        }
    }
}
