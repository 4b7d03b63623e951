//! KEDA's side of the external scaler: its four methods over real gRPC, and what they say while nothing is known.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use fleet::actuate::keda::contract::external_scaler_client::ExternalScalerClient;
use fleet::actuate::keda::contract::{GetMetricsRequest, IsActiveResponse, ScaledObjectRef};
use fleet::actuate::{Wanted, serve_keda};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ledger::{Clock, Timestamp};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::{Code, Status, Streaming};

type Keda = ExternalScalerClient<Client<HttpConnector, tonic::body::Body>>;

/// Seconds that a test sets.
#[derive(Default)]
struct Hands(AtomicI64);

impl Clock for Hands {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::Relaxed) * 1_000_000)
    }

    fn monotonic_us(&self) -> u64 {
        0
    }
}

struct Served {
    wanted: Wanted,
    hands: Arc<Hands>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

async fn serve() -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (wanted, hands) = (Wanted::new(Duration::from_secs(60)), Arc::new(Hands::default()));
    let (stop, stopped) = oneshot::channel();
    let (table, clock) = (wanted.clone(), Arc::clone(&hands));
    let serving = tokio::spawn(async move {
        serve_keda(listener, table, clock, async { stopped.await.unwrap_or(()) }).await.unwrap();
    });
    Served { wanted, hands, address, stop, serving }
}

fn keda(address: SocketAddr) -> Keda {
    let http = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    ExternalScalerClient::with_origin(http, format!("http://{address}").parse().unwrap())
}

fn object(metadata: &[(&str, &str)]) -> ScaledObjectRef {
    let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    ScaledObjectRef {
        name: "chat-engines".to_owned(),
        namespace: "inference".to_owned(),
        scaler_metadata: metadata.iter().map(pair).collect(),
    }
}

fn chat() -> ScaledObjectRef {
    object(&[("scalerAddress", "farthing:6565"), ("deployment", "chat")])
}

async fn value(keda: &mut Keda, of: ScaledObjectRef) -> Result<(i64, f64), Status> {
    let metric_name = "farthing-replicas".to_owned();
    let request = GetMetricsRequest { scaled_object_ref: Some(of), metric_name };
    let [value] = keda.get_metrics(request).await?.into_inner().metric_values.try_into().unwrap();
    assert_eq!(value.metric_name, "farthing-replicas");
    Ok((value.metric_value, value.metric_value_float))
}

async fn active(keda: &mut Keda, of: ScaledObjectRef) -> Result<bool, Status> {
    keda.is_active(of).await.map(|answer| answer.into_inner().result)
}

async fn next(stream: &mut Streaming<IsActiveResponse>) -> Option<bool> {
    let next = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("in time");
    next.unwrap().map(|answer| answer.result)
}

#[tokio::test]
async fn the_metric_is_the_number_of_replicas() {
    let served = serve().await;
    let mut keda = keda(served.address);
    served.wanted.declare("shared", "chat");
    let [spec] = keda.get_metric_spec(chat()).await.unwrap().into_inner().metric_specs.try_into().unwrap();
    assert_eq!(
        (spec.metric_name.as_str(), spec.target_size, spec.target_size_float.to_bits()),
        ("farthing-replicas", 1, 1.0_f64.to_bits())
    );
    for replicas in [1, 7, 0] {
        served.wanted.tell("shared", "chat", replicas, served.hands.now());
        assert_eq!(value(&mut keda, chat()).await.unwrap(), (i64::from(replicas), f64::from(replicas)));
        assert_eq!(active(&mut keda, chat()).await.unwrap(), replicas > 0);
    }
    served.wanted.hold("shared", "chat", 2);
    assert!(active(&mut keda, chat()).await.unwrap(), "requests wait for the first replica");
}

