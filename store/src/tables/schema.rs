//! The columns of every table. Text is Utf8, counts Int64, money Decimal128(38,12), times UTC microseconds, days Date32.

use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use ledger::TokenKind;

/// The partition column of every table: the UTC day of the row.
pub const DAY: &str = "day";

/// A table of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableName {
    /// One row per attempt.
    Attempts,
    /// One row per allocated amount.
    Postings,
    /// One row per observation of GPUs.
    Capacity,
    /// One row per time in which metering was blind.
    Gaps,
}

impl TableName {
    /// Every table, in the order of their commits.
    pub const ALL: [TableName; 4] = [TableName::Attempts, TableName::Postings, TableName::Capacity, TableName::Gaps];

    /// The name in SQL and of the folder.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            TableName::Attempts => "attempts",
            TableName::Postings => "postings",
            TableName::Capacity => "capacity",
            TableName::Gaps => "gaps",
        }
    }

    /// The columns.
    #[must_use]
    pub fn schema(self) -> SchemaRef {
        static SCHEMAS: LazyLock<[SchemaRef; 4]> = LazyLock::new(|| [attempts(), postings(), capacity(), gaps()]);
        Arc::clone(&SCHEMAS[self.index()])
    }

    /// The columns whose smallest and largest values each commit notes, so that files can be skipped.
    #[must_use]
    pub const fn statistics(self) -> &'static str {
        match self {
            TableName::Attempts => "request_id,received_at",
            TableName::Postings => "request_id,posting_id,period_start",
            TableName::Capacity => "pool,period_start",
            TableName::Gaps => "period_start",
        }
    }

    pub(crate) const fn index(self) -> usize {
        match self {
            TableName::Attempts => 0,
            TableName::Postings => 1,
            TableName::Capacity => 2,
            TableName::Gaps => 3,
        }
    }
}

/// The column of one kind of token. `input_tokens` and `output_tokens` are the totals, so plain text has longer names.
#[must_use]
pub fn token_column(kind: TokenKind) -> String {
    match kind {
        TokenKind::Input => "uncached_input_tokens".to_owned(),
        TokenKind::Output => "text_output_tokens".to_owned(),
        other => format!("{other}_tokens"),
    }
}

pub(crate) const CONTEXT: [&str; 12] = [
    "consumer",
    "key_id",
    "application",
    "team",
    "cost_centre",
    "customer",
    "feature",
    "session",
    "task",
    "environment",
    "trace_id",
    "span_id",
];

fn text(name: &str) -> Field {
    Field::new(name, DataType::Utf8, true)
}

fn count(name: &str) -> Field {
    Field::new(name, DataType::Int64, true)
}

fn flag(name: &str) -> Field {
    Field::new(name, DataType::Boolean, true)
}

fn time(name: &str) -> Field {
    Field::new(name, DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), true)
}

fn money(name: &str) -> Field {
    Field::new(name, DataType::Decimal128(38, 12), true)
}

fn day() -> Field {
    Field::new(DAY, DataType::Date32, true)
}

fn costs() -> [Field; 4] {
    ["list_cost", "contracted_cost", "effective_cost", "billed_cost"].map(money)
}

fn context() -> Vec<Field> {
    CONTEXT.iter().map(|name| text(name)).chain([text("tags")]).collect()
}

fn attempts() -> SchemaRef {
    let mut fields = vec![day(), text("request_id"), count("attempt"), text("source")];
    fields.extend(context());
    fields.extend(
        [
            "operation",
            "provider",
            "upstream",
            "pool",
            "deployment",
            "request_model",
            "response_model",
            "model",
            "response_id",
            "service_class",
        ]
        .map(text),
    );
    fields.extend([flag("streamed"), time("received_at")]);
    fields.extend(
        [
            "admitted_us",
            "sent_us",
            "first_byte_us",
            "first_token_us",
            "last_token_us",
            "finished_us",
            "gap_count",
            "gap_total_us",
            "gap_max_us",
        ]
        .map(count),
    );
    fields.extend([text("outcome"), count("status")]);
    fields.extend(TokenKind::ALL.map(|kind| count(&token_column(kind))));
    fields.extend([
        count("input_tokens"),
        count("output_tokens"),
        text("usage_quality"),
        text("charge"),
        text("charge_reason"),
    ]);
    fields.extend(costs());
    fields.push(text("rates"));
    Arc::new(Schema::new(fields))
}

fn postings() -> SchemaRef {
    let mut fields = vec![
        day(),
        text("posting_id"),
        text("origin_kind"),
        text("origin_key"),
        text("line"),
        time("period_start"),
        time("period_end"),
        text("request_id"),
        count("attempt"),
    ];
    fields.extend(context());
    fields.extend(["provider", "model", "pool"].map(text));
    fields.extend(costs());
    fields.extend([flag("estimated"), text("tier"), text("policy"), time("booked_at")]);
    Arc::new(Schema::new(fields))
}

fn capacity() -> SchemaRef {
    let mut fields = vec![day()];
    fields.extend(["pool", "replica", "deployment", "owner", "gpu"].map(text));
    fields.extend([
        count("gpus"),
        money("usd_per_gpu_hour"),
        text("purchase"),
        time("period_start"),
        time("period_end"),
        time("observed_at"),
    ]);
    Arc::new(Schema::new(fields))
}

fn gaps() -> SchemaRef {
    Arc::new(Schema::new(vec![day(), time("period_start"), time("period_end"), count("records_lost"), text("cause")]))
}
