//! Who a request is booked on: what its key says, and what the key's holder may add.
//!
//! Order of precedence for a dimension that the key's holder may set: `x-farthing-*` header, `farthing.*` member of
//! W3C baggage, the request's body (`user`, `metadata`), the key's own value. What may not be set is left out.

use std::borrow::Cow;
use std::collections::BTreeMap;

use http::HeaderMap;
use ledger::context::LABEL_BYTES_MAX;
use ledger::{Context, ContextField, Label};

use crate::keys::KeyRecord;

/// Every header of ours starts with this and none of them reaches an upstream.
pub const PRIVATE_PREFIX: &str = "x-farthing-";
/// What members of W3C baggage that are meant for us start with.
pub const BAGGAGE_PREFIX: &str = "farthing.";
/// Most tags of one request that are kept.
pub const TAGS_MAX: usize = 16;

/// What the body says about the end user, as [`crate::surface::inspect`] found it.
#[derive(Debug, Clone, Copy)]
pub struct BodySays<'a> {
    /// OpenAI `safety_identifier` or `user`, Anthropic `metadata.user_id`.
    pub end_user: Option<&'a str>,
    /// OpenAI `metadata`.
    pub metadata: &'a BTreeMap<String, String>,
}

/// The context of a request. Without a key everything may be set, because nobody is there to forbid it.
#[must_use]
pub fn attribute(key: Option<&KeyRecord>, headers: &HeaderMap, body: BodySays<'_>) -> Context {
    let mut context = key.map(of_key).unwrap_or_default();
    let may_set = |field| key.is_none_or(|key| key.may_set.contains(&field));
    (context.trace_id, context.span_id) = trace(headers);
    if may_set(ContextField::Customer) {
        context.customer = body.end_user.and_then(label);
    }
    if may_set(ContextField::Tags) {
        let tags = body.metadata.iter().filter_map(|(name, value)| Some((label(name)?, label(value)?)));
        context.tags = tags.take(TAGS_MAX).collect();
    }
    for value in headers.get_all("baggage") {
        for (name, value) in members(&String::from_utf8_lossy(value.as_bytes())) {
            let field = name.strip_prefix(BAGGAGE_PREFIX).and_then(field);
            if let Some(field) = field.filter(|&field| may_set(field)) {
                set(&mut context, field, &unescape(value));
            }
        }
    }
    for (name, value) in headers {
        let Some(field) = name.as_str().strip_prefix(PRIVATE_PREFIX).and_then(field) else { continue };
        if may_set(field) {
            set(&mut context, field, &String::from_utf8_lossy(value.as_bytes()));
        }
    }
    context
}

fn of_key(key: &KeyRecord) -> Context {
    Context {
        consumer: key.consumer.clone(),
        key_id: Some(key.id),
        application: key.application.clone(),
        team: key.team.clone(),
        cost_centre: key.cost_centre.clone(),
        environment: key.environment.clone(),
        ..Context::default()
    }
}

fn field(name: &str) -> Option<ContextField> {
    ContextField::ALL.into_iter().find(|field| field.name() == name)
}

fn set(context: &mut Context, field: ContextField, value: &str) {
    let Some(text) = label(value) else { return };
    match field {
        ContextField::Application => context.application = Some(text),
        ContextField::Feature => context.feature = Some(text),
        ContextField::Customer => context.customer = Some(text),
        ContextField::Session => context.session = Some(text),
        ContextField::Task => context.task = Some(text),
        ContextField::Environment => context.environment = Some(text),
        ContextField::Tags => add_tags(&mut context.tags, value),
    }
}

/// `name=value` pairs between commas.
fn add_tags(tags: &mut BTreeMap<Label, Label>, text: &str) {
    for (name, value) in members(text) {
        let (Some(name), Some(value)) = (label(name), label(value)) else { continue };
        if tags.len() < TAGS_MAX || tags.contains_key(&name) {
            tags.insert(name, value);
        }
    }
}

fn members(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(',').filter_map(|member| {
        let (name, value) = member.split(';').next()?.split_once('=')?;
        Some((name.trim(), value.trim()))
    })
}

