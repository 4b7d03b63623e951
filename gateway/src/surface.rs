//! What a client asks for: the path, and the few fields of the body that routing and metering need.
//!
//! The body is looked at once; prompts are skipped over, never copied. What must be changed later (a model's name,
//! the request for a usage chunk) is remembered as a place in the body, so that every other byte can pass as it came.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use http::Method;
use ledger::context::LABEL_BYTES_MAX;
use ledger::{Operation, ServiceClass};
use memchr::memmem;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::provider::Kind;

/// Whose protocol a client speaks. It decides the shape of errors and which upstreams can answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// OpenAI's API, which most engines speak as well.
    OpenAi,
    /// Anthropic's API.
    Anthropic,
    /// Google's Gemini API.
    Gemini,
    /// A path that none of them is known to own.
    #[default]
    Unknown,
}

impl Dialect {
    /// The provider whose errors a client of this dialect understands.
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self {
            Dialect::OpenAi | Dialect::Unknown => Kind::OpenAi,
            Dialect::Anthropic => Kind::Anthropic,
            Dialect::Gemini => Kind::Gemini,
        }
    }
}

/// What a request says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspected {
    /// What is asked of the model.
    pub operation: Operation,
    /// Whose protocol the client speaks.
    pub dialect: Dialect,
    /// The model that the client names.
    pub model: Option<String>,
    /// Whether a streamed answer is asked for.
    pub streamed: bool,
    /// Whether the client itself asked for OpenAI's final usage chunk.
    pub usage_chunk_requested: bool,
    /// The class of service the client asked for; `None` leaves it to the provider.
    pub service_class_requested: Option<ServiceClass>,
    /// The most output tokens this request may produce, over all its choices, if the client set a bound.
    pub max_output_tokens: Option<u64>,
    /// The client's own user: OpenAI `user` or `safety_identifier`, Anthropic `metadata.user_id`.
    pub end_user: Option<String>,
    /// OpenAI `metadata`, at most [`METADATA_PAIRS_MAX`] pairs, keys and values cut to [`LABEL_BYTES_MAX`] bytes.
    pub metadata: BTreeMap<String, String>,
    /// Why the body cannot be what it claims to be. Such a request must not be sent on: an upstream may read it
    /// differently (a key that occurs twice, say) and so escape routes and limits. Never quotes the body.
    pub malformed: Option<String>,
    /// Whether this only reads or manages something stored, whose usage was booked when it was made.
    pub stored: bool,
    /// Where the body may have to be edited.
    pub(crate) places: Places,
}

/// Most pairs of OpenAI `metadata` that are kept; the API itself allows no more.
pub const METADATA_PAIRS_MAX: usize = 16;

/// Larger `metadata` objects are not looked at.
const METADATA_BYTES_MAX: usize = 64 * 1024;

/// Places in the original body, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// Where the model's name stands.
    pub model: ModelPlace,
    /// What to write where so that the upstream adds a usage chunk to its stream.
    pub usage_chunk: Option<(Range<usize>, &'static str)>,
}

/// Where a request names its model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum ModelPlace {
    /// Nowhere that we know.
    #[default]
    Nowhere,
    /// In the path, as Gemini does.
    Path,
    /// A JSON string of the body, quotes included.
    Json(Range<usize>),
    /// A field of a multipart form, bare.
    Form(Range<usize>),
}

/// Looks at a request. Never fails: what makes no sense is said in [`Inspected::malformed`].
#[must_use]
pub fn inspect(method: &Method, path_and_query: &str, content_type: Option<&str>, body: &[u8]) -> Inspected {
    let path = plain_path(path_and_query);
    let mut request = classify(method, &path);
    let content_type_as_sent = content_type.unwrap_or_default();
    let content_type = content_type_as_sent.to_ascii_lowercase();
    if content_type.starts_with("multipart/") {
        request.malformed = inspect_form(content_type_as_sent, body, &mut request).err();
        return request;
    }
    let body_expected = *method == Method::POST && request.operation != Operation::Other && !request.stored;
    let claims_json = content_type.contains("json") && !body.is_empty();
    if body_expected || claims_json {
        request.malformed = inspect_json(body, body_expected, &mut request).err();
    }
    request
}

