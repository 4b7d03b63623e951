//! Facts that are rows as they are: appended, and the same row is there once. A new one is a variant here and a [`TableName`].

use arrow::array::{ArrayRef, Date32Array, RecordBatch};
use arrow::datatypes::{DataType, Field};
use ledger::{
    CallSpan, CapacityFact, Context, EngineFact, EngineReading, EngineStep, Fact, Gap, GpuReading, JobFact,
    ScalingDecision, Timestamp, TokenKind,
};

use crate::error::StoreError;
use crate::tables::cells::{self, Kept, Row, Value, Visit};
use crate::tables::schema::{TableName, token_column};

/// What makes a row the same row: a hash of what is kept of it.
pub(crate) type RowKey = u128;

/// The table that a fact is a row of as it is. Attempts and postings are rows in a way of their own.
pub(crate) const fn table_of(fact: &Fact) -> Option<TableName> {
    Some(match fact {
        Fact::Opened(_) | Fact::Attempt(_) | Fact::Posting(_) => return None,
        Fact::Capacity(_) => TableName::Capacity,
        Fact::Gap(_) => TableName::Gaps,
        Fact::Engine(_) => TableName::Engines,
        Fact::Reading(_) => TableName::Readings,
        Fact::Step(_) => TableName::Steps,
        Fact::Span(_) => TableName::Spans,
        Fact::Job(_) => TableName::Jobs,
        Fact::Gpu(_) => TableName::Gpus,
        Fact::Decision(_) => TableName::Decisions,
    })
}

/// A row of a table with nothing in it.
fn blank(table: TableName) -> Option<Fact> {
    Some(match table {
        TableName::Attempts | TableName::Postings => return None,
        TableName::Capacity => Fact::Capacity(Box::default()),
        TableName::Gaps => Fact::Gap(Gap::default()),
        TableName::Engines => Fact::Engine(Box::default()),
        TableName::Readings => Fact::Reading(Box::default()),
        TableName::Steps => Fact::Step(Box::default()),
        TableName::Spans => Fact::Span(Box::default()),
        TableName::Jobs => Fact::Job(Box::default()),
        TableName::Gpus => Fact::Gpu(Box::default()),
        TableName::Decisions => Fact::Decision(Box::default()),
    })
}

fn row_of(fact: &mut Fact) -> Option<&mut dyn Row> {
    Some(match fact {
        Fact::Opened(_) | Fact::Attempt(_) | Fact::Posting(_) => return None,
        Fact::Capacity(row) => row.as_mut(),
        Fact::Gap(row) => row,
        Fact::Engine(row) => row.as_mut(),
        Fact::Reading(row) => row.as_mut(),
        Fact::Step(row) => row.as_mut(),
        Fact::Span(row) => row.as_mut(),
        Fact::Job(row) => row.as_mut(),
        Fact::Gpu(row) => row.as_mut(),
        Fact::Decision(row) => row.as_mut(),
    })
}

/// The columns of a table of facts, after the day.
pub(crate) fn columns(table: TableName) -> Vec<(String, DataType)> {
    blank(table).as_mut().and_then(row_of).map(cells::columns).unwrap_or_default()
}

/// The same as fields.
pub(crate) fn fields(table: TableName) -> Vec<Field> {
    columns(table).into_iter().map(|(name, data_type)| Field::new(name, data_type, true)).collect()
}

/// Facts of one table as its rows.
pub(crate) fn batch(table: TableName, facts: &[Fact]) -> Result<RecordBatch, StoreError> {
    let columns = columns(table);
    let mut values: Vec<Vec<Value>> = vec![Vec::with_capacity(facts.len()); columns.len()];
    let mut days = Vec::with_capacity(facts.len());
    for fact in facts {
        let mut fact = fact.clone();
        let Some(row) = row_of(&mut fact) else { continue };
        days.push(row.at().day());
        for (column, value) in values.iter_mut().zip(cells::values(row)?) {
            column.push(value);
        }
    }
    let mut arrays: Vec<ArrayRef> = vec![std::sync::Arc::new(Date32Array::from(days))];
    for ((_, data_type), values) in columns.iter().zip(&values) {
        arrays.push(cells::array(data_type, values)?);
    }
    Ok(RecordBatch::try_new(table.schema(), arrays)?)
}

