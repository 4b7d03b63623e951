//! Says where in the file something is wrong, which key it is, and how to write it right.

use std::ops::Range;

/// Every known key with a valid value; the source of the corrections.
const EXAMPLE: &str = include_str!("example.toml");

/// A mistake with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong and how to put it right, one line.
    pub message: String,
}

/// Turns the TOML reader's error into a line, a key and a correction. The file's own values are never repeated.
#[must_use]
pub fn locate(text: &str, error: &toml::de::Error) -> Mistake {
    let raw = error.message().lines().collect::<Vec<_>>().join("; ");
    let at = sharper(text, &raw, error.span().unwrap_or(0..0));
    let line = line_of(text, at.start);
    let section = section_at(text, &at);
    if let Some(wrong) = raw.strip_suffix("` is not a kind of token").and_then(|rest| rest.strip_prefix('`')) {
        return price_key(text, line, wrong);
    }
    if let Some(message) = unknown_key(&raw, parent_of(text, &at, &section)) {
        return Mistake { line, message };
    }
    let key = key_at(text, &at).or_else(|| key_of_line(line_at(text, at.start.min(text.len()))));
    // Sections in their long form are named by their header alone.
    let place = match (section.is_empty(), key) {
        (false, Some(key)) => format!("{section}.{key}: "),
        (true, Some(key)) => format!("{key}: "),
        (_, None) => place_of(&section),
    };
    if raw.ends_with("expected a sequence")
        && section.split('.').next().is_some_and(|top| LISTS.contains(&top) || top.is_empty())
    {
        let name = if section.is_empty() { key.unwrap_or_default() } else { section.as_str() };
        return Mistake {
            line,
            message: format!("{name}: there may be several; begin each with the line `[[{name}]]`"),
        };
    }
    if let Some(missing) = raw.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        let fix = correction(&section, missing).map_or(String::new(), |fix| format!("; add a line like `{fix}`"));
        return Mistake { line, message: format!("{}`{missing}` is missing{fix}", place_of(&section)) };
    }
    let fix =
        key.and_then(|key| correction(&section, key)).filter(|_| is_about_a_value(&raw) && !raw.contains("; write"));
    let fix = fix.map_or(String::new(), |fix| format!("; write it like `{fix}`"));
    Mistake { line, message: format!("{place}{}{fix}", in_words(&without_values(&raw))) }
}

/// Sections of which there may be several.
const LISTS: [&str; 7] = ["upstream", "route", "pool", "gpu", "scale", "price", "discount"];

fn place_of(section: &str) -> String {
    match section {
        "" => String::new(),
        list if LISTS.contains(&list) => format!("[[{list}]]: "),
        other => format!("[{other}]: "),
    }
}

/// The reader's message without the names of Rust's types.
fn in_words(message: &str) -> String {
    if let Some((wrong, expected)) =
        message.strip_prefix("unknown variant ").and_then(|rest| rest.split_once(", expected "))
    {
        return format!("{wrong} is not one of {}", expected.trim_start_matches("one of ").replace(" or ", ", "));
    }
    let number = ["expected u16", "expected u32", "expected u64", "expected usize"];
    let message = number
        .iter()
        .fold(message.to_owned(), |text, name| text.replace(name, "expected a whole number, not negative"));
    message
        .replace("invalid socket address syntax", "not an IP address with a port")
        .replace("floating point", "the number")
        .replace("duplicate key", "set twice")
}

/// The place of the value that the message quotes, where the reader only knows the table it is in.
fn sharper(text: &str, message: &str, at: Range<usize>) -> Range<usize> {
    let start = at.start.min(text.len());
    if header(line_at(text, start)).is_none() {
        return at;
    }
    let quoted = message.split('`').nth(1).map(|value| format!("\"{value}\""));
    // To the next header: the reader's own span may end with the first.
    let mut end = start;
    for (index, line) in text[start..].split_inclusive('\n').enumerate() {
        if index > 0 && header(line).is_some() {
            break;
        }
        end += line.len();
    }
    let table = &text[start..end];
    match quoted.and_then(|quoted| table.find(&quoted)) {
        Some(offset) => start + offset..start + offset,
        None => at,
    }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text[..at.min(text.len())].matches('\n').count()
}