/// The path with duplicate slashes removed and the query kept: what an upstream expects of a known operation.
#[must_use]
pub(crate) fn tidy_path(path_and_query: &str) -> String {
    let (path, query) =
        path_and_query.split_once('?').map_or((path_and_query, None), |(path, query)| (path, Some(query)));
    let mut tidy = String::with_capacity(path_and_query.len());
    for character in path.chars() {
        if character != '/' || !tidy.ends_with('/') {
            tidy.push(character);
        }
    }
    if let Some(query) = query {
        tidy.push('?');
        tidy.push_str(query);
    }
    tidy
}

/// The path alone, for comparing: no query, no duplicate or trailing slash, percent escapes undone.
fn plain_path(path_and_query: &str) -> String {
    let path = path_and_query.split(['?', '#']).next().unwrap_or_default();
    let decoded = percent_decoded(path);
    let mut plain = tidy_path(&decoded.replace('?', "%3F"));
    while plain.len() > 1 && plain.ends_with('/') {
        plain.pop();
    }
    plain
}

pub(crate) fn percent_decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escape = (first == b'%').then(|| tail.get(..2)).flatten();
        let byte =
            escape.and_then(|hex| std::str::from_utf8(hex).ok()).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { tail.get(2..).unwrap_or_default() } else { tail };
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

/// Operation, dialect and, for Gemini, the model and whether it streams: everything a path says.
fn classify(method: &Method, path: &str) -> Inspected {
    let reads =
        *method == Method::GET || *method == Method::HEAD || *method == Method::DELETE || *method == Method::OPTIONS;
    // Google serves OpenAI's protocol below a path of its own; only a Gemini upstream can answer there.
    let compatible = path.strip_prefix("/v1beta/openai").map(|rest| format!("/v1{rest}"));
    let mut request = gemini_path(path).unwrap_or_else(|| {
        let (dialect, operation, stored) = plain_surface(compatible.as_deref().unwrap_or(path));
        let dialect = if compatible.is_some() { Dialect::Gemini } else { dialect };
        Inspected { dialect, operation, stored, ..Inspected::default() }
    });
    if reads && request.operation != Operation::Models {
        request = Inspected { operation: Operation::Other, stored: true, streamed: false, ..request };
    }
    request
}

/// OpenAI's and Anthropic's paths: dialect, operation, and whether the path manages something stored.
fn plain_surface(path: &str) -> (Dialect, Operation, bool) {
    use Dialect::{Anthropic, Gemini, OpenAi, Unknown};
    match path {
        "/v1/chat/completions" => (OpenAi, Operation::Chat, false),
        "/v1/completions" => (OpenAi, Operation::Completions, false),
        "/v1/responses" => (OpenAi, Operation::Responses, false),
        "/v1/responses/input_tokens" => (OpenAi, Operation::CountTokens, false),
        "/v1/responses/compact" => (OpenAi, Operation::Other, false),
        "/v1/embeddings" => (OpenAi, Operation::Embeddings, false),
        "/v1/models" => (OpenAi, Operation::Models, false),
        "/v1/messages" => (Anthropic, Operation::Messages, false),
        "/v1/messages/count_tokens" => (Anthropic, Operation::CountTokens, false),
        "/v1beta/models" | "/v1alpha/models" => (Gemini, Operation::Models, false),
        _ if path.starts_with("/v1/models/") => (OpenAi, Operation::Models, false),
        _ if path.starts_with("/v1beta/models/") => (Gemini, Operation::Models, false),
        _ if path.starts_with("/v1/chat/completions/") || path.starts_with("/v1/responses/") => {
            (OpenAi, Operation::Other, true)
        }
        _ if path.starts_with("/v1/messages/batches") => (Anthropic, Operation::Other, true),
        _ if ["/v1/images", "/v1/audio", "/v1/batches", "/v1/moderations"].iter().any(|own| path.starts_with(own)) => {
            (OpenAi, Operation::Other, path.starts_with("/v1/batches"))
        }
        _ if path.starts_with("/v1beta/") || path.starts_with("/v1alpha/") => (Gemini, Operation::Other, false),
        _ => (Unknown, Operation::Other, false),
    }
}

