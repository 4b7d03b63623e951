//! The listener below every gRPC service: bounded connections and streams, silent peers dropped, and an end that lets what is
//! under way finish.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tonic::body::Body;

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// A connection that does not answer a ping for as long as this is gone.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Wait after the system had no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Time for requests under way to end when the listener is to stop.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Hands each request that arrives on `listener` to `answer`, until `shutdown` resolves. `what` names the service in the log;
/// `streams_max` are the requests at a time on one connection.
pub(crate) async fn serve<A, F>(
    listener: TcpListener,
    what: &'static str,
    streams_max: u32,
    answer: A,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
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
                let (answer, stopping) = (answer.clone(), stopping.clone());
                connections.spawn(async move {
                    connection(stream, what, streams_max, answer, stopping).await;
                    drop(permit);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break Err(error),
            Err(error) => {
                tracing::warn!(%error, what, "a connection was not accepted");
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

async fn connection<A, F>(
    stream: TcpStream,
    what: &'static str,
    streams_max: u32,
    answer: A,
    mut stopping: watch::Receiver<()>,
) where
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(|request| {
        let answering = answer(request);
        async move { Ok::<_, Infallible>(answering.await) }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams_max)
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
        tracing::debug!(%error, what, "a connection broke");
    }
}
