//! Azure's public inference traces: CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, one row a request.
//!
//! The rows name no consumer and no model: they are attributed to the import's name and priced as `--model`. The trace
//! has no durations, so that every request ends when it begins.

use ledger::{
    Attempt, AttemptId, Context, Label, Operation, Outcome, Route, Source, Timeline, Timestamp, TokenUsage,
    UsageQuality,
};

use super::{Ids, Settings, UNPRICED_YET};

const KIND: &str = "azure-llm-trace";
const HEADING: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";

/// Reads rows of one file.
#[derive(Debug)]
pub struct Rows {
    context: Context,
    route: Route,
    source: Source,
    heading_seen: bool,
}

impl Rows {
    /// Rows with what the settings say about them.
    #[must_use]
    pub fn new(settings: &Settings) -> Rows {
        let name: Label = settings.name.as_str().into();
        Rows {
            context: Context { consumer: Some(name.clone()), team: Some(name), ..Context::default() },
            route: Route {
                operation: Operation::Chat,
                provider: settings.provider.as_deref().unwrap_or("openai").into(),
                upstream: KIND.into(),
                pool: settings.pool.as_deref().map(Label::from),
                request_model: settings.model.as_deref().map(Label::from),
                ..Route::default()
            },
            source: Source::Import(format!("{KIND}:{}", settings.name).into()),
            heading_seen: false,
        }
    }

    /// Reads one line; `None` for the heading.
    ///
    /// # Errors
    /// Why it is no row.
    pub fn row(&mut self, number: u64, line: &str, ids: &mut Ids) -> Result<Option<Attempt>, String> {
        if number == 1 && line.trim().eq_ignore_ascii_case(HEADING) {
            self.heading_seen = true;
            return Ok(None);
        }
        if !self.heading_seen {
            return Err(format!("the file does not start with the heading {HEADING}"));
        }
        let fields: Vec<&str> = line.split(',').map(|field| field.trim().trim_matches('"')).collect();
        let [at, input, output] = fields[..] else {
            return Err(format!("{} fields instead of 3", fields.len()));
        };
        let at: Timestamp = at.parse()?;
        let usage = TokenUsage {
            input: tokens("ContextTokens", input)?,
            output: tokens("GeneratedTokens", output)?,
            ..TokenUsage::default()
        };
        let request = ids.of_row(KIND, at, format!("{},{},{}", at.micros(), usage.input, usage.output).as_bytes());
        Ok(Some(Attempt {
            id: AttemptId { request, number: 0 },
            source: self.source.clone(),
            context: self.context.clone(),
            route: self.route.clone(),
            timeline: Timeline { received_at: at, ..Timeline::default() },
            outcome: Outcome::Completed,
            status: None,
            usage,
            usage_quality: UsageQuality::Reported,
            charge: UNPRICED_YET,
        }))
    }
}

fn tokens(name: &str, text: &str) -> Result<u64, String> {
    text.parse::<u32>().map(u64::from).map_err(|_| format!("{name} `{text}` is not a count of tokens"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ImportKind;

    fn rows() -> Rows {
        Rows::new(&Settings {
            kind: ImportKind::AzureLlmTrace,
            name: "conv".to_owned(),
            model: Some("gpt-4o".to_owned()),
            provider: None,
            pool: None,
        })
    }

    #[test]
    fn a_row_is_an_attempt_of_the_import() {
        let (mut rows, mut ids) = (rows(), Ids::default());
        assert_eq!(rows.row(1, HEADING, &mut ids), Ok(None));
        let attempt = rows.row(2, "2023-11-16 18:15:46.6805900,374,44", &mut ids).unwrap().unwrap();
        assert_eq!((attempt.usage.input, attempt.usage.output), (374, 44));
        assert_eq!(attempt.timeline.received_at.micros(), 1_700_158_546_680_590);
        assert_eq!(attempt.context.consumer.as_deref(), Some("conv"));
        assert_eq!(attempt.route.model().map(|model| &**model), Some("gpt-4o"));
    }

    #[test]
    fn bad_rows_say_why() {
        let (mut rows, mut ids) = (rows(), Ids::default());
        assert!(rows.row(1, "a,b,c", &mut ids).unwrap_err().contains("heading"));
        assert_eq!(rows.row(1, HEADING, &mut ids), Ok(None));
        let cases = [
            ("2023-11-16 18:15:46,374", "2 fields"),
            ("yesterday,1,2", "not a time"),
            ("2023-11-16 18:15:46,-1,2", "ContextTokens `-1`"),
            ("2023-11-16 18:15:46,1,2.5", "GeneratedTokens `2.5`"),
            ("2023-11-16 18:15:46,99999999999999999999,2", "ContextTokens"),
        ];
        for (line, part) in cases {
            assert!(rows.row(2, line, &mut ids).unwrap_err().contains(part), "{line}");
        }
    }
}
