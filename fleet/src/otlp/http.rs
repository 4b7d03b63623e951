//! OTLP over HTTP: `POST /v1/traces`, as protobuf or JSON, plain or gzip.

use std::io::Read;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::header::{
    ALLOW, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Body;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use prost::Message;

use super::{REQUEST_TIME_MAX, Receiver, json};

/// Bodies above this are read on a thread where others do not wait.
const INLINE_BYTES_MAX: usize = 64 * 1024;
/// When to come back after spans could not be stored.
const RETRY_AFTER_SECONDS: u16 = 5;

/// How a body is encoded; the answer is encoded in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Protobuf,
    Json,
}

/// An error of this protocol, `google.rpc.Status` without its details.
#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    message: String,
}

fn refuse(status: StatusCode, message: impl Into<String>) -> Refusal {
    Refusal { status, message: message.into() }
}

impl Receiver {
    /// Answers one request, whatever its path: method, token and size are checked before the body is read.
    pub async fn serve<B>(&self, request: Request<B>) -> Response<Full<Bytes>>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        let encoding = encoding(&head.headers).unwrap_or(Encoding::Json);
        let read = async {
            if head.method != Method::POST {
                return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "send spans with POST"));
            }
            self.check(&head.headers)?;
            let room = self.room().await;
            Ok((self.body(&head.headers, body).await?, room))
        };
        let (body, _room) = match read.await {
            Ok(read) => read,
            Err(refusal) => return self.refusal(encoding, &refusal),
        };
        if body.len() <= INLINE_BYTES_MAX {
            return self.answer(&head.headers, &body);
        }
        let (receiver, headers) = (self.clone(), head.headers);
        let answered = tokio::task::spawn_blocking(move || receiver.answer(&headers, &body)).await;
        answered.unwrap_or_else(|_| {
            self.refusal(encoding, &refuse(StatusCode::INTERNAL_SERVER_ERROR, "the spans could not be read"))
        })
    }

    /// Answers a request whose body was read already. `headers` are the request's.
    #[must_use]
    pub fn answer(&self, headers: &HeaderMap, body: &[u8]) -> Response<Full<Bytes>> {
        match self.receive(headers, body) {
            Ok(response) => response,
            Err(refusal) => self.refusal(encoding(headers).unwrap_or(Encoding::Json), &refusal),
        }
    }

    fn receive(&self, headers: &HeaderMap, body: &[u8]) -> Result<Response<Full<Bytes>>, Refusal> {
        self.check(headers)?;
        let encoding = encoding(headers)?;
        let plain = self.plain(headers, body)?;
        let request = decode(encoding, plain.as_deref().unwrap_or(body))?;
        let taken = self.take(request).map_err(|busy| refuse(StatusCode::SERVICE_UNAVAILABLE, busy.to_string()))?;
        Ok(response(StatusCode::OK, encoding, success(encoding, taken.complaint())))
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.admits(headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
            return Ok(());
        }
        Err(refuse(StatusCode::UNAUTHORIZED, "send the token for spans as `authorization: Bearer …`"))
    }

    async fn body<B>(&self, headers: &HeaderMap, body: B) -> Result<Bytes, Refusal>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let max = self.body_bytes_max();
        let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|bytes| usize::try_from(bytes).map_or(true, |bytes| bytes > max)) {
            return Err(self.too_large());
        }
        let reading = std::pin::pin!(Limited::new(body, max).collect());
        match tokio::time::timeout(REQUEST_TIME_MAX, reading).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(self.too_large()),
            Ok(Err(_)) => Err(refuse(StatusCode::BAD_REQUEST, "the body broke off")),
            Err(_) => Err(refuse(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
        }
    }

    /// The body without its compression; `None` when it has none.
    fn plain(&self, headers: &HeaderMap, body: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
        let max = self.body_bytes_max();
        if body.len() > max {
            return Err(self.too_large());
        }
        let encoding = headers.get(CONTENT_ENCODING).map_or(&b""[..], HeaderValue::as_bytes).trim_ascii();
        if encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity") {
            return Ok(None);
        }
        if !encoding.eq_ignore_ascii_case(b"gzip") {
            let message = "the content-encoding is not known here; send gzip or none";
            return Err(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let mut plain = Vec::new();
        let bound = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
        let read = MultiGzDecoder::new(body).take(bound).read_to_end(&mut plain);
        read.map_err(|_| refuse(StatusCode::BAD_REQUEST, "the body is not valid gzip"))?;
        if plain.len() > max { Err(self.too_large()) } else { Ok(Some(plain)) }
    }

    fn too_large(&self) -> Refusal {
        let message = format!("the body is larger than {} bytes; send smaller batches", self.body_bytes_max());
        refuse(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    fn refusal(&self, encoding: Encoding, refusal: &Refusal) -> Response<Full<Bytes>> {
        self.refused();
        let Refusal { status, message } = refusal;
        tracing::debug!(status = status.as_u16(), message, "spans refused");
        let body = match encoding {
            Encoding::Protobuf => Status { message: message.clone() }.encode_to_vec(),
            Encoding::Json => serde_json::json!({ "message": message }).to_string().into_bytes(),
        };
        let mut response = response(*status, encoding, body);
        let headers = response.headers_mut();
        match *status {
            StatusCode::UNAUTHORIZED => headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            StatusCode::METHOD_NOT_ALLOWED => headers.insert(ALLOW, HeaderValue::from_static("POST")),
            StatusCode::SERVICE_UNAVAILABLE => headers.insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS)),
            _ => None,
        };
        response
    }
}

