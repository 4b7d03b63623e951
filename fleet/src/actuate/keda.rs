//! KEDA's external scaler: KEDA asks over gRPC, and an HPA that it makes acts.
//!
//! The metric is the number of replicas that there should be, with a target of one for each replica, so that the HPA arrives at
//! the same number. What is not known is an error, on which KEDA and the HPA leave things as they are, and never zero.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use http::Request;
use hyper::body::Incoming;
use ledger::Clock;
use tokio::net::TcpListener;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::codegen::Service;
use tonic::{Response, Status};

use self::contract::external_scaler_server::{ExternalScaler, ExternalScalerServer};
use self::contract::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};
use super::wanted::{Unknown, Wanted};
use crate::grpc;

/// The messages and the service, made of `proto/externalscaler.proto` for `tonic_prost`'s codec.
#[expect(
    unused_qualifications,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code writes whole paths, and brings its own attributes"
)]
pub mod contract {
    tonic::include_proto!("externalscaler");
}

/// The metric's name.
pub const METRIC: &str = "farthing-replicas";
/// The metric for each replica.
const TARGET: i64 = 1;
/// Streams that are open at a time, over all connections.
const STREAMS_MAX: usize = 1_024;
/// Requests at a time on one connection; KEDA has one connection for all that it scales.
const CONNECTION_STREAMS_MAX: u32 = 1_024;
/// Changes that one stream may be behind; who is slower has its stream ended, and opens another.
const BEHIND_MAX: usize = 4;
/// Largest request.
const REQUEST_BYTES_MAX: usize = 64 * 1_024;
/// Longest time for a request to arrive.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// Serves KEDA's `externalscaler.ExternalScaler` from `wanted`, on `listener`, until `shutdown` resolves.
///
/// A trigger's metadata names the `deployment`, and its `pool` where several pools have one of that name.
///
/// # Errors
/// When the listening socket itself is gone. A broken connection is served around.
pub async fn serve_keda(
    listener: TcpListener,
    wanted: Wanted,
    clock: Arc<dyn Clock>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let (stop, stopping) = watch::channel(());
    let scaler = Scaler { wanted, clock, room: Arc::new(Semaphore::new(STREAMS_MAX)), stopping };
    let service = ExternalScalerServer::new(scaler).max_decoding_message_size(REQUEST_BYTES_MAX);
    let answer = move |request: Request<Incoming>| {
        let mut service = service.clone();
        async move {
            match tokio::time::timeout(REQUEST_TIME_MAX, service.call(request)).await {
                Ok(Ok(answered)) => answered,
                Ok(Err(never)) => match never {},
                Err(_) => Status::deadline_exceeded("the request did not arrive in time").into_http(),
            }
        }
    };
    // Streams have no end of their own.
    let shutdown = async {
        shutdown.await;
        drop(stop);
    };
    grpc::serve(listener, "KEDA", CONNECTION_STREAMS_MAX, answer, shutdown).await
}

struct Scaler {
    wanted: Wanted,
    clock: Arc<dyn Clock>,
    room: Arc<Semaphore>,
    stopping: watch::Receiver<()>,
}

/// What a request is about.
struct Asked {
    deployment: String,
    pool: Option<String>,
}

type Activity = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    type StreamIsActiveStream = Activity;

    async fn is_active(&self, request: tonic::Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        let asked = asked(request.into_inner())?;
        let result = is_active(&self.wanted, &*self.clock, &asked).map_err(status)?;
        Ok(Response::new(IsActiveResponse { result }))
    }

    async fn stream_is_active(&self, request: tonic::Request<ScaledObjectRef>) -> Result<Response<Activity>, Status> {
        let asked = asked(request.into_inner())?;
        self.wanted.known(asked.pool.as_deref(), &asked.deployment).map_err(status)?;
        let room = Arc::clone(&self.room).try_acquire_owned();
        let room = room.map_err(|_| Status::resource_exhausted(format!("{STREAMS_MAX} streams are open already")))?;
        let (sender, mut receiver) = mpsc::channel(BEHIND_MAX);
        let (wanted, clock, stopping) = (self.wanted.clone(), Arc::clone(&self.clock), self.stopping.clone());
        tokio::spawn(async move {
            follow(&wanted, &*clock, &asked, &sender, stopping).await;
            drop(room);
        });
        Ok(Response::new(Box::pin(futures_util::stream::poll_fn(move |context| receiver.poll_recv(context)))))
    }

    async fn get_metric_spec(
        &self,
        request: tonic::Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let asked = asked(request.into_inner())?;
        self.wanted.known(asked.pool.as_deref(), &asked.deployment).map_err(status)?;
        let spec = MetricSpec { metric_name: METRIC.to_owned(), target_size: TARGET, target_size_float: 1.0 };
        Ok(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
    }

    async fn get_metrics(
        &self,
        request: tonic::Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let object = request.scaled_object_ref.ok_or_else(|| Status::invalid_argument("no scaledObjectRef"))?;
        let asked = asked(object)?;
        if request.metric_name != METRIC {
            let name = request.metric_name;
            return Err(Status::invalid_argument(format!("no metric `{name}`; there is `{METRIC}`")));
        }
        let standing = self.wanted.standing(asked.pool.as_deref(), &asked.deployment, self.clock.now());
        let replicas = standing.map_err(status)?.replicas;
        let value = MetricValue {
            metric_name: METRIC.to_owned(),
            metric_value: i64::from(replicas),
            metric_value_float: f64::from(replicas),
        };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }
}

/// Tells what is known now, and then every change, until the other side is gone or too slow.
async fn follow(
    wanted: &Wanted,
    clock: &dyn Clock,
    asked: &Asked,
    sender: &mpsc::Sender<Result<IsActiveResponse, Status>>,
    mut stopping: watch::Receiver<()>,
) {
    let mut changes = wanted.changes();
    let mut last = None;
    loop {
        changes.mark_unchanged();
        // While nothing is known nothing is said: a stream has no word for it.
        if let Ok(result) = is_active(wanted, clock, asked)
            && last != Some(result)
        {
            match sender.try_send(Ok(IsActiveResponse { result })) {
                Ok(()) => last = Some(result),
                Err(TrySendError::Full(_)) => {
                    tracing::warn!(deployment = asked.deployment, "KEDA does not read its stream; it is ended");
                    return;
                }
                Err(TrySendError::Closed(_)) => return,
            }
        }
        tokio::select! {
            () = sender.closed() => return,
            _ = stopping.changed() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

fn is_active(wanted: &Wanted, clock: &dyn Clock, asked: &Asked) -> Result<bool, Unknown> {
    let standing = wanted.standing(asked.pool.as_deref(), &asked.deployment, clock.now())?;
    Ok(standing.replicas > 0 || standing.held > 0)
}

fn asked(mut object: ScaledObjectRef) -> Result<Asked, Status> {
    let mut take = |name: &str| object.scaler_metadata.remove(name).filter(|value| !value.is_empty());
    let (deployment, pool) = (take("deployment"), take("pool"));
    let missing = || Status::invalid_argument("the trigger's metadata has no `deployment`");
    Ok(Asked { deployment: deployment.ok_or_else(missing)?, pool })
}

fn status(unknown: Unknown) -> Status {
    let words = unknown.to_string();
    match unknown {
        Unknown::Nobody { .. } => Status::not_found(words),
        Unknown::Several(_) => Status::invalid_argument(words),
        Unknown::Undecided(_) | Unknown::Stale { .. } => Status::unavailable(words),
    }
}
