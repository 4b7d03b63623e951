//! Farthing's own rows as JSON Lines: one attempt a line, everything but its time, tokens and model optional.
//!
//! A row that brings a charge keeps it, provided that the amounts follow from its rates and its tokens; a row without
//! one is priced. What `farthing export requests` writes reads back as the same attempts.

use ledger::{
    Attempt, AttemptId, Charge, Context, Label, Operation, Outcome, RequestId, Route, ServiceClass, Source, Timeline,
    Timestamp, TokenGaps, TokenUsage, UnpricedReason, UsageQuality,
};
use serde::{Deserialize, Serialize};

use super::lines::json_mistake;
use super::{Ids, Settings, UNPRICED_YET};

const KIND: &str = "requests";

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request_id: Option<RequestId>,
    #[serde(default)]
    attempt: u16,
    received_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<Source>,
    #[serde(default)]
    context: Context,
    #[serde(default)]
    operation: Operation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider: Option<Label>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upstream: Option<Label>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pool: Option<Label>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deployment: Option<Label>,
    #[serde(default, alias = "model", skip_serializing_if = "Option::is_none")]
    request_model: Option<Label>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response_model: Option<Label>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response_id: Option<Label>,
    #[serde(default)]
    service_class: ServiceClass,
    #[serde(default)]
    streamed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    admitted_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sent_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_byte_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_token_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_token_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queued_us: Option<u64>,
    #[serde(default)]
    finished_us: u64,
    #[serde(default)]
    gaps: TokenGaps,
    #[serde(default = "completed")]
    outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    usage: TokenUsage,
    #[serde(default = "reported")]
    usage_quality: UsageQuality,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    charge: Option<Charge>,
}

const fn completed() -> Outcome {
    Outcome::Completed
}

const fn reported() -> UsageQuality {
    UsageQuality::Reported
}

/// Reads rows of one file.
#[derive(Debug)]
pub struct Rows {
    settings: Settings,
    source: Source,
}

impl Rows {
    /// Rows with what the settings say about those that do not.
    #[must_use]
    pub fn new(settings: &Settings) -> Rows {
        let source = Source::Import(format!("{KIND}:{}", settings.name).into());
        Rows { settings: settings.clone(), source }
    }

    /// Reads one line.
    ///
    /// # Errors
    /// Why it is no row.
    pub fn row(&self, line: &str, ids: &mut Ids) -> Result<Attempt, String> {
        let row: Row = serde_json::from_str(line).map_err(|error| json_mistake(&error))?;
        let given = |value: &Option<String>| value.as_deref().map(Label::from);
        let request = match row.request_id {
            Some(id) => id,
            // The meaning of the row rather than its spelling: white space and order of keys do not matter.
            None => {
                let meaning = serde_json::to_vec(&row).map_err(|error| error.to_string())?;
                ids.of_row(KIND, row.received_at, &meaning)
            }
        };
        let mut context = row.context;
        // A row that says where it comes from was metered before: what nobody could be held to stays that.
        if context.consumer.is_none() && row.source.is_none() {
            context.consumer = Some(self.settings.name.as_str().into());
        }
        let pool = row.pool.or_else(|| given(&self.settings.pool));
        let by_place = if pool.is_some() { "self_hosted" } else { "openai" };
        let attempt = Attempt {
            id: AttemptId { request, number: row.attempt },
            source: row.source.unwrap_or_else(|| self.source.clone()),
            context,
            route: Route {
                operation: row.operation,
                provider: row.provider.or_else(|| given(&self.settings.provider)).unwrap_or_else(|| by_place.into()),
                upstream: row.upstream.unwrap_or_else(|| KIND.into()),
                pool,
                deployment: row.deployment,
                request_model: row.request_model.or_else(|| given(&self.settings.model)),
                response_model: row.response_model,
                response_id: row.response_id,
                service_class: row.service_class,
                streamed: row.streamed,
            },
            timeline: Timeline {
                received_at: row.received_at,
                admitted_us: row.admitted_us,
                sent_us: row.sent_us,
                first_byte_us: row.first_byte_us,
                first_token_us: row.first_token_us,
                last_token_us: row.last_token_us,
                queued_us: row.queued_us,
                finished_us: row.finished_us,
                gaps: row.gaps,
            },
            outcome: row.outcome,
            status: row.status,
            usage: row.usage,
            usage_quality: row.usage_quality,
            charge: row.charge.unwrap_or(UNPRICED_YET),
        };
        check(&attempt)?;
        Ok(attempt)
    }
}

