//! Rows back to facts, for settlement, `explain` and `verify`. Columns are found by name, so any `SELECT *` will do.

use std::collections::BTreeMap;
use std::str::FromStr;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Decimal128Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use ledger::{
    Attempt, AttemptId, Basis, Charge, Context, Costs, EstimateReason, KeyId, Label, Line, Money, Operation, Origin,
    Outcome, Period, Posting, PostingId, RequestId, Route, ServiceClass, Source, Terms, Tier, Timeline, Timestamp,
    TokenGaps, TokenKind, TokenUsage, UnpricedReason, UsageQuality,
};

use crate::error::StoreError;
use crate::tables::schema::{CONTEXT, TERMS, token_column};

/// Reads rows of `attempts`.
///
/// # Errors
/// [`StoreError::Corrupt`] when a column is missing or a value is none that this program writes.
pub fn attempts_of(batch: &RecordBatch) -> Result<Vec<Attempt>, StoreError> {
    let rows = Rows::new(batch);
    let (ids, context) = (AttemptIds::new(&rows)?, Contexts::new(&rows)?);
    let costs = CostColumns::new(&rows)?;
    let kinds = TokenKind::ALL.map(|kind| rows.counts(&token_column(kind)).map(|column| (kind, column)));
    let kinds = kinds.into_iter().collect::<Result<Vec<_>, _>>()?;
    let [source, operation, provider, upstream, pool, deployment] =
        rows.all_texts(["source", "operation", "provider", "upstream", "pool", "deployment"])?;
    let [request_model, response_model, response_id, service_class, outcome] =
        rows.all_texts(["request_model", "response_model", "response_id", "service_class", "outcome"])?;
    let [quality, charge, reason, rates] = rows.all_texts(["usage_quality", "charge", "charge_reason", "rates"])?;
    let (streamed, received_at) = (rows.flags("streamed")?, rows.times("received_at")?);
    let [admitted, sent, first_byte, first_token, last_token, queued] =
        rows.all_counts(["admitted_us", "sent_us", "first_byte_us", "first_token_us", "last_token_us", "queued_us"])?;
    let [finished, gap_count, gap_total, gap_max, status] =
        rows.all_counts(["finished_us", "gap_count", "gap_total_us", "gap_max_us", "status"])?;

    (0..batch.num_rows())
        .map(|row| {
            let mut usage = TokenUsage::default();
            for (kind, column) in &kinds {
                *usage.get_mut(*kind) = column.required(row)?;
            }
            Ok(Attempt {
                id: ids.required(row)?,
                source: source_of(source.required(row)?),
                context: context.get(row)?,
                route: Route {
                    operation: operation.named(row, Operation::ALL, Operation::name)?,
                    provider: provider.required(row)?.into(),
                    upstream: upstream.required(row)?.into(),
                    pool: pool.label(row),
                    deployment: deployment.label(row),
                    request_model: request_model.label(row),
                    response_model: response_model.label(row),
                    response_id: response_id.label(row),
                    service_class: service_class.named(row, ServiceClass::ALL, ServiceClass::name)?,
                    streamed: streamed.value(row),
                },
                timeline: Timeline {
                    received_at: received_at.required(row)?,
                    admitted_us: admitted.get(row)?,
                    sent_us: sent.get(row)?,
                    first_byte_us: first_byte.get(row)?,
                    first_token_us: first_token.get(row)?,
                    last_token_us: last_token.get(row)?,
                    queued_us: queued.get(row)?,
                    finished_us: finished.required(row)?,
                    gaps: TokenGaps {
                        count: gap_count.small(row)?.unwrap_or(0),
                        total_us: gap_total.required(row)?,
                        max_us: gap_max.required(row)?,
                    },
                },
                outcome: outcome.named(row, Outcome::ALL, Outcome::name)?,
                status: status.small(row)?,
                usage,
                usage_quality: quality.named(row, QUALITIES, UsageQuality::name)?,
                charge: match charge.required(row)? {
                    "priced" => Charge::Priced { costs: costs.required(row)?, rates: rates.parsed(row)? },
                    "estimated" => Charge::Estimated {
                        costs: costs.required(row)?,
                        rates: rates.parsed(row)?,
                        reason: reason.named(row, ESTIMATES, EstimateReason::name)?,
                    },
                    "unpriced" => Charge::Unpriced { reason: reason.named(row, UNPRICED, UnpricedReason::name)? },
                    other => return Err(StoreError::corrupt("charge", format!("`{other}` is no kind of charge"))),
                },
            })
        })
        .collect()
}

