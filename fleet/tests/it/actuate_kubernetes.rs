//! The Kubernetes actuator against a double of the API server that holds to the rules which matter here: a write needs the version
//! that is current, and says what the `scale` schema allows.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use fleet::actuate::{ActuateError, Actuator, Kubernetes, Resource, Spec};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

const SCALE: &str = "/apis/apps/v1/namespaces/llm/deployments/chat/scale";
const GROUPS: &str = "/apis/leaderworkerset.x-k8s.io/v1/namespaces/llm/leaderworkersets/chat/scale";
const PODS: &str = "/api/v1/namespaces/llm/pods";

/// What happens in the cluster just before a write arrives.
#[derive(Debug, Clone, Copy)]
enum Meanwhile {
    /// A controller writes the status: the version moves on.
    Status,
    /// Somebody scales.
    Scaled(i64),
    /// Nothing, and the write is done, but its answer never comes.
    Silence,
    /// The write is held up on its way, and arrives just before the next one.
    Delay,
}

#[derive(Debug)]
struct Cluster {
    version: u64,
    replicas: i64,
    pods: Vec<Value>,
    may_list: bool,
    meanwhile: Vec<Meanwhile>,
    held_up: Option<Vec<u8>>,
    /// Method and path of every call, and what of writes was accepted.
    calls: Vec<String>,
}

struct ApiServer {
    url: String,
    cluster: Arc<Mutex<Cluster>>,
}

impl ApiServer {
    async fn start(replicas: i64) -> ApiServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cluster = Cluster {
            version: 41,
            replicas,
            pods: Vec::new(),
            may_list: true,
            meanwhile: Vec::new(),
            held_up: None,
            calls: Vec::new(),
        };
        let cluster = Arc::new(Mutex::new(cluster));
        let served = Arc::clone(&cluster);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let cluster = Arc::clone(&served);
                let service = service_fn(move |request| answer(Arc::clone(&cluster), request));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        ApiServer { url, cluster }
    }

    fn actuator(&self, resource: Resource) -> Actuator {
        let spec = Kubernetes {
            namespace: "llm".into(),
            resource,
            name: "chat".into(),
            server: Some(self.url.clone()),
            kubeconfig: None,
            context: None,
        };
        Actuator::new(&Spec::Kubernetes(spec), std::path::Path::new(".")).unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Cluster) -> T) -> T {
        change(&mut self.cluster.lock().unwrap())
    }

    fn writes(&self) -> usize {
        self.change(|cluster| cluster.calls.iter().filter(|call| call.starts_with("PUT")).count())
    }

    /// Tells, and stops waiting as soon as the write has left, as a newer order or a time-out does.
    async fn tell_and_go(&self, actuator: &Actuator, replicas: u32) {
        let before = self.writes();
        let written = async {
            while self.writes() == before {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::select! {
            outcome = actuator.tell(replicas, "k") => panic!("it was answered: {outcome:?}"),
            () = written => {}
        }
    }
}

async fn answer(cluster: Arc<Mutex<Cluster>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let result = cluster.lock().unwrap().answer(&head.method, &head.uri, &body);
    let Some(result) = result else { std::future::pending().await };
    let (status, body) =
        result.map_or_else(|(code, reason, message)| (code, failure(code, reason, &message)), |body| (200, body));
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
    Ok(response)
}

type Answer = Result<Value, (u16, &'static str, String)>;

fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code })
}

impl Cluster {
    fn scale(&self) -> Value {
        json!({
            "kind": "Scale", "apiVersion": "autoscaling/v1",
            "metadata": { "name": "chat", "namespace": "llm", "resourceVersion": self.version.to_string(), "uid": "u-1" },
            "spec": { "replicas": self.replicas },
            "status": { "replicas": self.pods.len(), "selector": "app=chat" },
        })
    }

