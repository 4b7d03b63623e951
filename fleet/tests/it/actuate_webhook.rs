//! A webhook over real HTTP: what it is told, and what its answers mean.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use fleet::actuate::{ActuateError, Actuator, Secret, Spec};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// Method, path, idempotency key, authorization and body of a call.
type Call = (String, String, Option<String>, Option<String>, Value);

/// Answers every call with the status that its path names, and remembers it.
async fn hook() -> (String, Arc<Mutex<Vec<Call>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let calls = Arc::new(Mutex::new(Vec::new()));
    let remember = Arc::clone(&calls);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let remember = Arc::clone(&remember);
            let service = service_fn(move |request: Request<Incoming>| {
                let remember = Arc::clone(&remember);
                async move {
                    let header = |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
                    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
                    let (key, token) = (header("idempotency-key"), header("authorization"));
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = serde_json::from_slice(&body).unwrap_or_default();
                    let status: u16 = path[1..].parse().unwrap();
                    remember.lock().unwrap().push((method, path, key, token, body));
                    let answer = Full::new(Bytes::from_static(br#"{"replicas": 3, "ready": 2}"#));
                    let answer = Response::builder().status(status).header("location", "/200").body(answer);
                    Ok::<_, Infallible>(answer.unwrap())
                }
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    (url, calls)
}

fn told(url: String, token: Option<Secret>, folder: &Path) -> Actuator {
    Actuator::new(&Spec::Webhook { url, token }, folder).unwrap()
}

#[tokio::test]
async fn it_is_told_with_a_key_and_a_token_and_asked_with_the_token() {
    let ((url, calls), folder) = (hook().await, tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("token"), "first\n").unwrap();
    let actuator = told(format!("{url}/200"), Some(Secret::File("token".into())), folder.path());
    actuator.tell(3, "shared/chat/1/3").await.unwrap();
    std::fs::write(folder.path().join("token"), "renewed\n").unwrap();
    actuator.tell(3, "shared/chat/1/3").await.unwrap();
    let actual = actuator.read().await.unwrap().unwrap();
    assert_eq!((actual.replicas, actual.ready), (3, Some(2)));
    let call = |method: &str, key: Option<&str>, token: &str, body| {
        (method.to_owned(), "/200".to_owned(), key.map(str::to_owned), Some(format!("Bearer {token}")), body)
    };
    let order = json!({"replicas": 3, "key": "shared/chat/1/3"});
    let key = Some("shared/chat/1/3");
    let wanted = [
        call("POST", key, "first", order.clone()),
        call("POST", key, "renewed", order),
        call("GET", None, "renewed", Value::Null),
    ];
    assert_eq!(*calls.lock().unwrap(), wanted);
}

#[tokio::test]
async fn what_it_answers_says_whether_trying_again_helps() {
    let ((url, calls), folder) = (hook().await, tempfile::tempdir().unwrap());
    for (status, again) in
        [(301, false), (307, false), (400, false), (403, false), (408, true), (429, true), (500, true), (503, true)]
    {
        let error = told(format!("{url}/{status}"), None, folder.path()).tell(1, "k").await.unwrap_err();
        let helps = match &error {
            ActuateError::Unreachable { .. } => true,
            ActuateError::Refused { .. } => false,
            other => panic!("{other:?}"),
        };
        assert_eq!(helps, again, "{status}");
        assert!(error.to_string().contains(&status.to_string()), "{error}");
    }
    assert_eq!(calls.lock().unwrap().len(), 8, "no redirect was followed");
    let gone = told("http://127.0.0.1:1/".to_owned(), None, folder.path()).tell(1, "k").await;
    assert!(matches!(gone, Err(ActuateError::Unreachable { .. })));
    let lost = told(url, Some(Secret::File("none".into())), folder.path()).tell(1, "k").await;
    assert!(matches!(lost, Err(ActuateError::Configuration(_))));
}

#[test]
fn the_configuration_refers_to_a_token_and_never_holds_it() {
    let read = |value: Value| serde_json::from_value::<Spec>(value);
    let spec = read(json!({"kind": "webhook", "url": "https://scale.example/", "token": {"env": "SCALE_TOKEN"}}));
    assert!(matches!(spec.unwrap(), Spec::Webhook { token: Some(Secret::Env(name)), .. } if name == "SCALE_TOKEN"));
    assert!(read(json!({"kind": "webhook", "url": "https://scale.example/", "token": "hush"})).is_err());
    let inside = read(json!({"kind": "webhook", "url": "https://me:hush@scale.example/"})).unwrap();
    assert!(!inside.check().unwrap_err().contains("hush"));
}