/// `/{version}/[…/](models|tunedModels)/{model}:{method}`.
fn gemini_path(path: &str) -> Option<Inspected> {
    let place = ["/models/", "/tunedModels/"].iter().find_map(|folder| Some(path.find(folder)? + folder.len()))?;
    let (model, method) = path.get(place..)?.rsplit_once(':')?;
    let operation = match method {
        "generateContent" | "streamGenerateContent" => Operation::Generate,
        "countTokens" => Operation::CountTokens,
        "embedContent" | "batchEmbedContents" => Operation::Embeddings,
        "predict" | "predictLongRunning" | "asyncBatchEmbedContent" | "batchGenerateContent" => Operation::Other,
        // A fine-tuned OpenAI model has colons in its name too: `/v1/models/ft:gpt-4o:org`.
        _ => return None,
    };
    Some(Inspected {
        operation,
        dialect: Dialect::Gemini,
        model: Some(cut(model)),
        streamed: method == "streamGenerateContent",
        places: Places { model: ModelPlace::Path, usage_chunk: None },
        ..Inspected::default()
    })
}

/// Declares the fields that are read, and how one object is read into them.
macro_rules! fields {
    ($($field:ident: $name:literal $(| $alias:literal)?),* $(,)?) => {
        /// The fields we read, each as it stands in the body. Everything else is skipped.
        #[derive(Default)]
        struct Fields<'a> {
            $($field: Option<&'a RawValue>,)*
            /// A name of ours in another spelling of the same letters: some upstreams take it for ours, and we do not.
            misspelt: Option<&'static str>,
        }

        impl Fields<'_> {
            const NAMES: &'static [&'static str] = &[$($name, $($alias,)?)*];
        }

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                while let Some(Key(key)) = members.next_key()? {
                    match key.as_ref() {
                        $($name $(| $alias)? => {
                            let raw: &RawValue = members.next_value()?;
                            if fields.$field.replace(raw).is_some() {
                                return Err(serde::de::Error::duplicate_field($name));
                            }
                        })*
                        other => {
                            // The model decides most; another field must not hide that it is misspelt.
                            let found = Fields::NAMES.iter().find(|name| reads_as(other, name)).copied();
                            fields.misspelt = fields.misspelt.filter(|&name| name == MODEL).or(found).or(fields.misspelt);
                            members.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(fields)
            }
        }
    };
}

const MODEL: &str = "model";

fields! {
    model: "model",
    stream: "stream",
    stream_options: "stream_options",
    service_tier: "service_tier",
    gemini_service_tier: "serviceTier",
    speed: "speed",
    max_tokens: "max_tokens",
    max_completion_tokens: "max_completion_tokens",
    max_output_tokens: "max_output_tokens",
    n: "n",
    best_of: "best_of",
    generation_config: "generationConfig" | "generation_config",
    user: "user",
    safety_identifier: "safety_identifier",
    metadata: "metadata",
}

struct FieldsVisitor;

/// A key, borrowed unless it has escapes in it.
#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Fields<'de>, D::Error> {
        source.deserialize_map(FieldsVisitor)
    }
}

/// Whether a reader that does not look at case, as Go's does not, takes `key` for `name`.
fn reads_as(key: &str, name: &str) -> bool {
    let folded =
        |text: &'_ str| text.chars().flat_map(char::to_lowercase).flat_map(char::to_uppercase).collect::<String>();
    // Another case changes a text's length by little: U+017F for `s` and U+212A for `k` are the longest.
    key.len() <= name.len() * 3 && folded(key) == folded(name)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamOptions<'a> {
    #[serde(borrow, deserialize_with = "present")]
    include_usage: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct GenerationConfig<'a> {
    #[serde(borrow, rename = "maxOutputTokens", alias = "max_output_tokens")]
    max_output_tokens: Option<&'a RawValue>,
    #[serde(borrow, rename = "candidateCount", alias = "candidate_count")]
    candidate_count: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AnthropicMetadata<'a> {
    #[serde(borrow)]
    user_id: Option<&'a RawValue>,
}

