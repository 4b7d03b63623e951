//! Reads the Prometheus text format and OpenMetrics into samples. Total: any input gives an answer, and lines that
//! are neither samples nor comments are counted, not fatal.

use std::time::Duration;

use ledger::Timestamp;

/// One line of a scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The name as written, suffixes such as `_total` and `_bucket` included.
    pub name: String,
    /// Labels in the order they were written, unescaped.
    pub labels: Vec<(String, String)>,
    /// The value; may be infinite or not a number.
    pub value: f64,
    /// The time stamp as written: milliseconds in the Prometheus format, seconds in OpenMetrics.
    pub timestamp: Option<f64>,
}

impl Sample {
    /// The value of a label.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| label == name).map(|(_, value)| value.as_str())
    }
}

/// Everything one scrape said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scrape {
    /// Samples in the order of the text.
    pub samples: Vec<Sample>,
    /// Lines that could not be read.
    pub unknown_lines: u64,
}

impl Scrape {
    /// Samples of one name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> + 'a {
        self.samples.iter().filter(move |sample| sample.name == name)
    }

    /// The sum over all label sets of one name. `None` when the name is absent, because unknown is not zero.
    #[must_use]
    pub fn total(&self, name: &str) -> Option<f64> {
        self.named(name).map(|sample| sample.value).reduce(|sum, value| sum + value)
    }

    /// Drops the samples that carry a time stamp more than `age` before `now`. Samples without one are of the scrape's own
    /// time.
    pub fn forget_older_than(&mut self, now: Timestamp, age: Duration) {
        let oldest_s = now.micros() as f64 * 1e-6 - age.as_secs_f64();
        self.samples.retain(|sample| sample.timestamp.is_none_or(|at| seconds(at) >= oldest_s));
    }

    /// The value of the sample with this name and, among others, these labels.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.named(name)
            .find(|sample| labels.iter().all(|&(label, value)| sample.label(label) == Some(value)))
            .map(|sample| sample.value)
    }
}

/// Reads the text of a scrape. Never fails and never panics.
#[must_use]
pub fn parse(text: &str) -> Scrape {
    let mut scrape = Scrape::default();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match sample(line) {
            Some(sample) => scrape.samples.push(sample),
            None => scrape.unknown_lines += 1,
        }
    }
    scrape
}

/// Seconds since 1970 of a time stamp in either format. A number of seconds as large as one of milliseconds lies millennia
/// ahead.
fn seconds(timestamp: f64) -> f64 {
    if timestamp.abs() >= 1e11 { timestamp * 1e-3 } else { timestamp }
}

fn sample(line: &str) -> Option<Sample> {
    let name_end = line.find(|c: char| c == '{' || c.is_ascii_whitespace())?;
    let (name, rest) = line.split_at(name_end);
    if !is_metric_name(name) {
        return None;
    }
    let rest = rest.trim_start();
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inside) => labels(inside)?,
        None => (Vec::new(), rest),
    };
    // OpenMetrics appends an exemplar after a hash; nothing here uses it.
    let numbers = rest.split_once(" #").map_or(rest, |(before, _)| before);
    let mut numbers = numbers.split_ascii_whitespace();
    let value = number(numbers.next()?)?;
    let timestamp = match numbers.next() {
        Some(text) => Some(number(text)?),
        None => None,
    };
    numbers.next().is_none().then(|| Sample { name: name.to_owned(), labels, value, timestamp })
}

/// Reads `a="b",c="d"}` and gives the rest after the brace.
fn labels(mut rest: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once('=')?;
        let name = name.trim();
        if !is_label_name(name) {
            return None;
        }
        let (value, after) = quoted(after.trim_start())?;
        labels.push((name.to_owned(), value));
        rest = after.trim_start();
        rest = match rest.strip_prefix(',') {
            Some(next) => next,
            None if rest.starts_with('}') => rest,
            None => return None,
        };
    }
}

/// Reads a quoted text with the escapes `\\`, `\"` and `\n`; an unknown escape stands for itself.
fn quoted(text: &str) -> Option<(String, &str)> {
    let inside = text.strip_prefix('"')?;
    let mut value = String::new();
    let mut characters = inside.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &inside[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                escaped @ ('"' | '\\') => value.push(escaped),
                other => value.extend(['\\', other]),
            },
            other => value.push(other),
        }
    }
    None
}

