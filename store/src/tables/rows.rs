//! Facts to rows: one record batch per table, column by column, in the order of the schema.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Date32Array, Decimal128Array, Int64Array, RecordBatch, StringArray, StringBuilder,
    TimestampMicrosecondArray,
};
use ledger::{Attempt, Context, Costs, Money, Posting, Source, Terms, Timestamp, TokenKind};
use uuid::Uuid;

use crate::error::StoreError;
use crate::tables::schema::TableName;

/// Rows for `attempts`.
pub(crate) fn attempts(rows: &[Attempt]) -> Result<RecordBatch, StoreError> {
    let mut columns: Vec<ArrayRef> = vec![
        days(rows, |row| row.timeline.received_at),
        uuids(rows, |row| Some(row.id.request.uuid())),
        counts(rows, |row| Some(u64::from(row.id.number))),
        owned_texts(rows, |row| Some(source(&row.source))),
    ];
    columns.extend(contexts(rows, |row| &row.context));
    columns.extend([
        texts(rows, |row| Some(row.route.operation.name())),
        texts(rows, |row| Some(&row.route.provider)),
        texts(rows, |row| Some(&row.route.upstream)),
        texts(rows, |row| row.route.pool.as_deref()),
        texts(rows, |row| row.route.deployment.as_deref()),
        texts(rows, |row| row.route.request_model.as_deref()),
        texts(rows, |row| row.route.response_model.as_deref()),
        texts(rows, |row| row.route.model().map(|model| &**model)),
        texts(rows, |row| row.route.response_id.as_deref()),
        texts(rows, |row| Some(row.route.service_class.name())),
        flags(rows, |row| row.route.streamed),
        times(rows, |row| row.timeline.received_at),
        counts(rows, |row| row.timeline.admitted_us),
        counts(rows, |row| row.timeline.sent_us),
        counts(rows, |row| row.timeline.first_byte_us),
        counts(rows, |row| row.timeline.first_token_us),
        counts(rows, |row| row.timeline.last_token_us),
        counts(rows, |row| row.timeline.queued_us),
        counts(rows, |row| Some(row.timeline.finished_us)),
        counts(rows, |row| Some(u64::from(row.timeline.gaps.count))),
        counts(rows, |row| Some(row.timeline.gaps.total_us)),
        counts(rows, |row| Some(row.timeline.gaps.max_us)),
        texts(rows, |row| Some(row.outcome.name())),
        counts(rows, |row| row.status.map(u64::from)),
    ]);
    columns.extend(TokenKind::ALL.map(|kind| counts(rows, |row| Some(row.usage.get(kind)))));
    columns.extend([
        counts(rows, |row| Some(row.usage.input_tokens())),
        counts(rows, |row| Some(row.usage.output_tokens())),
        texts(rows, |row| Some(row.usage_quality.name())),
        texts(rows, |row| Some(row.charge.name())),
        texts(rows, |row| row.charge.reason()),
    ]);
    columns.extend(costs(rows, |row| row.charge.costs())?);
    columns.push(texts(rows, |row| row.charge.rates().map(ledger::ResolvedRates::as_str)));
    Ok(RecordBatch::try_new(TableName::Attempts.schema(), columns)?)
}

/// Rows for `postings`.
pub(crate) fn postings(rows: &[Posting]) -> Result<RecordBatch, StoreError> {
    let mut columns: Vec<ArrayRef> = vec![
        days(rows, |row| row.period.start),
        uuids(rows, |row| Some(row.id.uuid())),
        texts(rows, |row| Some(row.origin.kind())),
        owned_texts(rows, |row| Some(row.origin.key())),
        texts(rows, |row| Some(row.line.name())),
        times(rows, |row| row.period.start),
        times(rows, |row| row.period.end),
        uuids(rows, |row| row.attempt.map(|attempt| attempt.request.uuid())),
        counts(rows, |row| row.attempt.map(|attempt| u64::from(attempt.number))),
    ];
    columns.extend(contexts(rows, |row| &row.context));
    columns.extend([
        texts(rows, |row| Some(&row.provider)),
        texts(rows, |row| row.model.as_deref()),
        texts(rows, |row| row.pool.as_deref()),
    ]);
    columns.extend(costs(rows, |row| Some(row.costs))?);
    columns.extend([
        flags(rows, |row| row.estimated),
        texts(rows, |row| row.tier.map(tier)),
        Arc::new(rows.iter().map(|row| Some(row.basis?.gpu_us)).collect::<Int64Array>()),
        term(rows, |terms| terms.overhead)?,
        term(rows, |terms| terms.weights)?,
        term(rows, |terms| terms.kv)?,
        term(rows, |terms| terms.compute)?,
        counts(rows, |row| row.basis?.quality.map(u64::from)),
        texts(rows, |row| Some(&row.policy)),
        times(rows, |row| row.booked_at),
    ]);
    Ok(RecordBatch::try_new(TableName::Postings.schema(), columns)?)
}

