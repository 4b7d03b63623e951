//! OTLP over gRPC, on a listener of its own.

use std::future::Future;
use std::io;

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tokio::net::TcpListener;
use tonic::Status;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::codegen::Service;

use super::http::export_response;
use super::{REQUEST_TIME_MAX, Receiver};
use crate::grpc;

/// Requests at a time on one connection.
const STREAMS_MAX: u32 = 16;

/// Serves OpenTelemetry's `TraceService` on `listener` until `shutdown` resolves, and lets requests under way end.
///
/// # Errors
/// When the listening socket itself is gone. A broken connection is served around.
pub async fn serve_grpc(
    listener: TcpListener,
    receiver: Receiver,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let service = TraceServiceServer::new(receiver.clone())
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(receiver.body_bytes_max());
    let answer = move |request| answer(receiver.clone(), service.clone(), request);
    grpc::serve(listener, "spans", STREAMS_MAX, answer, shutdown).await
}

async fn answer(
    receiver: Receiver,
    mut service: TraceServiceServer<Receiver>,
    request: Request<Incoming>,
) -> Response<Body> {
    if !receiver.admits(request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
        receiver.refused();
        let status = Status::unauthenticated("send the token for spans as metadata `authorization: Bearer …`");
        return status.into_http();
    }
    let _room = receiver.room().await;
    match tokio::time::timeout(REQUEST_TIME_MAX, service.call(request)).await {
        Ok(Ok(answered)) => answered,
        Ok(Err(never)) => match never {},
        Err(_) => {
            receiver.refused();
            Status::deadline_exceeded("the request did not arrive in time").into_http()
        }
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