#[tokio::test]
async fn unknown_is_an_error_and_never_zero() {
    let served = serve().await;
    let mut keda = keda(served.address);
    let code = |outcome: Result<(i64, f64), Status>| outcome.unwrap_err().code();
    assert_eq!(code(value(&mut keda, chat()).await), Code::NotFound);
    assert_eq!(keda.get_metric_spec(chat()).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(keda.stream_is_active(chat()).await.unwrap_err().code(), Code::NotFound);
    served.wanted.declare("shared", "chat");
    assert_eq!(code(value(&mut keda, chat()).await), Code::Unavailable);
    assert_eq!(active(&mut keda, chat()).await.unwrap_err().code(), Code::Unavailable);
    served.wanted.tell("shared", "chat", 3, served.hands.now());
    served.hands.0.store(60, Ordering::Relaxed);
    assert_eq!(value(&mut keda, chat()).await.unwrap().0, 3);
    served.hands.0.store(61, Ordering::Relaxed);
    let stale = value(&mut keda, chat()).await.unwrap_err();
    assert_eq!(stale.code(), Code::Unavailable);
    assert!(stale.message().contains("61 s old"), "{stale}");
    served.wanted.tell("shared", "chat", 3, served.hands.now());
    served.wanted.tell("other", "chat", 5, served.hands.now());
    let several = value(&mut keda, chat()).await.unwrap_err();
    assert_eq!(several.code(), Code::InvalidArgument);
    assert!(several.message().contains("`pool`"), "{several}");
    let of = |pool| object(&[("deployment", "chat"), ("pool", pool)]);
    assert_eq!(value(&mut keda, of("other")).await.unwrap().0, 5);
    assert_eq!(code(value(&mut keda, of("third")).await), Code::NotFound);
    assert_eq!(code(value(&mut keda, object(&[("deployment", "")])).await), Code::InvalidArgument);
    let request = |object, name: &str| GetMetricsRequest { scaled_object_ref: object, metric_name: name.to_owned() };
    for wrong in [request(None, "farthing-replicas"), request(Some(of("other")), "queue")] {
        assert_eq!(keda.get_metrics(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let large = object(&[("deployment", &"x".repeat(100_000))]);
    assert!(matches!(active(&mut keda, large).await.unwrap_err().code(), Code::OutOfRange | Code::ResourceExhausted));
}

#[tokio::test]
async fn a_stream_tells_changes_and_ends_with_the_server() {
    let served = serve().await;
    let mut keda = keda(served.address);
    served.wanted.declare("shared", "chat");
    let mut stream = keda.stream_is_active(chat()).await.unwrap().into_inner();
    let tell = |replicas| served.wanted.tell("shared", "chat", replicas, served.hands.now());
    tell(2);
    assert_eq!(next(&mut stream).await, Some(true), "nothing was said while nothing was known");
    tell(3);
    tell(0);
    assert_eq!(next(&mut stream).await, Some(false), "2 and 3 are the same here");
    served.wanted.hold("shared", "chat", 1);
    assert_eq!(next(&mut stream).await, Some(true));
    let mut late = keda.stream_is_active(chat()).await.unwrap().into_inner();
    assert_eq!(next(&mut late).await, Some(true), "what holds is told at once");
    let begun = tokio::time::Instant::now();
    drop(served.stop);
    assert_eq!((next(&mut stream).await, next(&mut late).await), (None, None));
    tokio::time::timeout(Duration::from_secs(10), served.serving).await.expect("it stops").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "open streams do not delay it");
}

#[tokio::test]
async fn who_does_not_read_loses_its_stream_and_nobody_else() {
    let served = serve().await;
    let tell = |replicas| served.wanted.tell("shared", "chat", replicas, served.hands.now());
    tell(1);
    // Room for three answers, and no more until they are read.
    let http = Client::builder(TokioExecutor::new()).http2_only(true).http2_initial_stream_window_size(21).build_http();
    let mut slow: Keda = ExternalScalerClient::with_origin(http, format!("http://{}", served.address).parse().unwrap());
    let mut unread = slow.stream_is_active(chat()).await.unwrap().into_inner();
    let mut keda = keda(served.address);
    let mut read = keda.stream_is_active(chat()).await.unwrap().into_inner();
    for round in 1..=40 {
        assert_eq!(next(&mut read).await, Some(round % 2 == 1));
        tell(u32::from(round % 2 == 0));
    }
    let mut answers = 0;
    while next(&mut unread).await.is_some() {
        answers += 1;
    }
    assert!((1..20).contains(&answers), "{answers}");
    let mut again = slow.stream_is_active(chat()).await.unwrap().into_inner();
    assert_eq!(next(&mut again).await, Some(true));
}
