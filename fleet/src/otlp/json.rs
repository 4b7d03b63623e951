//! OTLP's JSON form: protobuf's, but ids in hex, enumerations as numbers, 64-bit numbers as text or numbers, and whatever is
//! unknown skipped.
//!
//! The generated messages can be read with serde as well, but refuse what protobuf's JSON leaves out, such as the values of
//! an empty list, and with it the whole request.

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{self as proto, Status};
use serde::{Deserialize, Deserializer, de};

/// Reads a request. Lists, maps and bytes among the attributes are left out: nothing that is kept is one.
pub(super) fn read(body: &[u8]) -> Result<ExportTraceServiceRequest, serde_json::Error> {
    let request: Request = serde_json::from_slice(body)?;
    Ok(ExportTraceServiceRequest { resource_spans: request.resource_spans.into_iter().map(Into::into).collect() })
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Request {
    #[serde(deserialize_with = "or_default")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ResourceSpans {
    #[serde(deserialize_with = "or_default")]
    resource: Attributed,
    #[serde(deserialize_with = "or_default")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Attributed {
    #[serde(deserialize_with = "or_default")]
    attributes: Vec<Pair>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ScopeSpans {
    #[serde(deserialize_with = "or_default")]
    spans: Vec<Span>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Span {
    trace_id: Hex,
    span_id: Hex,
    parent_span_id: Hex,
    #[serde(deserialize_with = "or_default")]
    kind: i32,
    start_time_unix_nano: Number,
    end_time_unix_nano: Number,
    #[serde(deserialize_with = "or_default")]
    attributes: Vec<Pair>,
    #[serde(deserialize_with = "or_default")]
    status: Code,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Code {
    #[serde(deserialize_with = "or_default")]
    code: i32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Pair {
    #[serde(deserialize_with = "or_default")]
    key: String,
    #[serde(deserialize_with = "or_default")]
    value: Any,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Any {
    string_value: Option<String>,
    bool_value: Option<bool>,
    int_value: Option<Signed>,
    double_value: Option<Real>,
}

/// `null` is the same as nothing.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(source: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(source)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Loose<N> {
    Number(N),
    Text(String),
}

impl<N: std::str::FromStr> Loose<N> {
    fn number<E: de::Error>(self) -> Result<N, E> {
        match self {
            Loose::Number(number) => Ok(number),
            Loose::Text(text) => text.parse().map_err(|_| E::custom("a number was expected in a text")),
        }
    }
}

#[derive(Default)]
struct Number(u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Number, D::Error> {
        Option::<Loose<u64>>::deserialize(source)?.map_or(Ok(0), Loose::number).map(Number)
    }
}

struct Signed(i64);

impl<'de> Deserialize<'de> for Signed {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Signed, D::Error> {
        Loose::deserialize(source)?.number().map(Signed)
    }
}

/// Also `"NaN"` and `"Infinity"`, which JSON has no numbers for.
struct Real(f64);

impl<'de> Deserialize<'de> for Real {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Real, D::Error> {
        Loose::deserialize(source)?.number().map(Real)
    }
}

#[derive(Default)]
struct Hex(Vec<u8>);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Hex, D::Error> {
        let text = Option::<String>::deserialize(source)?.unwrap_or_default();
        let pairs = text.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2 && !pair.starts_with('+'))?;
            u8::from_str_radix(pair, 16).ok()
        });
        let bytes: Option<Vec<u8>> = pairs.collect();
        bytes.map(Hex).ok_or_else(|| de::Error::custom("an id is not hexadecimal"))
    }
}

impl From<ResourceSpans> for proto::ResourceSpans {
    fn from(group: ResourceSpans) -> proto::ResourceSpans {
        let spans = |scope: ScopeSpans| proto::ScopeSpans {
            spans: scope.spans.into_iter().map(Into::into).collect(),
            ..proto::ScopeSpans::default()
        };
        proto::ResourceSpans {
            resource: Some(Resource { attributes: pairs(group.resource.attributes), ..Resource::default() }),
            scope_spans: group.scope_spans.into_iter().map(spans).collect(),
            ..proto::ResourceSpans::default()
        }
    }
}

impl From<Span> for proto::Span {
    fn from(span: Span) -> proto::Span {
        proto::Span {
            trace_id: span.trace_id.0,
            span_id: span.span_id.0,
            parent_span_id: span.parent_span_id.0,
            kind: span.kind,
            start_time_unix_nano: span.start_time_unix_nano.0,
            end_time_unix_nano: span.end_time_unix_nano.0,
            attributes: pairs(span.attributes),
            status: Some(Status { code: span.status.code, ..Status::default() }),
            ..proto::Span::default()
        }
    }
}

fn pairs(pairs: Vec<Pair>) -> Vec<KeyValue> {
    let value = |value: Any| {
        let Any { string_value, bool_value, int_value, double_value } = value;
        string_value
            .map(any_value::Value::StringValue)
            .or(bool_value.map(any_value::Value::BoolValue))
            .or(int_value.map(|Signed(number)| any_value::Value::IntValue(number)))
            .or(double_value.map(|Real(number)| any_value::Value::DoubleValue(number)))
    };
    let pair = |pair: Pair| KeyValue {
        key: pair.key,
        value: Some(AnyValue { value: value(pair.value) }),
        ..KeyValue::default()
    };
    pairs.into_iter().map(pair).collect()
}
