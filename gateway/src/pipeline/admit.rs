//! Whether a request may run. Every surface comes through here, pass-through included, so that a rule holds on all of them.
//!
//! Today a key's scopes decide. Limits (429) and budget holds (402) join here: they need what is at hand,
//! the key, the model, the counted input and the most output that was asked for.

use http::{Method, StatusCode};

use crate::keys::KeyRecord;
use crate::refusal::Refusal;
use crate::surface::Inspected;

/// Proof that a request was let through. Budget holds will be carried by it, and freed with it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admitted {
    /// Microseconds after the request was received.
    pub at_us: u64,
}

pub(crate) fn admit(
    key: Option<&KeyRecord>,
    method: &Method,
    path: &str,
    request: &Inspected,
    now_us: u64,
) -> Result<Admitted, Refusal> {
    let admitted = Admitted { at_us: now_us };
    let Some(key) = key else { return Ok(admitted) };
    let refuse = |message: &str| Err(Refusal::new(StatusCode::FORBIDDEN, message));
    let path = path.split('?').next().unwrap_or(path);
    if !key.allows_route(path) {
        return refuse("the Farthing key may not call this path");
    }
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    match &request.model {
        Some(model) if !key.allows_model(model) => refuse("the Farthing key may not use this model"),
        // A scope that cannot be checked is not met: otherwise pass-through would be the way around it.
        None if !key.models.is_empty() && !reads => {
            refuse("the Farthing key is limited to models, and this request names none")
        }
        _ => Ok(admitted),
    }
}

#[cfg(test)]
mod tests {
    use ledger::{KeyId, Timestamp};

    use super::*;
    use crate::keys::mint;
    use crate::surface;

    #[test]
    fn scopes_hold_on_every_surface() {
        let mut key = KeyRecord::new(KeyId::new(Timestamp::from_micros(0), [1; 10]), mint([1; 32], &[0; 32]).1);
        key.models = vec!["gpt-4o".into()];
        key.routes = vec!["/v1/*".into()];
        let ask = |method: Method, path: &str, body: &str| {
            let request = surface::inspect(&method, path, Some("application/json"), body.as_bytes());
            admit(Some(&key), &method, path, &request, 0).is_ok()
        };
        let of = |model: &str| format!(r#"{{"model":"{model}","messages":[],"input":"x","max_tokens":1}}"#);
        for path in ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"] {
            assert!(ask(Method::POST, path, &of("gpt-4o")), "{path}");
            assert!(!ask(Method::POST, path, &of("gpt-5")), "{path}");
        }
        assert!(ask(Method::GET, "/v1/models?x=1", ""));
        assert!(!ask(Method::POST, "/v1/anything", ""), "no model to check");
        assert!(!ask(Method::GET, "/other", ""), "not a route of the key");
    }
}