/// What types cannot see: an amount that does not follow from its own row would make the books unprovable.
///
/// # Errors
/// Why the row is not taken.
pub fn check(attempt: &Attempt) -> Result<(), String> {
    let (charge, usage, line) = (&attempt.charge, &attempt.usage, &attempt.timeline);
    if let (Some(costs), Some(rates)) = (charge.costs(), charge.rates())
        && rates.charge(usage) != Some(costs)
    {
        return Err("the charge's amounts do not follow from its rates and the row's tokens".to_owned());
    }
    let counted = usage.iter().map(|(_, tokens)| tokens).max().unwrap_or(0);
    if counted > u64::from(u32::MAX) {
        return Err(format!("{counted} tokens in one attempt is not a count of tokens"));
    }
    if attempt.usage_quality == UsageQuality::Missing && counted > 0 {
        return Err("usage_quality is `missing` and there are tokens".to_owned());
    }
    let times = [line.admitted_us, line.sent_us, line.first_byte_us, line.first_token_us, line.last_token_us];
    if times.into_iter().flatten().any(|at| at > line.finished_us) {
        return Err("a time of the row lies after finished_us".to_owned());
    }
    Ok(())
}

/// Writes an attempt as one line, without the line's end.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn line(attempt: &Attempt) -> serde_json::Result<String> {
    let (route, timeline) = (&attempt.route, &attempt.timeline);
    // A charge that says "not priced, because unknown" is asked for again on import: the price may be known by then.
    let unknown = Charge::Unpriced { reason: UnpricedReason::UnknownModel };
    serde_json::to_string(&Row {
        request_id: Some(attempt.id.request),
        attempt: attempt.id.number,
        received_at: timeline.received_at,
        source: Some(attempt.source.clone()),
        context: attempt.context.clone(),
        operation: route.operation,
        provider: Some(route.provider.clone()),
        upstream: Some(route.upstream.clone()),
        pool: route.pool.clone(),
        deployment: route.deployment.clone(),
        request_model: route.request_model.clone(),
        response_model: route.response_model.clone(),
        response_id: route.response_id.clone(),
        service_class: route.service_class,
        streamed: route.streamed,
        admitted_us: timeline.admitted_us,
        sent_us: timeline.sent_us,
        first_byte_us: timeline.first_byte_us,
        first_token_us: timeline.first_token_us,
        last_token_us: timeline.last_token_us,
        queued_us: timeline.queued_us,
        finished_us: timeline.finished_us,
        gaps: timeline.gaps,
        outcome: attempt.outcome,
        status: attempt.status,
        usage: attempt.usage,
        usage_quality: attempt.usage_quality,
        charge: (attempt.charge != unknown).then(|| attempt.charge.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ImportKind;
    use ledger::{ResolvedRates, TokenKind, TokenPrice};

    fn rows() -> Rows {
        Rows::new(&Settings {
            kind: ImportKind::Requests,
            name: "own".to_owned(),
            model: None,
            provider: None,
            pool: None,
        })
    }

    const SMALL: &str = r#"{"received_at": "2026-11-01T00:00:00Z", "model": "gpt-4o", "usage": {"input": 10}}"#;

    #[test]
    fn a_small_row_is_enough_and_its_spelling_does_not_matter() {
        let attempt = rows().row(SMALL, &mut Ids::default()).unwrap();
        assert_eq!((&*attempt.route.provider, attempt.context.consumer.as_deref()), ("openai", Some("own")));
        let spelled = r#"{"usage":{"input":10},"request_model":"gpt-4o","received_at":"2026-11-01"}"#;
        assert_eq!(rows().row(spelled, &mut Ids::default()).unwrap(), attempt);
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let mut attempt = rows().row(SMALL, &mut Ids::default()).unwrap();
        let rates =
            ResolvedRates::new("book@1", "openai/gpt-4o", &[(TokenKind::Input, TokenPrice::from_pico(7))], 900_000);
        let costs = rates.charge(&attempt.usage).unwrap();
        attempt.charge = Charge::Priced { costs, rates };
        attempt.context.tags.insert("a".into(), "b".into());
        attempt.timeline.finished_us = 5;
        attempt.timeline.last_token_us = Some(4);
        let text = line(&attempt).unwrap();
        assert_eq!(rows().row(&text, &mut Ids::default()).unwrap(), attempt);
        let forged = text.replace("0.000000000063", "0.000000000064");
        assert_ne!(forged, text);
        assert!(rows().row(&forged, &mut Ids::default()).unwrap_err().contains("do not follow"));
    }

    #[test]
    fn bad_rows_say_why() {
        let cases = [
            ("[]", "expected"),
            (r#"{"received_at": "2026-11-01", "usage": {"inptu": 1}}"#, "inptu"),
            (r#"{"received_at": "2026-11-01", "usage": {"input": -1}}"#, "-1"),
            (r#"{"received_at": "2026-11-01", "usage": {"input": 99999999999}}"#, "not a count"),
            (r#"{"received_at": "2026-11-01", "usage": {}, "sent_us": 5}"#, "after finished_us"),
            (r#"{"received_at": "2026-11-01", "usage": {"input": 1}, "usage_quality": "missing"}"#, "missing"),
            (r#"{"usage": {}}"#, "received_at"),
        ];
        for (text, part) in cases {
            let reason = rows().row(text, &mut Ids::default()).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }
}