/// Reads rows of `postings`.
///
/// # Errors
/// As [`attempts_of`].
pub fn postings_of(batch: &RecordBatch) -> Result<Vec<Posting>, StoreError> {
    let rows = Rows::new(batch);
    let (ids, context, costs) = (AttemptIds::new(&rows)?, Contexts::new(&rows)?, CostColumns::new(&rows)?);
    let [posting_id, origin_kind, origin_key, line, provider, model] =
        rows.all_texts(["posting_id", "origin_kind", "origin_key", "line", "provider", "model"])?;
    let [pool, tier, policy] = rows.all_texts(["pool", "tier", "policy"])?;
    let (start, end, booked_at) = (rows.times("period_start")?, rows.times("period_end")?, rows.times("booked_at")?);
    let (estimated, gpu_us, quality) = (rows.flags("estimated")?, rows.counts("gpu_us")?, rows.counts("quality")?);
    let [overhead, weights, kv, compute] = rows.all_money(TERMS)?;
    let terms = |row| {
        Some(Terms {
            overhead: overhead.get(row)?,
            weights: weights.get(row)?,
            kv: kv.get(row)?,
            compute: compute.get(row)?,
        })
    };

    (0..batch.num_rows())
        .map(|row| {
            Ok(Posting {
                id: PostingId::from_uuid(posting_id.parsed(row)?),
                origin: origin(origin_kind.required(row)?, origin_key.required(row)?)?,
                line: line.named(row, Line::ALL, Line::name)?,
                period: Period { start: start.required(row)?, end: end.required(row)? },
                attempt: ids.get(row)?,
                context: context.get(row)?,
                provider: provider.required(row)?.into(),
                model: model.label(row),
                pool: pool.label(row),
                costs: costs.required(row)?,
                estimated: estimated.value(row),
                tier: match tier.get(row) {
                    None => None,
                    Some(_) => Some(tier.named(row, [Tier::A, Tier::B, Tier::C], super::rows::tier)?),
                },
                basis: match gpu_us.signed(row) {
                    None => None,
                    Some(gpu_us) => Some(Basis { gpu_us, terms: terms(row), quality: quality.small(row)? }),
                },
                policy: policy.required(row)?.into(),
                booked_at: booked_at.required(row)?,
            })
        })
        .collect()
}

const QUALITIES: [UsageQuality; 3] = [UsageQuality::Reported, UsageQuality::Estimated, UsageQuality::Missing];
const ESTIMATES: [EstimateReason; 3] =
    [EstimateReason::UsageCounted, EstimateReason::Crash, EstimateReason::NearestPrice];
const UNPRICED: [UnpricedReason; 5] = [
    UnpricedReason::UnknownModel,
    UnpricedReason::UnknownRate,
    UnpricedReason::NoUsage,
    UnpricedReason::UnsupportedUnit,
    UnpricedReason::SelfHosted,
];
fn source_of(text: &str) -> Source {
    match text.split_once(':') {
        Some(("span", service)) => Source::Span(service.into()),
        Some(("import", name)) => Source::Import(name.into()),
        _ if text == "gateway" => Source::Gateway,
        _ => Source::Import(text.into()),
    }
}

/// Reads an attempt's id as `<request>#<number>`.
fn attempt_id(text: &str) -> Option<AttemptId> {
    let (request, number) = text.rsplit_once('#')?;
    Some(AttemptId { request: request.parse().ok()?, number: number.parse().ok()? })
}

fn origin(kind: &str, key: &str) -> Result<Origin, StoreError> {
    let read = match kind {
        "provider_charge" => attempt_id(key).map(Origin::ProviderCharge),
        "pool" => key.rsplit_once('@').and_then(|(pool, micros)| {
            let start = Timestamp::from_micros(micros.parse().ok()?);
            Some(Origin::Pool { pool: pool.into(), start })
        }),
        "invoice_line" => Some(Origin::InvoiceLine(key.into())),
        _ => None,
    };
    read.ok_or_else(|| StoreError::corrupt("origin", format!("`{kind}` `{key}` is no origin")))
}

struct Rows<'a>(&'a RecordBatch);

