//! Edits a request in place: the model's name and the request for a usage chunk, and no other byte.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use ledger::Operation;

use crate::keys::contains_key;
use crate::surface::{Inspected, ModelPlace, percent_decoded, tidy_path};

/// A request as an upstream gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Path and query.
    pub path_and_query: String,
    /// The body: the client's own bytes, or a copy with the edits.
    pub body: Bytes,
    /// Whether we asked for a usage chunk that the client did not: it must not see it.
    pub hide_usage_chunk: bool,
}

/// Path and query without any `key=…`, the credential that Gemini clients may put there.
#[must_use]
pub fn without_query_key(path_and_query: &str) -> Cow<'_, str> {
    without_pairs(path_and_query, |pair| percent_decoded(pair).starts_with("key="))
}

pub(super) fn prepare(request: &Inspected, path_and_query: &str, body: Bytes, model: Option<&str>) -> Prepared {
    // A key of ours in the query is for us alone, whatever credential goes upstream.
    let path = without_pairs(path_and_query, |pair| {
        pair.starts_with("key=fk-") || contains_key(percent_decoded(pair).as_bytes())
    });
    // Duplicate slashes come from base URLs that end in one; upstreams do not forgive them.
    let path = if request.operation == Operation::Other { path.into_owned() } else { tidy_path(&path) };
    let mut edits: Vec<(Range<usize>, Cow<'_, str>)> = Vec::new();
    let mut prepared = Prepared { path_and_query: path, body, hide_usage_chunk: false };
    if let Some((place, text)) = &request.places.usage_chunk {
        edits.push((place.clone(), Cow::Borrowed(text)));
        prepared.hide_usage_chunk = true;
    }
    if let Some(model) = model.filter(|&model| request.model.as_deref() != Some(model)) {
        match &request.places.model {
            ModelPlace::Nowhere => {}
            ModelPlace::Path => prepared.path_and_query = with_model(&prepared.path_and_query, model),
            ModelPlace::Json(place) => {
                edits.push((place.clone(), Cow::Owned(serde_json::Value::from(model).to_string())))
            }
            ModelPlace::Form(place) => edits.push((place.clone(), Cow::Borrowed(model))),
        }
    }
    prepared.body = edited(prepared.body, edits);
    prepared
}

/// The body with each range replaced. Ranges do not overlap: they are different members of one object.
fn edited(body: Bytes, mut edits: Vec<(Range<usize>, Cow<'_, str>)>) -> Bytes {
    if edits.is_empty() {
        return body;
    }
    edits.sort_by_key(|(place, _)| place.start);
    let added: usize = edits.iter().map(|(_, text)| text.len()).sum();
    let mut out = BytesMut::with_capacity(body.len() + added);
    let mut copied = 0;
    for (place, text) in &edits {
        out.extend_from_slice(body.get(copied..place.start).unwrap_or_default());
        out.extend_from_slice(text.as_bytes());
        copied = place.end;
    }
    out.extend_from_slice(body.get(copied..).unwrap_or_default());
    out.freeze()
}

/// `…/models/{model}:method` with another model.
fn with_model(path_and_query: &str, model: &str) -> String {
    let (path, query) = path_and_query.split_at(path_and_query.find('?').unwrap_or(path_and_query.len()));
    let start = ["/models/", "/tunedModels/"].iter().find_map(|folder| Some(path.find(folder)? + folder.len()));
    let end = path.rfind(':').or_else(|| path.rfind("%3A")).or_else(|| path.rfind("%3a"));
    match (start, end) {
        (Some(start), Some(end)) if start <= end => {
            format!(
                "{}{}{}{query}",
                path.get(..start).unwrap_or_default(),
                escaped(model),
                path.get(end..).unwrap_or_default()
            )
        }
        _ => path_and_query.to_owned(),
    }
}

/// A name as one path segment.
fn escaped(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn without_pairs(path_and_query: &str, drop: impl Fn(&str) -> bool) -> Cow<'_, str> {
    let Some((path, query)) = path_and_query.split_once('?') else { return Cow::Borrowed(path_and_query) };
    if !query.split('&').any(&drop) {
        return Cow::Borrowed(path_and_query);
    }
    let kept: Vec<&str> = query.split('&').filter(|pair| !drop(pair)).collect();
    Cow::Owned(if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) })
}