fn line_at(text: &str, at: usize) -> &str {
    let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    text[start..].lines().next().unwrap_or_default()
}

/// The table that a wrong key is in: for a wrong header that is the one around it.
fn parent_of<'a>(text: &str, at: &Range<usize>, section: &'a str) -> &'a str {
    if header(line_at(text, at.start.min(text.len()))).is_none() {
        return section;
    }
    section.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// The known name closest to a wrong one, if one is close enough to be meant.
#[must_use]
pub fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wrong, name), strsim::jaro_winkler(wrong, name), name))
        .filter(|&(edits, alike, name)| edits <= 1 + name.len() / 3 || alike > 0.85)
        .min_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)))
        .map(|(_, _, name)| name)
}

fn unknown_key(message: &str, section: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (wrong, expected) = rest.split_once('`')?;
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let place = if section.is_empty() { wrong.to_owned() } else { format!("{section}.{wrong}") };
    let hint = match nearest(wrong, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known keys are {}", known.join(", ")),
    };
    Some(format!("unknown key `{place}`; {hint}"))
}

/// A price's rates are collected from whatever keys are left, so that its wrong keys are found late and without a place.
fn price_key(text: &str, line: usize, wrong: &str) -> Mistake {
    let others = ["provider", "model", "class", "from", "to", "above_input_tokens"];
    let known = ledger::TokenKind::ALL.map(ledger::TokenKind::name).into_iter().chain(others);
    let hint = match nearest(wrong, known.clone()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known keys are {}", known.collect::<Vec<_>>().join(", ")),
    };
    let is_it = |text: &str| text.split_once('=').is_some_and(|(key, _)| key.trim() == wrong);
    let place = (1..).zip(text.lines()).skip(line.saturating_sub(1)).find(|(_, text)| is_it(text));
    let line = place.map_or(line, |(line, _)| line);
    Mistake { line, message: format!("unknown key `price.{wrong}`; {hint}") }
}

fn is_about_a_value(message: &str) -> bool {
    ["invalid type", "invalid value", "unknown variant", "is not a", "decimal places", "out of range", "invalid socket"]
        .iter()
        .any(|part| message.contains(part))
}

/// A wrong value may be a secret in the wrong place, so that only its type is repeated.
fn without_values(message: &str) -> String {
    let Some(rest) = message.strip_prefix("invalid type: string \"") else { return message.to_owned() };
    match rest.rsplit_once("\", expected ") {
        Some((_, expected)) => format!("invalid type: a string, expected {expected}"),
        None => "invalid type: a string".to_owned(),
    }
}

/// The header of the section that contains the place, without brackets.
fn section_at(text: &str, at: &Range<usize>) -> String {
    let end = text[at.start.min(text.len())..].find('\n').map_or(text.len(), |next| at.start + next);
    let mut lines = text[..end].lines().rev();
    lines.find_map(header).unwrap_or_default().to_owned()
}

fn header(line: &str) -> Option<&str> {
    let line = line.trim();
    let inner = line.strip_prefix("[[").or_else(|| line.strip_prefix('['))?;
    let name = &inner[..inner.find(']')?];
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-. ".contains(&byte)).then(|| name.trim())
}

/// The key whose value starts at the place: the last `key =` before it on its line.
fn key_at<'a>(text: &'a str, at: &Range<usize>) -> Option<&'a str> {
    let start = text[..at.start.min(text.len())].rfind('\n').map_or(0, |newline| newline + 1);
    let before = &text[start..at.start.min(text.len())];
    let (left, _) = before.rsplit_once('=')?;
    let key = left.trim_end().rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).next()?;
    (!key.is_empty()).then_some(key)
}

/// The key that a line sets.
fn key_of_line(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    let is_name = |key: &str| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    (!key.is_empty() && is_name(key)).then_some(key)
}