    /// `None` for a call that nobody hears of again.
    fn answer(&mut self, method: &Method, uri: &Uri, body: &[u8]) -> Option<Answer> {
        self.calls.push(format!("{method} {uri}"));
        Some(match (method, uri.path()) {
            (&Method::GET, SCALE | GROUPS) => Ok(self.scale()),
            (&Method::PUT, SCALE | GROUPS) => return self.receive(body),
            (&Method::GET, PODS) if self.may_list => self.list(uri.query().unwrap_or_default()),
            (&Method::GET, PODS) => Err((403, "Forbidden", "pods is forbidden".to_owned())),
            (_, path) => Err((404, "NotFound", format!("nothing at {path}"))),
        })
    }

    fn receive(&mut self, body: &[u8]) -> Option<Answer> {
        if let Some(earlier) = self.held_up.take() {
            self.write(&earlier).unwrap();
        }
        match self.meanwhile.pop() {
            None => {}
            Some(Meanwhile::Status) => self.version += 1,
            Some(Meanwhile::Scaled(replicas)) => (self.version, self.replicas) = (self.version + 1, replicas),
            Some(Meanwhile::Silence) => {
                self.write(body).unwrap();
                return None;
            }
            Some(Meanwhile::Delay) => {
                self.held_up = Some(body.to_vec());
                return None;
            }
        }
        Some(self.write(body))
    }

    fn write(&mut self, body: &[u8]) -> Answer {
        let invalid = |why: &str| Err((422, "Invalid", format!("Scale is invalid: {why}")));
        let Ok(scale) = serde_json::from_slice::<Value>(body) else {
            return Err((400, "BadRequest", "not JSON".to_owned()));
        };
        if (scale["kind"].as_str(), scale["apiVersion"].as_str()) != (Some("Scale"), Some("autoscaling/v1")) {
            return Err((400, "BadRequest", "not an autoscaling/v1 Scale".to_owned()));
        }
        let metadata = &scale["metadata"];
        if (metadata["name"].as_str(), metadata["namespace"].as_str()) != (Some("chat"), Some("llm")) {
            return invalid("metadata names something else");
        }
        let Some(version) = metadata["resourceVersion"].as_str() else {
            return invalid("metadata.resourceVersion must be specified for an update");
        };
        if version != self.version.to_string() {
            return Err((
                409,
                "Conflict",
                "the object has been modified; please apply your changes to the latest version".to_owned(),
            ));
        }
        let Some(replicas) = scale["spec"]["replicas"].as_i64().filter(|&replicas| replicas >= 0) else {
            return invalid("spec.replicas must be at least 0");
        };
        if scale["spec"].as_object().is_none_or(|spec| spec.len() != 1) {
            return invalid("unknown field in spec");
        }
        self.version += 1;
        self.replicas = replicas;
        Ok(self.scale())
    }

    fn list(&self, query: &str) -> Answer {
        if !query.contains("labelSelector=app%3Dchat") {
            return Err((400, "BadRequest", format!("without its selector: {query}")));
        }
        Ok(json!({ "kind": "PodList", "apiVersion": "v1", "metadata": { "resourceVersion": "7" }, "items": self.pods }))
    }
}

fn pod(name: &str, minute: u8, conditions: &[(&str, &str)], leaving: bool) -> Value {
    let conditions: Vec<Value> =
        conditions.iter().map(|(name, status)| json!({ "type": name, "status": status })).collect();
    let mut metadata =
        json!({ "name": name, "namespace": "llm", "creationTimestamp": format!("2026-11-24T01:{minute:02}:00Z") });
    if leaving {
        metadata["deletionTimestamp"] = json!("2026-11-24T02:00:00Z");
    }
    json!({ "metadata": metadata, "spec": { "containers": [] }, "status": { "conditions": conditions } })
}

