//! What an API call answers when it cannot: one shape, whatever went wrong.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use store::StoreError;
use utoipa::ToSchema;

/// The answer to a call that failed.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For programs: `bad_request`, `unauthorized`, `forbidden`, `not_found`, `timed_out` or `unavailable`.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

/// An error of a call.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    /// The caller asked for something that makes no sense.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError { status: StatusCode::BAD_REQUEST, code: "bad_request", message: message.into() }
    }

    /// The token is missing or wrong.
    pub fn unauthorized() -> ApiError {
        let message = "send the admin token as `Authorization: Bearer TOKEN`".to_owned();
        ApiError { status: StatusCode::UNAUTHORIZED, code: "unauthorized", message }
    }

    /// The caller is somewhere it may not call from.
    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError { status: StatusCode::FORBIDDEN, code: "forbidden", message: message.into() }
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError { status: StatusCode::NOT_FOUND, code: "not_found", message: message.into() }
    }

    /// It cannot be done now.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError { status: StatusCode::SERVICE_UNAVAILABLE, code: "unavailable", message: message.into() }
    }

    /// It took too long.
    pub fn timed_out() -> ApiError {
        let message = "the answer took too long; ask for less".to_owned();
        ApiError { status: StatusCode::GATEWAY_TIMEOUT, code: "timed_out", message }
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> ApiError {
        match error.downcast::<StoreError>() {
            Ok(error) => error.into(),
            Err(error) => {
                tracing::error!("API: {error:#}");
                ApiError {
                    status: StatusCode::INTERNAL_SERVER_ERROR,
                    code: "unavailable",
                    message: format!("{error:#}"),
                }
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> ApiError {
        match error {
            StoreError::Sql(message) => ApiError::bad_request(message),
            other => {
                tracing::error!("API: {other}");
                ApiError { status: StatusCode::SERVICE_UNAVAILABLE, code: "unavailable", message: other.to_string() }
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = Json(ErrorBody { error: ErrorDetail { code: self.code, message: self.message } });
        let mut response = (self.status, body).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        response
    }
}