fn inspect_json(body: &[u8], object_expected: bool, request: &mut Inspected) -> Result<(), String> {
    let text = std::str::from_utf8(body).map_err(|_| "the body is not valid UTF-8".to_owned())?;
    let opening = text.find(|character: char| !character.is_ascii_whitespace());
    match opening.and_then(|at| text.as_bytes().get(at)) {
        None => return Err("the body is empty where JSON is expected".to_owned()),
        Some(b'{') => {}
        Some(_) => {
            serde_json::from_str::<IgnoredAny>(text).map_err(|error| not_json(&error))?;
            return if object_expected { Err("the body is JSON but not an object".to_owned()) } else { Ok(()) };
        }
    }
    let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| not_json(&error))?;
    if let Some(name) = fields.misspelt
        && (name == MODEL || request.operation != Operation::Other)
    {
        return Err(format!("the field `{name}` is there in another case, which upstreams read differently"));
    }
    if request.model.is_none() {
        request.model = fields.model.and_then(string).map(|model| cut(&model));
        request.places.model = match (fields.model, &request.model) {
            (Some(raw), Some(_)) => ModelPlace::Json(place_of(text, raw.get())),
            _ => ModelPlace::Nowhere,
        };
    }
    request.streamed |= fields.stream.is_some_and(|raw| raw.get() == "true");
    if request.streamed && matches!(request.operation, Operation::Chat | Operation::Completions) {
        let after_brace = opening.unwrap_or_default() + 1;
        (request.usage_chunk_requested, request.places.usage_chunk) =
            usage_chunk(text, after_brace, fields.stream_options);
    }
    request.service_class_requested = service_class(&fields);
    request.max_output_tokens = max_output_tokens(&fields);
    if request.dialect == Dialect::Anthropic {
        let metadata: AnthropicMetadata<'_> = fields.metadata.and_then(object).unwrap_or_default();
        request.end_user = metadata.user_id.and_then(string).map(|user| cut(&user));
    } else {
        request.end_user =
            fields.user.and_then(string).or_else(|| fields.safety_identifier.and_then(string)).map(|user| cut(&user));
        request.metadata = fields.metadata.map(metadata).unwrap_or_default();
    }
    Ok(())
}

/// Serde's messages here name our own fields and positions, never the body's content.
fn not_json(error: &serde_json::Error) -> String {
    format!("the body is not valid JSON: {error}")
}

/// Whether the client asked for the usage chunk, and the edit that asks in its stead.
fn usage_chunk(
    text: &str,
    after_brace: usize,
    stream_options: Option<&RawValue>,
) -> (bool, Option<(Range<usize>, &'static str)>) {
    let Some(raw) = stream_options else {
        return (false, Some((after_brace..after_brace, ASK_WHOLE)));
    };
    if raw.get() == "null" {
        return (false, Some((place_of(text, raw.get()), "{\"include_usage\":true}")));
    }
    let Some(options) = object::<StreamOptions<'_>>(raw) else {
        // Not an object: the upstream will refuse it, as it should.
        return (false, None);
    };
    let place = place_of(text, raw.get());
    let inside = place.start + 1;
    match options.include_usage {
        Some(asked) if asked.get() == "true" => (true, None),
        Some(asked) => (false, Some((place_of(text, asked.get()), "true"))),
        None if raw.get().trim_start_matches('{').trim_start().starts_with('}') => {
            (false, Some((inside..inside, "\"include_usage\":true")))
        }
        None => (false, Some((inside..inside, "\"include_usage\":true,"))),
    }
}

const ASK_WHOLE: &str = "\"stream_options\":{\"include_usage\":true},";

/// Keeps an explicit null, which an `Option` would swallow and an edit must replace, or the member would be there twice.
fn present<'de, D: Deserializer<'de>>(source: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(source).map(Some)
}

fn service_class(fields: &Fields<'_>) -> Option<ServiceClass> {
    if fields.speed.and_then(string).as_deref() == Some("fast") {
        return Some(ServiceClass::Priority);
    }
    let tier = fields.service_tier.and_then(string).or_else(|| fields.gemini_service_tier.and_then(string))?;
    match tier.to_ascii_lowercase().as_str() {
        "default" | "standard" | "standard_only" => Some(ServiceClass::Standard),
        "flex" => Some(ServiceClass::Flex),
        "priority" | "fast" => Some(ServiceClass::Priority),
        "batch" => Some(ServiceClass::Batch),
        // `auto` leaves the choice to the provider, and so does a word we do not know.
        _ => None,
    }
}