fn is_metric_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == ':')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

fn is_label_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Rust reads every spelling of the formats: decimals, exponents, `+Inf`, `-Inf` and `NaN`, whatever their case.
fn number(text: &str) -> Option<f64> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_engines_write() {
        let scrape = parse(
            "# HELP vllm:prompt_tokens_total Tokens.\n\
             # TYPE vllm:prompt_tokens_total counter\n\
             vllm:prompt_tokens_total{engine=\"0\",model_name=\"a\"} 12.0\n\
             vllm:prompt_tokens_total{engine=\"1\",model_name=\"a\"} 30 1700000000000\n\
             go_goroutines 7\n\
             x_bucket{le=\"+Inf\",} 5 # {trace_id=\"abc\"} 0.67 1.5\n\
             empty{} NaN\n\
             path{p=\"C:\\\\dir\\n\\\"q\\\" {,} = \\x\"} 1e-3\n\
             # EOF\n",
        );
        assert_eq!(scrape.unknown_lines, 0);
        assert_eq!(scrape.total("vllm:prompt_tokens_total"), Some(42.0));
        assert_eq!(scrape.value("vllm:prompt_tokens_total", &[("engine", "1")]), Some(30.0));
        assert_eq!(scrape.samples[1].timestamp, Some(1.7e12));
        assert_eq!(scrape.value("go_goroutines", &[]), Some(7.0));
        assert_eq!(scrape.value("x_bucket", &[("le", "+Inf")]), Some(5.0));
        assert!(scrape.value("empty", &[]).is_some_and(f64::is_nan));
        assert_eq!(scrape.named("path").next().unwrap().label("p"), Some("C:\\dir\n\"q\" {,} = \\x"));
        assert_eq!(scrape.value("path", &[]), Some(0.001));
        assert_eq!(scrape.total("absent"), None);
    }

    #[test]
    fn broken_lines_are_counted_and_the_rest_is_read() {
        let broken =
            ["a{b=\"c\" 1", "a{b=c} 1", "a{b=\"c\"d=\"e\"} 1", "9a 1", "a", "a b", "a 1 2 3", "a{=\"x\"} 1", "{} 1"];
        for line in broken {
            let scrape = parse(&format!("{line}\nok 1\n"));
            assert_eq!((scrape.samples.len(), scrape.unknown_lines), (1, 1), "{line}");
        }
    }

    #[test]
    fn stale_samples_are_forgotten() {
        let now = Timestamp::from_micros(1_700_000_100_000_000);
        let mut scrape = parse("a 1\nb 1 1700000039000\nc 1 1700000041000\nd 1 1700000041\ne 1 1700000039\nf 1 NaN\n");
        scrape.forget_older_than(now, Duration::from_secs(60));
        let names: Vec<&str> = scrape.samples.iter().map(|sample| sample.name.as_str()).collect();
        assert_eq!(names, ["a", "c", "d"]);
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in any::<String>()) {
            let lines = text.lines().count();
            let scrape = parse(&text);
            prop_assert!(scrape.samples.len() as u64 + scrape.unknown_lines <= lines as u64);
        }

        #[test]
        fn any_text_made_of_the_format_s_own_signs_gives_an_answer(text in "[a-z{}=\",#\\\\ \n0-9.+]{0,200}") {
            let lines = text.lines().count() as u64;
            let scrape = parse(&text);
            prop_assert!(scrape.samples.len() as u64 + scrape.unknown_lines <= lines);
        }

        #[test]
        fn what_is_written_is_read_back(
            name in "[a-zA-Z_:][a-zA-Z0-9_:]{0,20}",
            labels in prop::collection::vec(("[a-zA-Z_][a-zA-Z0-9_]{0,8}", "[^\r\n]{0,20}"), 0..4),
            value in any::<f64>().prop_filter("comparable", |value| !value.is_nan()),
        ) {
            let written: Vec<String> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")))
                .collect();
            let scrape = parse(&format!("{name}{{{}}} {value}\n", written.join(",")));
            prop_assert_eq!(scrape.unknown_lines, 0);
            prop_assert_eq!(&scrape.samples, &[Sample { name, labels, value, timestamp: None }]);
        }
    }
}
