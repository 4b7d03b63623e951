//! A tool of somebody's own that is told over HTTP.

use ::http::Method;
use serde::Deserialize;
use serde_json::json;

use super::http::{Said, Secret};
use super::{Actual, ActuateError, CALL_MAX, http};

/// Where it listens.
#[derive(Debug)]
pub(super) struct Webhook {
    url: String,
    token: Option<Secret>,
}

/// What it answers when it is asked.
#[derive(Debug, Deserialize)]
struct Standing {
    replicas: u32,
    #[serde(default)]
    ready: Option<u32>,
}

impl Webhook {
    pub fn new(url: &str, token: Option<Secret>) -> Webhook {
        Webhook { url: url.to_owned(), token }
    }

    pub async fn read(&self) -> Result<Actual, ActuateError> {
        let said = Said { token: self.token.as_ref(), ..Said::default() };
        understood(&self.url, &http::call(Method::GET, &self.url, said, CALL_MAX).await?)
    }

    pub async fn tell(&self, replicas: u32, key: &str) -> Result<(), ActuateError> {
        let body = json!({ "replicas": replicas, "key": key }).to_string();
        let said = Said { key: Some(key), token: self.token.as_ref(), body: Some(body) };
        http::call(Method::POST, &self.url, said, CALL_MAX).await.map(|_| ())
    }
}

/// What an answer says of replicas.
pub(super) fn understood(what: &str, answer: &[u8]) -> Result<Actual, ActuateError> {
    let said: Standing = serde_json::from_slice(answer).map_err(|error| ActuateError::Refused {
        what: what.to_owned(),
        cause: format!("its answer is not {{\"replicas\": 3}}: {error}"),
    })?;
    Ok(Actual { replicas: said.replicas, ready: said.ready, ..Actual::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_is_not_known() {
        let said = |text: &str| understood("hook", text.as_bytes());
        assert_eq!(said(r#"{"replicas": 3}"#).unwrap(), Actual { replicas: 3, ..Actual::default() });
        assert_eq!(said(r#"{"replicas": 3, "ready": 2, "more": 1}"#).unwrap().ready, Some(2));
        for wrong in ["", "3", r#"{"replicas": -1}"#, r#"{"ready": 1}"#] {
            assert!(said(wrong).is_err(), "{wrong}");
        }
    }
}
