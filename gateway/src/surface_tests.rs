use super::*;

fn post(path: &str, body: &str) -> Inspected {
    inspect(&Method::POST, path, Some("application/json"), body.as_bytes())
}

#[test]
fn every_surface_is_recognised_however_its_path_is_written() {
    use Dialect::{Anthropic, Gemini, OpenAi, Unknown};
    let cases = [
        ("POST", "/v1/chat/completions", OpenAi, Operation::Chat),
        ("POST", "/v1/completions", OpenAi, Operation::Completions),
        ("POST", "/v1/responses", OpenAi, Operation::Responses),
        ("POST", "/v1/embeddings", OpenAi, Operation::Embeddings),
        ("GET", "/v1/models", OpenAi, Operation::Models),
        ("GET", "/v1/models/ft:gpt-4o:org", OpenAi, Operation::Models),
        ("POST", "/v1/images/generations", OpenAi, Operation::Other),
        ("POST", "/v1/audio/speech", OpenAi, Operation::Other),
        ("POST", "/v1/batches", OpenAi, Operation::Other),
        ("POST", "/v1/messages", Anthropic, Operation::Messages),
        ("POST", "/v1/messages/count_tokens", Anthropic, Operation::CountTokens),
        ("POST", "/v1beta/models/gemini-2.5-pro:generateContent", Gemini, Operation::Generate),
        ("POST", "/v1beta/models/gemini-2.5-pro:streamGenerateContent", Gemini, Operation::Generate),
        ("POST", "/v1beta/models/gemini-2.5-pro:countTokens", Gemini, Operation::CountTokens),
        ("POST", "/v1beta/models/gemini-embedding-001:embedContent", Gemini, Operation::Embeddings),
        ("GET", "/v1beta/models", Gemini, Operation::Models),
        ("POST", "/v1beta/openai/chat/completions", Gemini, Operation::Chat),
        ("POST", "/anything/else", Unknown, Operation::Other),
        ("POST", "", Unknown, Operation::Other),
    ];
    for (method, path, dialect, operation) in cases {
        for written in [
            path.to_owned(),
            path.replace('/', "//"),
            format!("{path}?a=/v1/b"),
            format!("{path}/"),
            path.replace('c', "%63"),
        ] {
            let seen = inspect(&method.parse().unwrap(), &written, None, b"{}");
            assert_eq!((seen.dialect, seen.operation), (dialect, operation), "{written}");
            assert_eq!(seen.streamed, path.contains("streamGenerate"));
        }
    }
}

#[test]
fn reading_something_stored_is_not_running_it_again() {
    for (method, path) in
        [("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"), ("GET", "/v1/chat/completions/c")]
    {
        let seen = inspect(&method.parse().unwrap(), path, None, b"");
        assert_eq!((seen.operation, seen.stored, seen.malformed), (Operation::Other, true, None), "{path}");
    }
}

#[test]
fn the_fields_of_each_protocol_are_read() {
    let seen = post(
        "/v1/chat/completions",
        r#"{"model":"gpt-4o","messages":[{"role":"user","content":"\u00e9 \"model\":"}],"stream":true,"stream_options":{"include_usage":true},
            "service_tier":"flex","max_completion_tokens":100,"n":3,"user":"u1","safety_identifier":"s1","metadata":{"a":"b","c":5}}"#,
    );
    assert_eq!((seen.model.as_deref(), seen.streamed, seen.usage_chunk_requested), (Some("gpt-4o"), true, true));
    assert_eq!((seen.service_class_requested, seen.max_output_tokens), (Some(ServiceClass::Flex), Some(300)));
    assert_eq!((seen.end_user.as_deref(), seen.metadata.len(), seen.malformed), (Some("u1"), 1, None));
    let seen = post(
        "/v1/messages",
        r#"{"model":"claude","max_tokens":64,"metadata":{"user_id":"u2"},"speed":"fast","stream":true}"#,
    );
    assert_eq!((seen.end_user.as_deref(), seen.max_output_tokens, seen.streamed), (Some("u2"), Some(64), true));
    assert_eq!((seen.service_class_requested, seen.places.usage_chunk), (Some(ServiceClass::Priority), None));
    let seen = post(
        "/v1beta/models/gemini-2.5-pro:generateContent",
        r#"{"generationConfig":{"maxOutputTokens":9,"candidateCount":2}}"#,
    );
    assert_eq!((seen.model.as_deref(), seen.max_output_tokens), (Some("gemini-2.5-pro"), Some(18)));
    let odd = post("/v1/chat/completions", r#"{"model":5,"stream":"yes","user":[],"metadata":"x","max_tokens":-3}"#);
    assert_eq!(
        (odd.model, odd.streamed, odd.end_user, odd.max_output_tokens, odd.malformed),
        (None, false, None, None, None)
    );
}

#[test]
fn malformed_bodies_are_said_to_be_and_never_quoted() {
    let cases: [(&[u8], &str); 7] = [
        (b"", "empty"),
        (b"{\"model\":\"secret", "not valid JSON"),
        (b"[1]", "not an object"),
        (b"\"secret\"", "not an object"),
        (b"{\"model\":\"\xff\"}", "UTF-8"),
        (b"{\"model\":\"secret\",\"model\":\"b\"}", "duplicate field"),
        (b"{\"model\":\"secret\",\"mod\\u0065l\":\"b\"}", "duplicate field"),
    ];
    for (body, reason) in cases {
        let malformed = inspect(&Method::POST, "/v1/chat/completions", None, body).malformed.unwrap();
        assert!(malformed.contains(reason) && !malformed.contains("secret"), "{malformed}");
    }
    assert_eq!(inspect(&Method::POST, "/x", Some("application/json"), b"[1]").malformed, None);
    assert!(inspect(&Method::POST, "/x", Some("application/json"), b"[1").malformed.is_some());
    assert_eq!(inspect(&Method::POST, "/x", Some("audio/wav"), b"[1").malformed, None);
    assert!(post("/v1/chat/completions", &"[".repeat(100_000)).malformed.is_some());
}