/// `gateway`, or `import:` and the import's name, or `span:` and the service's.
fn source(source: &Source) -> String {
    match source {
        Source::Gateway => "gateway".to_owned(),
        Source::Import(name) => format!("import:{name}"),
        Source::Span(service) => format!("span:{service}"),
    }
}

pub(crate) const fn tier(tier: ledger::Tier) -> &'static str {
    match tier {
        ledger::Tier::A => "A",
        ledger::Tier::B => "B",
        ledger::Tier::C => "C",
    }
}

fn contexts<T>(rows: &[T], of: impl Fn(&T) -> &Context) -> Vec<ArrayRef> {
    vec![
        texts(rows, |row| of(row).consumer.as_deref()),
        uuids(rows, |row| of(row).key_id.map(ledger::KeyId::uuid)),
        texts(rows, |row| of(row).application.as_deref()),
        texts(rows, |row| of(row).team.as_deref()),
        texts(rows, |row| of(row).cost_centre.as_deref()),
        texts(rows, |row| of(row).customer.as_deref()),
        texts(rows, |row| of(row).feature.as_deref()),
        texts(rows, |row| of(row).session.as_deref()),
        texts(rows, |row| of(row).task.as_deref()),
        texts(rows, |row| of(row).environment.as_deref()),
        texts(rows, |row| of(row).trace_id.as_deref()),
        texts(rows, |row| of(row).span_id.as_deref()),
        owned_texts(rows, |row| {
            let tags = &of(row).tags;
            // A map of strings always has a JSON form; no tags is no text.
            if tags.is_empty() { None } else { serde_json::to_string(tags).ok() }
        }),
    ]
}

fn costs<T>(rows: &[T], of: impl Fn(&T) -> Option<Costs>) -> Result<[ArrayRef; 4], StoreError> {
    Ok([
        decimals(rows, |row| of(row).map(|costs| costs.list_cost.pico()))?,
        decimals(rows, |row| of(row).map(|costs| costs.contracted_cost.pico()))?,
        decimals(rows, |row| of(row).map(|costs| costs.effective_cost.pico()))?,
        decimals(rows, |row| of(row).map(|costs| costs.billed_cost.pico()))?,
    ])
}

fn term(rows: &[Posting], of: impl Fn(Terms) -> Money) -> Result<ArrayRef, StoreError> {
    decimals(rows, |row| Some(of(row.basis?.terms?).pico()))
}

fn texts<'a, T>(rows: &'a [T], of: impl Fn(&'a T) -> Option<&'a str>) -> ArrayRef {
    Arc::new(rows.iter().map(of).collect::<StringArray>())
}

fn owned_texts<T>(rows: &[T], of: impl Fn(&T) -> Option<String>) -> ArrayRef {
    Arc::new(rows.iter().map(of).collect::<StringArray>())
}

/// Lower-case hyphenated text, whose order is the order of the ids and, for version 7, of time.
fn uuids<T>(rows: &[T], of: impl Fn(&T) -> Option<Uuid>) -> ArrayRef {
    let mut column = StringBuilder::with_capacity(rows.len(), rows.len() * uuid::fmt::Hyphenated::LENGTH);
    let mut text = Uuid::encode_buffer();
    for row in rows {
        column.append_option(of(row).map(|id| &*id.hyphenated().encode_lower(&mut text)));
    }
    Arc::new(column.finish())
}

/// Counts above 2^63 saturate; nothing that is counted here gets near it.
fn counts<T>(rows: &[T], of: impl Fn(&T) -> Option<u64>) -> ArrayRef {
    let count = |row| of(row).map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    Arc::new(rows.iter().map(count).collect::<Int64Array>())
}

fn flags<T>(rows: &[T], of: impl Fn(&T) -> bool) -> ArrayRef {
    Arc::new(rows.iter().map(|row| Some(of(row))).collect::<BooleanArray>())
}

fn times<T>(rows: &[T], of: impl Fn(&T) -> Timestamp) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| of(row).micros())).with_timezone("UTC"))
}

fn days<T>(rows: &[T], of: impl Fn(&T) -> Timestamp) -> ArrayRef {
    Arc::new(Date32Array::from_iter_values(rows.iter().map(|row| of(row).day())))
}

fn decimals<T>(rows: &[T], of: impl Fn(&T) -> Option<i128>) -> Result<ArrayRef, StoreError> {
    let column = rows.iter().map(of).collect::<Decimal128Array>().with_precision_and_scale(38, 12)?;
    Ok(Arc::new(column))
}