#[tokio::test]
async fn it_is_told_once_and_asked_what_there_is() {
    let server = ApiServer::start(2).await;
    let actuator = server.actuator(Resource::Deployment);
    assert!(!actuator.pulls());
    server.change(|cluster| {
        cluster.pods = vec![
            pod("c", 5, &[("PodScheduled", "False")], false),
            pod("a", 1, &[("PodScheduled", "True"), ("Ready", "True")], false),
            pod("b", 3, &[("PodScheduled", "True"), ("Ready", "False")], false),
            pod("d", 4, &[], false),
            pod("e", 1, &[("PodScheduled", "True"), ("Ready", "True")], true),
        ];
    });
    let actual = actuator.read().await.unwrap().unwrap();
    assert_eq!((actual.replicas, actual.ready), (2, Some(1)), "who leaves does not count");
    let scheduled: Vec<_> = actual.pending.iter().map(|pod| pod.scheduled).collect();
    assert_eq!(scheduled, [Some(true), None, Some(false)], "the oldest first");
    assert_eq!(actual.pending[0].since.micros() % 3_600_000_000, 23 * 60_000_000 - 20 * 60_000_000);

    actuator.tell(5, "k/1").await.unwrap();
    actuator.tell(5, "k/1").await.unwrap();
    assert_eq!((server.change(|cluster| cluster.replicas), server.writes()), (5, 1));
    assert_eq!(actuator.read().await.unwrap().unwrap().replicas, 5);
    let says_who = server.change(|cluster| cluster.calls.iter().any(|call| call.contains("fieldManager=farthing")));
    assert!(says_who, "the audit log of the cluster names us");
}

#[tokio::test]
async fn a_write_that_was_overtaken_is_made_again_unless_somebody_scaled() {
    let server = ApiServer::start(2).await;
    let actuator = server.actuator(Resource::StatefulSet);
    let missing = actuator.tell(3, "k").await.unwrap_err().to_string();
    assert!(missing.contains("404") && missing.contains("statefulset llm/chat"), "{missing}");

    let actuator = server.actuator(Resource::Deployment);
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Status, Meanwhile::Status]);
    actuator.tell(3, "k").await.unwrap();
    assert_eq!((server.change(|cluster| cluster.replicas), server.writes()), (3, 3));

    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Scaled(7)]);
    let error = actuator.tell(1, "k").await.unwrap_err();
    assert!(matches!(error, ActuateError::Overtaken { replicas: 7, .. }), "{error}");
    assert_eq!(server.change(|cluster| cluster.replicas), 7, "their word stands");

    actuator.tell(1, "k").await.unwrap();
    assert_eq!(server.change(|cluster| cluster.replicas), 1, "whoever says so again knows of it");
    actuator.read().await.unwrap();
    server.change(|cluster| (cluster.replicas, cluster.version) = (6, cluster.version + 1));
    assert!(matches!(actuator.tell(2, "k").await, Err(ActuateError::Overtaken { replicas: 6, .. })));

    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Scaled(1)]);
    actuator.tell(1, "k").await.unwrap();
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Status; 9]);
    assert!(actuator.tell(4, "k").await.unwrap_err().to_string().contains("overtaken"));
}

#[tokio::test]
async fn a_write_whose_answer_nobody_waited_for_is_no_manual_change() {
    let server = ApiServer::start(2).await;
    let actuator = server.actuator(Resource::Deployment);
    assert_eq!(actuator.read().await.unwrap().unwrap().replicas, 2);

    // Done, and the answer was lost: the next order goes on from there.
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Silence]);
    server.tell_and_go(&actuator, 5).await;
    assert_eq!(server.change(|cluster| cluster.replicas), 5, "it was done");
    actuator.tell(4, "k").await.unwrap();
    assert_eq!(server.change(|cluster| cluster.replicas), 4);

    // Two in a row, and a controller writes the status in between.
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Silence]);
    server.tell_and_go(&actuator, 6).await;
    server.change(|cluster| cluster.version += 1);
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Silence]);
    server.tell_and_go(&actuator, 7).await;
    actuator.tell(3, "k").await.unwrap();
    assert_eq!(server.change(|cluster| cluster.replicas), 3);

    // Not done yet when it is looked at again, and done just before the next write.
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Delay]);
    server.tell_and_go(&actuator, 8).await;
    assert_eq!(actuator.read().await.unwrap().unwrap().replicas, 3);
    actuator.tell(1, "k").await.unwrap();
    assert_eq!(server.change(|cluster| (cluster.replicas, cluster.held_up.is_some())), (1, false));
}

