//! The columns of every table. Text is Utf8, counts Int64, money Decimal128(38,12), times UTC microseconds, days Date32.

use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use ledger::TokenKind;

use crate::tables::facts;

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
    /// One row per observation of an engine process.
    Engines,
    /// One row per reading of an engine's counters.
    Readings,
    /// One row per step of an engine.
    Steps,
    /// One row per call that somebody told of.
    Spans,
    /// One row per observation of a job.
    Jobs,
    /// One row per reading of a GPU.
    Gpus,
    /// One row per decision of a scaler.
    Decisions,
}

/// How many tables there are.
pub(crate) const TABLES: usize = TableName::ALL.len();

/// One of something for each table, by [`TableName::index`].
pub(crate) type PerTable<T> = [T; TABLES];

impl TableName {
    /// Every table, in the order of their commits.
    pub const ALL: [TableName; 11] = [
        TableName::Attempts,
        TableName::Postings,
        TableName::Capacity,
        TableName::Gaps,
        TableName::Engines,
        TableName::Readings,
        TableName::Steps,
        TableName::Spans,
        TableName::Jobs,
        TableName::Gpus,
        TableName::Decisions,
    ];

    /// The name in SQL and of the folder.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            TableName::Attempts => "attempts",
            TableName::Postings => "postings",
            TableName::Capacity => "capacity",
            TableName::Gaps => "gaps",
            TableName::Engines => "engines",
            TableName::Readings => "readings",
            TableName::Steps => "steps",
            TableName::Spans => "spans",
            TableName::Jobs => "jobs",
            TableName::Gpus => "gpus",
            TableName::Decisions => "decisions",
        }
    }

    /// The columns.
    #[must_use]
    pub fn schema(self) -> SchemaRef {
        static SCHEMAS: LazyLock<PerTable<SchemaRef>> = LazyLock::new(|| TableName::ALL.map(columns));
        Arc::clone(&SCHEMAS[self.index()])
    }

    /// The columns whose smallest and largest values each commit notes, so that files can be skipped.
    #[must_use]
    pub const fn statistics(self) -> &'static str {
        match self {
            TableName::Attempts => "request_id,received_at",
            TableName::Postings => "request_id,posting_id,period_start",
            TableName::Capacity => "pool,period_start",
            TableName::Jobs => "pool,period_start",
            TableName::Engines => "engine,period_start",
            TableName::Readings => "engine,read_at",
            TableName::Steps => "engine,started_at",
            TableName::Gaps | TableName::Spans => "period_start",
            TableName::Gpus => "uuid,read_at",
            TableName::Decisions => "deployment,decided_at",
        }
    }

    /// The column that says when a row happened; the partition is its day.
    #[must_use]
    pub const fn time(self) -> &'static str {
        match self {
            TableName::Attempts => "received_at",
            TableName::Readings | TableName::Gpus => "read_at",
            TableName::Steps => "started_at",
            TableName::Decisions => "decided_at",
            _ => "period_start",
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
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

/// The parts of an amount by the term of the step-time model that caused it.
pub(crate) const TERMS: [&str; 4] = ["term_overhead", "term_weights", "term_kv", "term_compute"];

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

fn columns(table: TableName) -> SchemaRef {
    match table {
        TableName::Attempts => attempts(),
        TableName::Postings => postings(),
        facts => Arc::new(Schema::new([vec![day()], facts::fields(facts)].concat())),
    }
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
            "queued_us",
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
    fields.extend([flag("estimated"), text("tier"), count("gpu_us")]);
    fields.extend(TERMS.map(money));
    fields.extend([count("quality"), text("policy"), time("booked_at")]);
    Arc::new(Schema::new(fields))
}
