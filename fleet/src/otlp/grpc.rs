//! OTLP over gRPC, on a listener of its own.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tonic::Status;
use tonic::codec::CompressionEncoding;
use tonic::codegen::Service;

use super::http::export_response;
use super::{REQUEST_TIME_MAX, Receiver};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// Requests at a time on one connection.
const STREAMS_MAX: u32 = 16;
/// A connection that does not answer a ping for as long as this is gone.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Wait after the system had no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Time for requests under way to end when the listener is to stop.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves OpenTelemetry's `TraceService` on `listener` until `shutdown` resolves, and lets requests under way end.
///
/// # Errors
/// When the listening socket itself is gone. A broken connection is served around.
pub async fn serve_grpc(
    listener: TcpListener,
    receiver: Receiver,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let served = loop {
        let next = async {
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            () = &mut shutdown => break Ok(()),
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                let (receiver, stopping) = (receiver.clone(), stopping.clone());
                connections.spawn(async move {
                    connection(stream, receiver, stopping).await;
                    drop(permit);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break Err(error),
            Err(error) => {
                tracing::warn!(%error, "a connection for spans was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    };
    drop(listener);
    drop(stopping);
    let _ = stop.send(());
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, ended).await.is_err() {
        connections.shutdown().await;
    }
    served
}

async fn connection(stream: TcpStream, receiver: Receiver, mut stopping: watch::Receiver<()>) {
    let service = TraceServiceServer::new(receiver.clone())
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(receiver.body_bytes_max());
    let service = service_fn(|request: Request<Incoming>| {
        let (receiver, mut service) = (receiver.clone(), service.clone());
        async move {
            if !receiver.admits(request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
                receiver.refused();
                let status = Status::unauthenticated("send the token for spans as metadata `authorization: Bearer …`");
                return Ok::<_, Infallible>(status.into_http());
            }
            let _room = receiver.room().await;
            let answered = tokio::time::timeout(REQUEST_TIME_MAX, service.call(request)).await;
            answered.unwrap_or_else(|_| {
                receiver.refused();
                Ok(Status::deadline_exceeded("the request did not arrive in time").into_http())
            })
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_EVERY);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        biased;
        ended = serving.as_mut() => ended,
        _ = stopping.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection for spans broke");
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        match self.take(request.into_inner()) {
            Ok(taken) => Ok(tonic::Response::new(export_response(taken.complaint()))),
            Err(busy) => {
                self.refused();
                Err(Status::unavailable(busy.to_string()))
            }
        }
    }
}
