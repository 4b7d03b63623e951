//! Query parameters of the API.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use ledger::{Period, Timestamp};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::{IntoParams, ToSchema};

use super::ApiError;

/// Query parameters; what is wrong with them is answered in the API's own shape.
#[derive(Debug, Clone)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query.map(|query| Query(query.0)).map_err(|error| {
            // The reader's own preamble and its repetition of the name say nothing to whoever made the mistake.
            let text = error.body_text();
            let text = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
            let text = text.find("unknown field").map_or(text, |at| &text[at..]);
            ApiError::bad_request(text.replace("unknown field", "unknown parameter"))
        })
    }
}

/// The time that is asked about.
#[derive(Debug, Clone, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The first moment inside: `2026-11-01` or RFC 3339. From the beginning when absent.
    pub from: Option<String>,
    /// The first moment outside. To the end when absent.
    pub to: Option<String>,
}

/// How a report is grouped.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Grouping {
    /// Dimensions with commas between: team, consumer, application, cost_centre, customer, feature, task, environment,
    /// provider, model, pool, deployment, day, hour, line.
    #[serde(default = "team_and_model")]
    #[param(default = "team,model")]
    pub by: String,
    /// The first moment inside: `2026-11-01` or RFC 3339. From the beginning when absent.
    pub from: Option<String>,
    /// The first moment outside. To the end when absent.
    pub to: Option<String>,
}

fn team_and_model() -> String {
    "team,model".to_owned()
}

/// Which rows are listed.
#[derive(Debug, Clone, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Listing {
    /// The first moment inside: `2026-11-01` or RFC 3339. From the beginning when absent.
    pub from: Option<String>,
    /// The first moment outside. To the end when absent.
    pub to: Option<String>,
    /// At most so many rows, the newest first: 1 to 1000.
    #[param(default = 100, minimum = 1, maximum = 1000)]
    pub limit: Option<u16>,
    /// Only rows of this team.
    pub team: Option<String>,
    /// Only rows of this model.
    pub model: Option<String>,
}

/// Which prices are asked for.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct PriceOf {
    /// The model.
    pub model: String,
    /// Whose model it is.
    #[serde(default = "openai")]
    #[param(default = "openai")]
    pub provider: String,
    /// The time at which the prices hold; now when absent.
    pub at: Option<String>,
}

fn openai() -> String {
    "openai".to_owned()
}

/// A query.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlQuery {
    /// A `SELECT` over attempts, postings, capacity and gaps.
    pub query: String,
}

/// Reads both ends of a span.
///
/// # Errors
/// When one is no time, or nothing lies between them.
pub fn period(from: Option<&str>, to: Option<&str>) -> Result<Period, ApiError> {
    let read = |text: Option<&str>| -> Result<Option<Timestamp>, ApiError> {
        text.filter(|text| !text.is_empty()).map(|text| text.parse().map_err(ApiError::bad_request)).transpose()
    };
    let (from, to) = (read(from)?, read(to)?);
    crate::cli::Span { from, to }.period().map_err(ApiError::bad_request)
}