/// A label of at most [`LABEL_BYTES_MAX`] bytes, cut at a character. `None` when nothing is left of it.
#[must_use]
pub fn label(text: &str) -> Option<Label> {
    let text = text.trim();
    let mut end = text.len().min(LABEL_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // A label is shown in terminals and tables; what would move the cursor there is no part of a name.
    (end > 0).then(|| text[..end].replace(char::is_control, " ").into())
}

/// Trace and span id of a W3C `traceparent`, when it is one.
fn trace(headers: &HeaderMap) -> (Option<Label>, Option<Label>) {
    let Some(text) = headers.get("traceparent").and_then(|value| value.to_str().ok()) else { return (None, None) };
    let mut parts = text.trim().split('-').skip(1);
    let id = |part: Option<&str>, digits: usize| {
        let part = part.filter(|part| part.len() == digits && part.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        part.bytes().any(|byte| byte != b'0').then(|| Label::from(part))
    };
    let (trace_id, span_id) = (id(parts.next(), 32), id(parts.next(), 16));
    if trace_id.is_some() { (trace_id, span_id) } else { (None, None) }
}

/// Undoes percent encoding, as W3C baggage asks; what is not valid stays as it is.
fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let decoded = tail.get(..2).filter(|_| byte == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match decoded.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => (bytes.push(decoded), rest = &tail[2..]),
            None => (bytes.push(byte), rest = tail),
        };
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use ledger::{KeyId, Timestamp};

    use super::*;
    use crate::keys::mint;

    const NOTHING: BodySays<'static> = BodySays { end_user: None, metadata: &BTreeMap::new() };

    fn key(may_set: &[ContextField]) -> KeyRecord {
        let mut key = KeyRecord::new(KeyId::new(Timestamp::from_micros(0), [1; 10]), mint([1; 32], &[0; 32]).1);
        key.consumer = Some("ada".into());
        key.team = Some("search".into());
        key.application = Some("bot".into());
        key.may_set = may_set.to_vec();
        key
    }

    fn headers(pairs: &[(&'static str, &[u8])]) -> HeaderMap {
        let pair = |&(name, value): &(&'static str, &[u8])| {
            (HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn only_what_the_key_allows_can_be_set() {
        let key = key(&[ContextField::Feature]);
        let sent = headers(&[
            ("x-farthing-feature", b"summary"),
            ("x-farthing-application", b"other"),
            ("x-farthing-team", b"x"),
        ]);
        let metadata = BTreeMap::from([("a".into(), "b".into())]);
        let body = BodySays { end_user: Some("u1"), metadata: &metadata };
        let context = attribute(Some(&key), &sent, body);
        assert_eq!(context.feature.as_deref(), Some("summary"));
        assert_eq!(context.application.as_deref(), Some("bot"));
        assert_eq!(context.team.as_deref(), Some("search"));
        assert!(context.customer.is_none() && context.tags.is_empty());
    }

    #[test]
    fn headers_win_over_baggage_and_baggage_over_the_body() {
        let key = key(&ContextField::ALL);
        let sent = headers(&[
            ("x-farthing-tags", b"tier=gold, region = eu"),
            ("x-farthing-session", b"s-header"),
            ("baggage", b"farthing.session=s-baggage,farthing.customer=a%20b;p=1,other=1"),
        ]);
        let metadata = BTreeMap::from([("tier".into(), "free".into()), ("run".into(), "7".into())]);
        let body = BodySays { end_user: Some("u1"), metadata: &metadata };
        let context = attribute(Some(&key), &sent, body);
        assert_eq!(context.session.as_deref(), Some("s-header"));
        assert_eq!(context.customer.as_deref(), Some("a b"));
        let tags: Vec<_> = context.tags.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(tags, ["region=eu", "run=7", "tier=gold"]);
    }

    #[test]
    fn labels_are_bounded_and_never_split_a_character() {
        let long = "é".repeat(LABEL_BYTES_MAX);
        let sent = headers(&[
            ("x-farthing-feature", long.as_bytes()),
            ("x-farthing-task", b"\xff\xfe"),
            ("x-farthing-session", b"  "),
            ("baggage", b"farthing.customer=a%1b[31mb"),
        ]);
        let context = attribute(None, &sent, NOTHING);
        assert_eq!(context.customer.as_deref(), Some("a [31mb"));
        assert_eq!(context.feature.map(|text| text.len()), Some(LABEL_BYTES_MAX));
        assert_eq!(context.task.as_deref(), Some("\u{fffd}\u{fffd}"));
        assert_eq!(context.session, None);
        let many: String = (0..100).map(|n| format!("t{n}=v,")).collect();
        let sent = headers(&[("x-farthing-tags", many.as_bytes())]);
        assert_eq!(attribute(None, &sent, NOTHING).tags.len(), TAGS_MAX);
    }

    #[test]
    fn a_traceparent_is_taken_only_when_it_is_one() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let of = |text: &str| trace(&headers(&[("traceparent", text.as_bytes())]));
        assert_eq!(of(good).0.as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        assert_eq!(of(good).1.as_deref(), Some("00f067aa0ba902b7"));
        for bad in ["", "00-xyz-00f067aa0ba902b7-01", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "a-b"]
        {
            assert_eq!(of(bad), (None, None), "{bad}");
        }
    }
}