/// The example's own line for this key.
fn correction(section: &str, key: &str) -> Option<&'static str> {
    let assignment = |line: &'static str| {
        let (name, _) = line.split_once('=')?;
        (name.trim() == key).then(|| line.split(" #").next().unwrap_or(line).trim())
    };
    let mut current = "";
    // A key outside all sections is none of theirs, whatever it is called.
    let elsewhere = !section.is_empty();
    let mut anywhere = None;
    for line in EXAMPLE.lines() {
        if let Some(name) = header(line) {
            current = name;
        }
        let Some(found) = assignment(line) else { continue };
        if current == section {
            return Some(found);
        }
        anywhere = anywhere.or(Some(found));
    }
    anywhere.filter(|_| elsewhere)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn mistake(text: &str) -> Mistake {
        locate(text, &toml::from_str::<Config>(text).expect_err("a mistake"))
    }

    #[test]
    fn a_mistake_has_a_line_a_key_and_a_correction() {
        let cases = [
            ("[gatway]\nlisten = 1", 1, "unknown key `gatway`; did you mean `gateway`?"),
            ("\n[gateway]\nlistn = \"x\"", 3, "unknown key `gateway.listn`; did you mean `listen`?"),
            ("[gateway]\nquux = 1", 2, "unknown key `gateway.quux`; known keys are listen"),
            ("[gateway]\nbody_bytes_max = \"64M\"", 2, "write it like `body_bytes_max = 67108864`"),
            ("[gateway]\nlisten = 4000", 2, "write it like `listen = \"127.0.0.1:4000\"`"),
            ("[ledger]\ndurability = \"disk\"", 2, "write it like `durability = \"process\"`"),
            (
                "[[pool]]\nname = \"a\"\ngpu = \"b\"\ngpus = 1\nusd_per_gpu_hour = 2.5",
                5,
                "write it like `usd_per_gpu_hour = \"2.50\"`",
            ),
            ("[[price]]\nprovider = \"a\"\nmodel = \"b\"\ninptu = \"2\"", 4, "`price.inptu`; did you mean `input`?"),
            (
                "[[price]]\nprovider = \"a\"\nmodel = \"b\"\ninput = \"two\"",
                4,
                "price.input: `two` is not a decimal number; write it like `input = \"2.00\"`",
            ),
            ("[[discount]]\nprovider = \"a\"\npercent = \"101\"", 3, "write it like `percent = \"12.5\"`"),
            ("[admin]\ntoken = \"hunter2\"", 2, "{ env = \"NAME\" }"),
            ("[gateway]\nlisten = \"127.0.0.1:1\"\nlisten = \"127.0.0.1:2\"", 3, "gateway.listen: set twice"),
            (
                "[gateway]\nlisten = \"localhost:4000\"",
                2,
                "gateway.listen: not an IP address with a port; write it like",
            ),
            ("[ledger]\nflush_every_ms = -1", 2, "expected a whole number, not negative"),
            ("[ledger]\ndurability = \"disk\"", 2, "`disk` is not one of `process`, `power`"),
            (
                "[[pool]]\nname = \"a\"\ngpu = \"b\"\ngpus = 1",
                1,
                "[[pool]]: `usd_per_gpu_hour` is missing; add a line like",
            ),
            ("upstream = 3", 1, "upstream: there may be several; begin each with the line `[[upstream]]`"),
            ("[pool]\nname = \"a\"", 1, "pool: there may be several; begin each with the line `[[pool]]`"),
            ("[[route]]\nmodel = \"a\"\ntargets = [{ upstrem = \"b\" }]", 3, "did you mean `upstream`?"),
        ];
        for (text, line, part) in cases {
            let mistake = mistake(text);
            assert!(mistake.message.contains(part), "{text:?} gave {:?}", mistake.message);
            assert_eq!(mistake.line, line, "{text:?} gave {:?}", mistake.message);
            assert!(!mistake.message.contains("hunter2"), "{}", mistake.message);
            assert!(!mistake.message.contains('\n'), "{}", mistake.message);
        }
    }

    #[test]
    fn the_example_knows_every_key() {
        // The inline and the long form of the same table cannot stand together, so the long forms are left out.
        let text = EXAMPLE.replace("[gateway.tls]\ncertificate = \"cert.pem\"\nkey = \"key.pem\"\n", "");
        let without = |text: String, from: &str, to: &str| {
            let inline = text.find(from).expect("long form")..text.find(to).expect("what follows");
            [&text[..inline.start], &text[inline.end..]].concat()
        };
        let text = without(text, "[upstream.engine]", "[[route]]");
        let text = without(text, "[route.targets]", "[[pool]]");
        let text = without(text, "[scale.objective]", "[[price]]");
        toml::from_str::<Config>(&text).expect("the example is valid");
    }
}
