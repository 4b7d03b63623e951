//! What the gateway itself says no to, in the words of the API that the client speaks.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use ledger::RequestId;

use crate::surface::Dialect;

/// A request that gets an answer of ours instead of an upstream's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The status of the answer.
    pub status: StatusCode,
    /// One clear line. It never contains a credential or a part of a prompt.
    pub message: String,
    /// Seconds to wait before trying again.
    pub retry_after_s: Option<u64>,
}

impl Refusal {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), retry_after_s: None }
    }

    /// The answer, in the error shape of `dialect`.
    pub fn response(&self, dialect: Dialect, request: RequestId) -> Response<Bytes> {
        let body = dialect.kind().error_body(self.status, &self.message, &request.to_string());
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