fn max_output_tokens(fields: &Fields<'_>) -> Option<u64> {
    let config: GenerationConfig<'_> = fields.generation_config.and_then(object).unwrap_or_default();
    let each = [fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens, config.max_output_tokens];
    let each = each.into_iter().flatten().find(|raw| raw.get() != "null");
    let choices = [fields.n, fields.best_of, config.candidate_count].into_iter().flatten().filter_map(number).max();
    Some(number(each?)?.saturating_mul(choices.unwrap_or(1).max(1)))
}

fn metadata(raw: &RawValue) -> BTreeMap<String, String> {
    if raw.get().len() > METADATA_BYTES_MAX {
        return BTreeMap::new();
    }
    let pairs: BTreeMap<Cow<'_, str>, &RawValue> = object(raw).unwrap_or_default();
    let texts = pairs.iter().filter_map(|(key, value)| Some((cut(key), cut(&string(value)?))));
    texts.take(METADATA_PAIRS_MAX).collect()
}

/// The model of a multipart form (audio and image uploads). Only the heads of its parts are read: what a file in it says
/// about a model is the file's content and nothing else.
fn inspect_form(content_type: &str, body: &[u8], request: &mut Inspected) -> Result<(), String> {
    let boundary = boundary(content_type).ok_or_else(|| "the multipart form has no usable boundary".to_owned())?;
    let delimiter = format!("--{boundary}");
    let mut at = 0;
    while let Some(found) = memmem::find(body.get(at..).unwrap_or_default(), delimiter.as_bytes()) {
        let (start, line_start) = (at + found + delimiter.len(), at + found);
        at = start;
        if line_start > 0 && body.get(line_start - 1) != Some(&b'\n') {
            continue;
        }
        let part = body.get(start..).unwrap_or_default();
        let Some(head_end) = memmem::find(part, b"\r\n\r\n") else { break };
        let head = String::from_utf8_lossy(part.get(..head_end).unwrap_or_default());
        if !names_model(&head) {
            continue;
        }
        let value = start + head_end + 4;
        let end = memmem::find(body.get(value..).unwrap_or_default(), format!("\r\n{delimiter}").as_bytes());
        let place = value..value + end.ok_or_else(|| "the multipart form is cut off".to_owned())?;
        let model = body.get(place.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let model = model.filter(|model| model.len() <= LABEL_BYTES_MAX);
        let model = model.ok_or_else(|| "the form's model is not a name".to_owned())?;
        if request.model.is_some() {
            return Err("the form names a model twice".to_owned());
        }
        request.model = Some(model.to_owned());
        request.places.model = ModelPlace::Form(place);
    }
    Ok(())
}

/// Whether a part's head is that of the field `model`, quoted or not.
fn names_model(head: &str) -> bool {
    let dispositions = head.split("\r\n").filter_map(|line| line.split_once(':'));
    dispositions.filter(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition")).any(|(_, value)| {
        value
            .split(';')
            .filter_map(|parameter| parameter.split_once('='))
            .any(|(name, text)| name.trim().eq_ignore_ascii_case("name") && text.trim().trim_matches('"') == "model")
    })
}

fn boundary(content_type: &str) -> Option<&str> {
    let parameters = content_type.split(';').filter_map(|parameter| parameter.split_once('='));
    let mut found = parameters.filter(|(name, _)| name.trim().eq_ignore_ascii_case("boundary"));
    let boundary = found.next()?.1.trim().trim_matches('"');
    // One that is empty, or named twice, could be read in more than one way.
    (!boundary.is_empty() && found.next().is_none()).then_some(boundary)
}

fn string(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

fn number(raw: &RawValue) -> Option<u64> {
    serde_json::from_str(raw.get()).ok()
}

fn object<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    raw.get().starts_with('{').then(|| serde_json::from_str(raw.get()).ok()).flatten()
}

/// Where `part`, a slice of `whole`, stands in it.
fn place_of(whole: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr().addr().saturating_sub(whole.as_ptr().addr());
    start..start + part.len()
}

/// At most a label's length, on a character's border.
fn cut(text: &str) -> String {
    text.get(..text.floor_char_boundary(LABEL_BYTES_MAX)).unwrap_or_default().to_owned()
}

#[cfg(test)]
#[path = "surface_tests.rs"]
mod tests;