fn encoding(headers: &HeaderMap) -> Result<Encoding, Refusal> {
    let value = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let kind = value.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
    match kind.as_slice() {
        b"application/x-protobuf" | b"application/protobuf" => Ok(Encoding::Protobuf),
        b"application/json" => Ok(Encoding::Json),
        _ => {
            let message = "the content-type is not OTLP's; send application/x-protobuf or application/json";
            Err(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

/// Decoding errors say where and what kind, never what stood there: it may be a prompt.
fn decode(encoding: Encoding, body: &[u8]) -> Result<ExportTraceServiceRequest, Refusal> {
    let wrong = |what: String| refuse(StatusCode::BAD_REQUEST, what);
    match encoding {
        Encoding::Protobuf => {
            ExportTraceServiceRequest::decode(body).map_err(|_| wrong("the body is not an OTLP trace request".into()))
        }
        // A body of nothing is protobuf's empty message, and some senders mean the same in JSON.
        Encoding::Json if body.is_empty() => Ok(ExportTraceServiceRequest::default()),
        Encoding::Json => json::read(body).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            wrong(format!("the body is not an OTLP trace request in JSON (line {line}, column {column})"))
        }),
    }
}

fn success(encoding: Encoding, complaint: Option<(i64, String)>) -> Vec<u8> {
    match encoding {
        Encoding::Protobuf => export_response(complaint).encode_to_vec(),
        Encoding::Json => match complaint {
            None => b"{}".to_vec(),
            Some((rejected, message)) => {
                let partial = serde_json::json!({"rejectedSpans": rejected.to_string(), "errorMessage": message});
                serde_json::json!({ "partialSuccess": partial }).to_string().into_bytes()
            }
        },
    }
}

/// The answer to a request that was taken.
pub(super) fn export_response(complaint: Option<(i64, String)>) -> ExportTraceServiceResponse {
    let partial_success =
        complaint.map(|(rejected_spans, error_message)| ExportTracePartialSuccess { rejected_spans, error_message });
    ExportTraceServiceResponse { partial_success }
}

fn response(status: StatusCode, encoding: Encoding, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = match encoding {
        Encoding::Protobuf => "application/x-protobuf",
        Encoding::Json => "application/json",
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