#[test]
fn labels_and_metadata_are_bounded() {
    let pairs: Vec<String> = (0..40).map(|index| format!("\"k{index}\":\"{}\"", "é".repeat(400))).collect();
    let seen =
        post("/v1/responses", &format!("{{\"model\":\"{}\",\"metadata\":{{{}}}}}", "m".repeat(9_000), pairs.join(",")));
    assert_eq!((seen.model.unwrap().len(), seen.metadata.len()), (LABEL_BYTES_MAX, METADATA_PAIRS_MAX));
    assert!(seen.metadata.values().all(|value| value.len() <= LABEL_BYTES_MAX));
}

#[test]
fn the_model_of_an_upload_is_found_between_its_files() {
    let body = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n\0\xff\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--b--\r\n";
    let seen = inspect(&Method::POST, "/v1/audio/transcriptions", Some("multipart/form-data; boundary=b"), body);
    assert_eq!((seen.model.as_deref(), seen.malformed), (Some("whisper-1"), None));
}

#[test]
fn a_file_in_a_form_cannot_name_the_model() {
    let part = |head: &str, value: &str| format!("--B\r\ncontent-disposition: form-data; {head}\r\n\r\n{value}\r\n");
    let form = |parts: &[String]| {
        let body = format!("{}--B--\r\n", parts.concat());
        inspect(&Method::POST, "/v1/audio/transcriptions", Some("multipart/form-data; boundary=\"B\""), body.as_bytes())
    };
    let decoy = part("name=\"file\"; filename=\"a\"", "x\r\nname=\"model\"\r\n\r\nallowed\r\n");
    for head in ["name=\"model\"", "name=model"] {
        let seen = form(&[decoy.clone(), part(head, "expensive")]);
        assert_eq!((seen.model.as_deref(), seen.malformed), (Some("expensive"), None), "{head}");
    }
    let twice = form(&[part("name=\"model\"", "allowed"), part("name=\"model\"", "expensive")]);
    assert!(twice.malformed.is_some(), "an upstream may take the other one");
    let unbounded = inspect(&Method::POST, "/v1/audio/speech", Some("multipart/form-data"), b"--B\r\n");
    assert!(unbounded.malformed.is_some());
}

#[test]
fn asking_for_usage_keeps_the_clients_other_options_and_names_nothing_twice() {
    let cases = [
        (
            r#"{"include_obfuscation":false,"include_usage":null}"#,
            r#"{"include_obfuscation":false,"include_usage":true}"#,
        ),
        (r#"{"x_include_usage":1}"#, r#"{"include_usage":true,"x_include_usage":1}"#),
        ("null", r#"{"include_usage":true}"#),
    ];
    for name in ["stream_options", r"stream\u005foptions"] {
        for (sent, expected) in cases {
            let body = format!(r#"{{"stream":true, "{name}" : {sent} ,"model":"m"}}"#);
            let seen = post("/v1/chat/completions", &body);
            let (place, text) = seen.places.usage_chunk.expect("an edit");
            let edited = format!("{}{text}{}", &body[..place.start], &body[place.end..]);
            assert_eq!(edited, body.replacen(sent, expected, 1));
        }
    }
}

#[test]
fn a_field_in_another_case_is_refused_where_it_could_be_read() {
    let malformed = |path: &str, body: &str| post(path, body).malformed;
    for (path, body, name) in [
        ("/v1/chat/completions", r#"{"model":"cheap","Model":"secret"}"#, "`model`"),
        ("/v1/chat/completions", r#"{"MODEL":"secret"}"#, "`model`"),
        ("/v1/chat/completions", r#"{"mode\u004c":"secret","model":"cheap","Stream":true}"#, "`model`"),
        ("/v1/chat/completions", r#"{"Stream":true,"mOdel":"secret"}"#, "`model`"),
        ("/v1/chat/completions", r#"{"model":"m","Max_Tokens":1}"#, "`max_tokens`"),
        ("/v1/chat/completions", "{\"model\":\"m\",\"\u{17f}tream\":true}", "`stream`"),
        ("/v1/messages", r#"{"model":"m","max_to\u212aens":1}"#, "`max_tokens`"),
        ("/custom", r#"{"Model":"secret"}"#, "`model`"),
    ] {
        let reason = malformed(path, body).unwrap_or_else(|| panic!("{body} passes"));
        assert!(reason.contains(name) && !reason.contains("secret"), "{reason}");
    }
    let nested =
        r#"{"model":"m","messages":[{"Model":"x","content":"\"Model\":1"}],"metadata":{"Model":"x"},"models":["a"]}"#;
    assert_eq!(malformed("/v1/chat/completions", nested), None);
    assert_eq!(malformed("/custom", r#"{"User":"x","Metadata":{},"N":1}"#), None, "not our words there");
    let both = post("/v1beta/models/g:generateContent", r#"{"generationConfig":{},"generation_config":{}}"#);
    assert!(both.malformed.unwrap().contains("duplicate field"));
}
