//! The subscription to an engine's steps: it stays, whatever happens to the engine.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use ledger::time::Clock;
use ledger::{Label, Timestamp};
use tokio::sync::mpsc::Sender;
use tokio::time::sleep;
use zeromq::{Socket, SocketEvent, SocketOptions, SocketRecv, SubSocket, ZmqMessage};

use super::{Heard, Numbering, StepError, decode};

/// How long an attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(3);
/// The pause after a connection that worked, and the longest after attempts that did not.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Where an engine publishes its steps. Each data-parallel rank has a port, and so a source, of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSource {
    /// The engine.
    pub engine: Label,
    /// Such as `tcp://127.0.0.1:20380`.
    pub endpoint: String,
}

/// Stays subscribed and tells what is heard until nobody listens to `out` any more. When `out` is full the publisher's
/// messages wait in the socket's buffers and, once these are full too, are dropped by the publisher; their numbers tell.
///
/// # Errors
/// Only for an endpoint that can never work; everything else is tried again.
pub async fn follow(source: StepSource, clock: Arc<dyn Clock>, out: Sender<Heard>) -> Result<(), StepError> {
    check(&source.endpoint)?;
    let mut numbering = Numbering::default();
    let mut pause = PAUSE.0;
    loop {
        let listening = listen(&source, clock.as_ref(), &mut numbering, &out);
        let was_connected = tokio::select! {
            () = out.closed() => return Ok(()),
            ended = listening => ended,
        };
        pause = if was_connected { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
        tokio::select! {
            () = out.closed() => return Ok(()),
            () = sleep(pause) => {}
        }
    }
}

/// Listens over one connection until it breaks. Gives whether there was one.
///
/// The library would connect again by itself, but waits up to half a minute and does not tell; a new socket is quicker.
async fn listen(source: &StepSource, clock: &dyn Clock, numbering: &mut Numbering, out: &Sender<Heard>) -> bool {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT);
    let mut socket = SubSocket::with_options(options);
    let mut events = socket.monitor();
    let connecting = async {
        socket.subscribe("").await?;
        socket.connect(&source.endpoint).await
    };
    if let Err(error) = connecting.await {
        tell(out, Heard::Disconnected(error.to_string())).await;
        return false;
    }
    tell(out, Heard::Connected).await;
    loop {
        tokio::select! {
            // What arrived before the connection broke is read before the break is noticed.
            biased;
            message = socket.recv() => match message {
                Ok(message) => {
                    for heard in read(&message, &source.engine, numbering, clock.now()) {
                        tell(out, heard).await;
                    }
                }
                Err(error) => {
                    tell(out, Heard::Disconnected(error.to_string())).await;
                    return true;
                }
            },
            event = events.next() => if matches!(event, None | Some(SocketEvent::Disconnected(_))) {
                tell(out, Heard::Disconnected("the engine closed the connection".to_owned())).await;
                return true;
            },
        }
    }
}

/// Reads the frames of a message. The number is a frame of its own, or else a field of the map.
fn read(message: &ZmqMessage, engine: &Label, numbering: &mut Numbering, received: Timestamp) -> Vec<Heard> {
    let frames: Vec<&[u8]> = message.iter().map(AsRef::as_ref).collect();
    let Some(payload) = frames.last() else {
        return vec![Heard::Unreadable(StepError::Message("it has no frame".to_owned()))];
    };
    let map = match decode(payload) {
        Ok(map) => map,
        Err(error) => return vec![Heard::Unreadable(error)],
    };
    let framed = match frames.as_slice() {
        [.., number, _] => <[u8; 8]>::try_from(*number).ok().map(u64::from_be_bytes),
        _ => None,
    };
    match framed.or(map.counter_id) {
        Some(number) => numbering.hear(number, &map, engine, received),
        None => vec![Heard::Unreadable(StepError::Message("it has no number".to_owned()))],
    }
}

/// A receiver that is gone ends [`follow`] by itself, so that a message to it is lost is no news.
async fn tell(out: &Sender<Heard>, heard: Heard) {
    let _ = out.send(heard).await;
}

fn check(endpoint: &str) -> Result<(), StepError> {
    let port = endpoint.strip_prefix("tcp://").and_then(|address| address.rsplit_once(':'));
    match port.map(|(host, port)| (host, port.parse::<u16>())) {
        Some((host, Ok(1..))) if !host.is_empty() && host != "*" => Ok(()),
        _ => Err(StepError::Endpoint { endpoint: endpoint.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_that_can_never_work_are_refused() {
        let cases = [
            ("tcp://127.0.0.1:20380", true),
            ("tcp://[::1]:20380", true),
            ("tcp://*:20380", false),
            ("tcp://127.0.0.1", false),
            ("tcp://127.0.0.1:0", false),
            ("tcp://127.0.0.1:99999", false),
            ("http://127.0.0.1:20380", false),
            ("ipc:///run/steps", false),
            ("", false),
        ];
        for (endpoint, usable) in cases {
            assert_eq!(check(endpoint).is_ok(), usable, "{endpoint}");
        }
    }
}