impl<'a> Rows<'a> {
    fn new(batch: &'a RecordBatch) -> Rows<'a> {
        Rows(batch)
    }

    fn column(&self, name: &str, wanted: &DataType) -> Result<ArrayRef, StoreError> {
        let column = self.0.column_by_name(name).ok_or_else(|| StoreError::corrupt(name, "the column is missing"))?;
        Ok(if column.data_type() == wanted { ArrayRef::clone(column) } else { cast(column, wanted)? })
    }

    fn texts(&self, name: &'static str) -> Result<Texts, StoreError> {
        Ok(Texts { name, column: self.column(name, &DataType::Utf8)?.as_string::<i32>().clone() })
    }

    fn counts(&self, name: &str) -> Result<Counts, StoreError> {
        let column = self.column(name, &DataType::Int64)?.as_primitive::<Int64Type>().clone();
        Ok(Counts { name: name.to_owned(), column })
    }

    fn times(&self, name: &'static str) -> Result<Times, StoreError> {
        let wanted = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        Ok(Times { name, column: self.column(name, &wanted)?.as_primitive::<TimestampMicrosecondType>().clone() })
    }

    fn money(&self, name: &'static str) -> Result<Amounts, StoreError> {
        let column = self.column(name, &DataType::Decimal128(38, 12))?.as_primitive::<Decimal128Type>().clone();
        Ok(Amounts { name, column })
    }

    fn all_money<const N: usize>(&self, names: [&'static str; N]) -> Result<[Amounts; N], StoreError> {
        let columns = names.iter().map(|name| self.money(name)).collect::<Result<Vec<_>, _>>()?;
        columns.try_into().map_err(|_| StoreError::corrupt("columns", "their number changed"))
    }

    fn flags(&self, name: &str) -> Result<BooleanArray, StoreError> {
        Ok(self.column(name, &DataType::Boolean)?.as_boolean().clone())
    }

    fn all_texts<const N: usize>(&self, names: [&'static str; N]) -> Result<[Texts; N], StoreError> {
        let columns = names.iter().map(|name| self.texts(name)).collect::<Result<Vec<_>, _>>()?;
        columns.try_into().map_err(|_| StoreError::corrupt("columns", "their number changed"))
    }

    fn all_counts<const N: usize>(&self, names: [&'static str; N]) -> Result<[Counts; N], StoreError> {
        let columns = names.iter().map(|name| self.counts(name)).collect::<Result<Vec<_>, _>>()?;
        columns.try_into().map_err(|_| StoreError::corrupt("columns", "their number changed"))
    }
}

struct Texts {
    name: &'static str,
    column: StringArray,
}

impl Texts {
    fn get(&self, row: usize) -> Option<&str> {
        self.column.is_valid(row).then(|| self.column.value(row))
    }

    fn label(&self, row: usize) -> Option<Label> {
        self.get(row).map(Label::from)
    }

    fn required(&self, row: usize) -> Result<&str, StoreError> {
        self.get(row).ok_or_else(|| StoreError::corrupt(self.name, "a value is missing"))
    }

    fn parsed<T: FromStr>(&self, row: usize) -> Result<T, StoreError> {
        let text = self.required(row)?;
        text.parse().map_err(|_| StoreError::corrupt(self.name, format!("`{text}` cannot be read")))
    }

    fn named<T: Copy, const N: usize>(
        &self,
        row: usize,
        all: [T; N],
        name: impl Fn(T) -> &'static str,
    ) -> Result<T, StoreError> {
        let text = self.required(row)?;
        let found = all.into_iter().find(|&one| name(one) == text);
        found.ok_or_else(|| StoreError::corrupt(self.name, format!("`{text}` is unknown")))
    }
}

struct Counts {
    name: String,
    column: Int64Array,
}

impl Counts {
    fn get(&self, row: usize) -> Result<Option<u64>, StoreError> {
        if self.column.is_null(row) {
            return Ok(None);
        }
        let count = self.column.value(row);
        u64::try_from(count).map(Some).map_err(|_| StoreError::corrupt(&self.name, format!("{count} is negative")))
    }

    fn signed(&self, row: usize) -> Option<i64> {
        self.column.is_valid(row).then(|| self.column.value(row))
    }

    fn required(&self, row: usize) -> Result<u64, StoreError> {
        self.get(row)?.ok_or_else(|| StoreError::corrupt(&self.name, "a value is missing"))
    }

    fn small<T: TryFrom<u64>>(&self, row: usize) -> Result<Option<T>, StoreError> {
        self.get(row)?
            .map(|count| {
                T::try_from(count).map_err(|_| StoreError::corrupt(&self.name, format!("{count} is too large")))
            })
            .transpose()
    }
}

struct Times {
    name: &'static str,
    column: TimestampMicrosecondArray,
}

impl Times {
    fn required(&self, row: usize) -> Result<Timestamp, StoreError> {
        let valid = self.column.is_valid(row).then(|| Timestamp::from_micros(self.column.value(row)));
        valid.ok_or_else(|| StoreError::corrupt(self.name, "a value is missing"))
    }
}

struct Amounts {
    name: &'static str,
    column: Decimal128Array,
}

impl Amounts {
    fn get(&self, row: usize) -> Option<Money> {
        self.column.is_valid(row).then(|| Money::from_pico(self.column.value(row)))
    }

    fn required(&self, row: usize) -> Result<Money, StoreError> {
        self.get(row).ok_or_else(|| StoreError::corrupt(self.name, "a value is missing"))
    }
}

struct CostColumns([Amounts; 4]);

impl CostColumns {
    fn new(rows: &Rows<'_>) -> Result<CostColumns, StoreError> {
        Ok(CostColumns(rows.all_money(["list_cost", "contracted_cost", "effective_cost", "billed_cost"])?))
    }

    fn required(&self, row: usize) -> Result<Costs, StoreError> {
        let [list, contracted, effective, billed] = &self.0;
        Ok(Costs {
            list_cost: list.required(row)?,
            contracted_cost: contracted.required(row)?,
            effective_cost: effective.required(row)?,
            billed_cost: billed.required(row)?,
        })
    }
}

pub(crate) struct AttemptIds {
    request: Texts,
    number: Counts,
}

impl AttemptIds {
    fn new(rows: &Rows<'_>) -> Result<AttemptIds, StoreError> {
        Ok(AttemptIds { request: rows.texts("request_id")?, number: rows.counts("attempt")? })
    }

    fn get(&self, row: usize) -> Result<Option<AttemptId>, StoreError> {
        if self.request.get(row).is_none() {
            return Ok(None);
        }
        self.required(row).map(Some)
    }

    fn required(&self, row: usize) -> Result<AttemptId, StoreError> {
        let request: RequestId = self.request.parsed(row)?;
        Ok(AttemptId { request, number: self.number.small(row)?.unwrap_or(0) })
    }
}

/// Reads only the ids of rows that have one.
pub(crate) fn attempt_ids_of(batch: &RecordBatch) -> Result<Vec<AttemptId>, StoreError> {
    let ids = AttemptIds::new(&Rows::new(batch))?;
    (0..batch.num_rows()).filter_map(|row| ids.get(row).transpose()).collect()
}

/// Reads only the ids of postings.
pub(crate) fn posting_ids_of(batch: &RecordBatch) -> Result<Vec<PostingId>, StoreError> {
    let column = Rows::new(batch).texts("posting_id")?;
    (0..batch.num_rows()).map(|row| column.parsed(row).map(PostingId::from_uuid)).collect()
}

struct Contexts {
    labels: [Texts; 12],
    tags: Texts,
}

impl Contexts {
    fn new(rows: &Rows<'_>) -> Result<Contexts, StoreError> {
        Ok(Contexts { labels: rows.all_texts(CONTEXT)?, tags: rows.texts("tags")? })
    }

    fn get(&self, row: usize) -> Result<Context, StoreError> {
        let [
            consumer,
            key_id,
            application,
            team,
            cost_centre,
            customer,
            feature,
            session,
            task,
            environment,
            trace_id,
            span_id,
        ] = &self.labels;
        let key_id = match key_id.get(row) {
            None => None,
            Some(_) => Some(KeyId::from_uuid(key_id.parsed(row)?)),
        };
        let tags = match self.tags.get(row) {
            None => BTreeMap::new(),
            Some(text) => serde_json::from_str(text).map_err(|error| StoreError::corrupt("tags", error))?,
        };
        Ok(Context {
            consumer: consumer.label(row),
            key_id,
            application: application.label(row),
            team: team.label(row),
            cost_centre: cost_centre.label(row),
            customer: customer.label(row),
            feature: feature.label(row),
            session: session.label(row),
            task: task.label(row),
            environment: environment.label(row),
            trace_id: trace_id.label(row),
            span_id: span_id.label(row),
            tags,
        })
    }
}