/// When a fact is found and its key.
pub(crate) fn time_and_key(fact: &Fact) -> Option<(Timestamp, RowKey)> {
    let mut fact = fact.clone();
    let row = row_of(&mut fact)?;
    Some((row.at(), cells::key(&cells::values(row).ok()?)))
}

/// The keys of rows that a table keeps.
pub(crate) fn keys(table: TableName, batch: &RecordBatch) -> Result<Vec<RowKey>, StoreError> {
    let kept = Kept::new(batch, &columns(table))?;
    Ok((0..kept.len()).map(|index| kept.key(index)).collect())
}

fn read<T>(table: TableName, batch: &RecordBatch, of: impl Fn(Fact) -> Option<T>) -> Result<Vec<T>, StoreError> {
    let kept = Kept::new(batch, &columns(table))?;
    let mut facts = Vec::with_capacity(kept.len());
    for index in 0..kept.len() {
        let Some(mut fact) = blank(table) else { continue };
        if let Some(row) = row_of(&mut fact) {
            kept.read(index, row)?;
        }
        facts.extend(of(fact));
    }
    Ok(facts)
}

macro_rules! readers {
    ($($(#[$doc:meta])* $name:ident: $variant:ident($fact:ident) in $table:ident, $read:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`StoreError::Corrupt`] when a column is missing or a value is none that this program writes.
        pub fn $name(batch: &RecordBatch) -> Result<Vec<$fact>, StoreError> {
            read(TableName::$table, batch, |fact| if let Fact::$variant(fact) = fact { Some($read(fact)) } else { None })
        }
    )*};
}

#[expect(clippy::boxed_local, reason = "most facts come in boxes; this is how they are taken out")]
fn unboxed<T>(fact: Box<T>) -> T {
    *fact
}

readers! {
    /// Reads rows of `capacity`.
    capacity_of: Capacity(CapacityFact) in Capacity, unboxed;
    /// Reads rows of `gaps`.
    gaps_of: Gap(Gap) in Gaps, std::convert::identity;
    /// Reads rows of `engines`.
    engines_of: Engine(EngineFact) in Engines, unboxed;
    /// Reads rows of `readings`.
    readings_of: Reading(EngineReading) in Readings, unboxed;
    /// Reads rows of `steps`.
    steps_of: Step(EngineStep) in Steps, unboxed;
    /// Reads rows of `spans`.
    spans_of: Span(CallSpan) in Spans, unboxed;
    /// Reads rows of `jobs`.
    jobs_of: Job(JobFact) in Jobs, unboxed;
    /// Reads rows of `gpus`.
    gpus_of: Gpu(GpuReading) in Gpus, unboxed;
    /// Reads rows of `decisions`.
    decisions_of: Decision(ScalingDecision) in Decisions, unboxed;
}

/// The columns of who caused something. `trace` and `span` are the names of the last two where a row has such columns of its own.
fn context(who: &mut Context, [trace, span]: [&str; 2], visit: &mut Visit<'_>) -> Result<(), StoreError> {
    visit("consumer", &mut who.consumer)?;
    visit("key_id", &mut who.key_id)?;
    visit("application", &mut who.application)?;
    visit("team", &mut who.team)?;
    visit("cost_centre", &mut who.cost_centre)?;
    visit("customer", &mut who.customer)?;
    visit("feature", &mut who.feature)?;
    visit("session", &mut who.session)?;
    visit("task", &mut who.task)?;
    visit("environment", &mut who.environment)?;
    visit(trace, &mut who.trace_id)?;
    visit(span, &mut who.span_id)?;
    visit("tags", &mut who.tags)
}

const TRACE: [&str; 2] = ["trace_id", "span_id"];

impl Row for CapacityFact {
    fn at(&self) -> Timestamp {
        self.period.start
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("pool", &mut self.pool)?;
        visit("replica", &mut self.replica)?;
        visit("deployment", &mut self.deployment)?;
        visit("owner", &mut self.owner)?;
        visit("gpu", &mut self.gpu)?;
        visit("gpus", &mut self.gpus)?;
        visit("usd_per_gpu_hour", &mut self.rate)?;
        visit("purchase", &mut self.purchase)?;
        visit("period_start", &mut self.period.start)?;
        visit("period_end", &mut self.period.end)?;
        visit("observed_at", &mut self.observed_at)
    }
}

impl Row for Gap {
    fn at(&self) -> Timestamp {
        self.period.start
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("period_start", &mut self.period.start)?;
        visit("period_end", &mut self.period.end)?;
        visit("records_lost", &mut self.records_lost)?;
        visit("cause", &mut self.cause)
    }
}

impl Row for EngineFact {
    fn at(&self) -> Timestamp {
        self.period.start
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("engine", &mut self.engine)?;
        visit("pool", &mut self.pool)?;
        visit("replica", &mut self.replica)?;
        visit("model", &mut self.model)?;
        visit("setup", &mut self.setup)?;
        visit("adapters", &mut self.adapters)?;
        visit("ready_at", &mut self.ready_at)?;
        // Warm for somebody unknown is not the same as not warm.
        let mut warm = self.warm_for.is_some();
        visit("warm", &mut warm)?;
        let mut who = self.warm_for.take().unwrap_or_default();
        context(&mut who, TRACE, visit)?;
        self.warm_for = warm.then_some(who);
        visit("period_start", &mut self.period.start)?;
        visit("period_end", &mut self.period.end)?;
        visit("observed_at", &mut self.observed_at)
    }
}

impl Row for EngineReading {
    fn at(&self) -> Timestamp {
        self.at
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("engine", &mut self.engine)?;
        visit("pool", &mut self.pool)?;
        visit("read_at", &mut self.at)?;
        visit("running", &mut self.running)?;
        visit("waiting", &mut self.waiting)?;
        visit("kv_used_millionths", &mut self.kv_used)?;
        visit("asleep", &mut self.asleep)?;
        visit("prompt_tokens", &mut self.prompt_tokens)?;
        visit("cached_tokens", &mut self.cached_tokens)?;
        visit("generation_tokens", &mut self.generation_tokens)?;
        visit("steps", &mut self.steps)?;
        visit("preemptions", &mut self.preemptions)?;
        visit("finished", &mut self.finished)?;
        visit("drafted_tokens", &mut self.drafted_tokens)?;
        visit("accepted_tokens", &mut self.accepted_tokens)?;
        visit("busy_us", &mut self.busy_us)?;
        visit("kv_tokens", &mut self.kv_tokens)
    }
}

impl Row for EngineStep {
    fn at(&self) -> Timestamp {
        self.at
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("engine", &mut self.engine)?;
        visit("rank", &mut self.rank)?;
        visit("sequence", &mut self.sequence)?;
        visit("started_at", &mut self.at)?;
        visit("wall_us", &mut self.wall_us)?;
        visit("prefill_requests", &mut self.prefill_requests)?;
        visit("prefill_tokens", &mut self.prefill_tokens)?;
        visit("prefill_kv_tokens", &mut self.prefill_kv_tokens)?;
        visit("decode_requests", &mut self.decode_requests)?;
        visit("decode_kv_tokens", &mut self.decode_kv_tokens)
    }
}

impl Row for CallSpan {
    fn at(&self) -> Timestamp {
        self.period.start
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("trace_id", &mut self.trace_id)?;
        visit("span_id", &mut self.span_id)?;
        visit("parent_span_id", &mut self.parent_span_id)?;
        visit("service", &mut self.service)?;
        visit("engine", &mut self.engine)?;
        visit("operation", &mut self.operation)?;
        visit("provider", &mut self.provider)?;
        visit("request_model", &mut self.request_model)?;
        visit("response_model", &mut self.response_model)?;
        visit("response_id", &mut self.response_id)?;
        visit("period_start", &mut self.period.start)?;
        visit("period_end", &mut self.period.end)?;
        for kind in TokenKind::ALL {
            visit(&token_column(kind), self.usage.get_mut(kind))?;
        }
        // The totals are there to be read in SQL; they follow from the kinds.
        visit("input_tokens", &mut self.usage.input_tokens())?;
        visit("output_tokens", &mut self.usage.output_tokens())?;
        visit("usage_quality", &mut self.usage_quality)?;
        visit("queue_us", &mut self.queue_us)?;
        visit("first_token_us", &mut self.first_token_us)?;
        visit("prefill_us", &mut self.prefill_us)?;
        visit("decode_us", &mut self.decode_us)?;
        visit("failed", &mut self.failed)?;
        context(&mut self.context, ["caller_trace_id", "caller_span_id"], visit)?;
        visit("observed_at", &mut self.observed_at)
    }
}

impl Row for JobFact {
    fn at(&self) -> Timestamp {
        self.period.start
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("job", &mut self.job)?;
        visit("pool", &mut self.pool)?;
        visit("replica", &mut self.replica)?;
        context(&mut self.context, TRACE, visit)?;
        visit("share_millionths", &mut self.share)?;
        visit("period_start", &mut self.period.start)?;
        visit("period_end", &mut self.period.end)?;
        visit("source", &mut self.source)?;
        visit("observed_at", &mut self.observed_at)
    }
}

impl Row for GpuReading {
    fn at(&self) -> Timestamp {
        self.at
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("host", &mut self.host)?;
        visit("uuid", &mut self.uuid)?;
        visit("gpu", &mut self.gpu)?;
        visit("slice", &mut self.slice)?;
        visit("pool", &mut self.pool)?;
        visit("namespace", &mut self.namespace)?;
        visit("pod", &mut self.pod)?;
        visit("container", &mut self.container)?;
        visit("read_at", &mut self.at)?;
        visit("engine_active_millionths", &mut self.engine_active)?;
        visit("tensor_active_millionths", &mut self.tensor_active)?;
        visit("memory_active_millionths", &mut self.memory_active)?;
        visit("utilisation_millionths", &mut self.utilisation)?;
        visit("memory_used_bytes", &mut self.memory_used_bytes)?;
        visit("memory_total_bytes", &mut self.memory_total_bytes)?;
        visit("power_mw", &mut self.power_mw)?;
        visit("energy_mj", &mut self.energy_mj)
    }
}

impl Row for ScalingDecision {
    fn at(&self) -> Timestamp {
        self.at
    }

    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        visit("pool", &mut self.pool)?;
        visit("deployment", &mut self.deployment)?;
        visit("decided_at", &mut self.at)?;
        visit("mode", &mut self.mode)?;
        visit("policy", &mut self.policy)?;
        visit("ready", &mut self.ready)?;
        visit("pending", &mut self.pending)?;
        visit("wanted", &mut self.wanted)?;
        visit("desired", &mut self.desired)?;
        visit("told", &mut self.told)?;
        visit("static_replicas", &mut self.static_replicas)?;
        visit("committed_replicas", &mut self.committed)?;
        visit("gpus", &mut self.gpus)?;
        visit("usd_per_gpu_hour", &mut self.rate)?;
        visit("reasons", &mut self.reasons)?;
        visit("guards", &mut self.guards)?;
        visit("running", &mut self.inputs.running)?;
        visit("waiting", &mut self.inputs.waiting)?;
        visit("kv_used_millionths", &mut self.inputs.kv_used)?;
        visit("load_thousandths", &mut self.inputs.load_milli)?;
        visit("forecast_thousandths", &mut self.inputs.forecast_milli)?;
        visit("arrivals_per_s_thousandths", &mut self.inputs.arrivals_milli)?;
        visit("input_tokens_per_s", &mut self.inputs.input_tokens_per_s)?;
        visit("output_tokens_per_s", &mut self.inputs.output_tokens_per_s)?;
        visit("ttft_us", &mut self.inputs.ttft_us)?;
        visit("tpot_us", &mut self.inputs.tpot_us)?;
        visit("stale_us", &mut self.inputs.stale_us)?;
        visit("failure", &mut self.failure)
    }
}
