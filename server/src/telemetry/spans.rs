//! Spans that applications and engines send: into the ledger as they come, joined with what the gateway saw later.

use std::sync::Arc;

use fleet::otlp::{Busy, Options, Receiver};
use ledger::{CallSpan, Clock, Fact};

use crate::facts::Facts;

/// A receiver whose spans go into the ledger. Senders need the admin token, where one is set.
#[must_use]
pub fn receiver(facts: Facts, clock: Arc<dyn Clock>, token: Option<&str>) -> Receiver {
    let sink = move |spans: Vec<CallSpan>| {
        let spans: Vec<Fact> = spans.into_iter().map(|span| Fact::Span(Box::new(span))).collect();
        // The log is a write into the page cache: microseconds, as the sink asks.
        facts.append(&spans).map_err(|error| Busy { reason: error.to_string() })
    };
    Receiver::new(Arc::new(sink), clock, Options { token: token.map(str::to_owned), ..Options::default() })
}