#[tokio::test]
async fn somebody_elses_scaling_is_seen_behind_a_write_without_an_answer() {
    let server = ApiServer::start(2).await;
    let actuator = server.actuator(Resource::Deployment);
    actuator.read().await.unwrap();
    server.change(|cluster| cluster.meanwhile = vec![Meanwhile::Silence]);
    server.tell_and_go(&actuator, 5).await;
    server.change(|cluster| (cluster.replicas, cluster.version) = (9, cluster.version + 1));
    assert!(matches!(actuator.tell(4, "k").await, Err(ActuateError::Overtaken { replicas: 9, .. })));
    // What became of ours is settled by then: the same number a second time is theirs.
    server.change(|cluster| (cluster.replicas, cluster.version) = (5, cluster.version + 1));
    assert!(matches!(actuator.tell(4, "k").await, Err(ActuateError::Overtaken { replicas: 5, .. })));
}

#[tokio::test]
async fn a_pod_is_on_its_way_since_it_last_served_and_one_that_ended_is_not() {
    let server = ApiServer::start(4).await;
    let actuator = server.actuator(Resource::Deployment);
    let since = |mut pod: Value, minute: u8| {
        for condition in pod["status"]["conditions"].as_array_mut().unwrap() {
            condition["lastTransitionTime"] = json!(format!("2026-11-24T01:{minute:02}:00Z"));
        }
        pod
    };
    let ended = |mut pod: Value, phase: &str| {
        pod["status"]["phase"] = json!(phase);
        pod
    };
    let not_ready = [("PodScheduled", "True"), ("Ready", "False")];
    server.change(|cluster| {
        cluster.pods = vec![
            since(pod("served-until-50", 1, &not_ready, false), 50),
            since(pod("its-node-is-lost", 2, &[("PodScheduled", "True"), ("Ready", "Unknown")], false), 40),
            since(pod("without-a-place", 3, &[("PodScheduled", "False")], false), 45),
            since(pod("serves", 4, &[("PodScheduled", "True"), ("Ready", "True")], false), 30),
            ended(since(pod("evicted", 5, &not_ready, false), 20), "Failed"),
            ended(since(pod("done", 6, &not_ready, false), 20), "Succeeded"),
            since(pod("leaves", 7, &not_ready, true), 20),
        ];
    });
    let actual = actuator.read().await.unwrap().unwrap();
    assert_eq!(actual.ready, Some(1));
    let minutes: Vec<_> =
        actual.pending.iter().map(|one| (one.since.micros() % 3_600_000_000 / 60_000_000, one.scheduled)).collect();
    assert_eq!(minutes, [(3, Some(false)), (40, Some(true)), (50, Some(true))]);
}

#[tokio::test]
async fn groups_of_pods_are_scaled_the_same_way_and_without_the_right_to_list_pods_too() {
    let server = ApiServer::start(0).await;
    let actuator = server.actuator(Resource::LeaderWorkerSet);
    server.change(|cluster| cluster.may_list = false);
    actuator.tell(2, "k").await.unwrap();
    let actual = actuator.read().await.unwrap().unwrap();
    assert_eq!((actual.replicas, actual.ready, actual.pending.len()), (2, None, 0), "unknown, not zero");
}

#[tokio::test]
async fn a_cluster_that_cannot_be_reached_is_an_error_and_no_number() {
    let server = ApiServer::start(0).await;
    let mut spec = Kubernetes {
        namespace: "llm".into(),
        resource: Resource::Deployment,
        name: "chat".into(),
        server: Some("http://127.0.0.1:1".into()),
        kubeconfig: None,
        context: None,
    };
    let here = std::path::Path::new(".");
    let nobody = Actuator::new(&Spec::Kubernetes(spec.clone()), here).unwrap();
    assert!(nobody.read().await.unwrap_err().to_string().contains("could not be reached"));
    assert!(nobody.tell(1, "k").await.is_err());
    spec.kubeconfig = Some("config".into());
    assert!(Actuator::new(&Spec::Kubernetes(spec.clone()), here).is_err(), "two ways to reach it");
    spec.server = None;
    let missing = Actuator::new(&Spec::Kubernetes(spec.clone()), here).unwrap();
    assert!(missing.read().await.unwrap_err().to_string().contains("config"));
    spec.name = "../nodes".into();
    assert!(Actuator::new(&Spec::Kubernetes(spec), here).is_err());
    assert_eq!(server.writes(), 0);
}
