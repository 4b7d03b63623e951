//! SQL over the ledger: every table united with the rows that are only in the log yet.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::dataframe::DataFrame;
use datafusion::datasource::MemTable;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::{BinaryExpr, LogicalPlan, Operator};
use datafusion::prelude::{Expr, SessionContext, col, lit};
use ledger::{Attempt, Posting, RequestId};

use crate::engine::{Reading, provider};
use crate::error::StoreError;
use crate::store::{Inner, Store, View};
use crate::tables::read::{attempts_of, postings_of};
use crate::tables::schema::TableName;
use crate::tail::{Rows, united};

/// Columns in which one value finds a few rows.
const IDS: [&str; 4] = ["request_id", "posting_id", "trace_id", "response_id"];

/// One consistent view of the ledger for any number of queries.
#[derive(Clone)]
pub struct Session {
    scan: SessionContext,
    look_up: SessionContext,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.scan.session_id()).finish_non_exhaustive()
    }
}

/// Everything about one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Its attempts, first to last.
    pub attempts: Vec<Attempt>,
    /// What was posted for them.
    pub postings: Vec<Posting>,
}

impl Store {
    /// Answers a `SELECT`. What was appended before is in the answer.
    ///
    /// # Errors
    /// [`StoreError::Sql`] when the query is wrong or is none.
    pub async fn sql(&self, query: &str) -> Result<Vec<RecordBatch>, StoreError> {
        self.session().await?.sql(query).await
    }

    /// Answers a `SELECT` piece by piece, for answers that do not fit memory.
    ///
    /// # Errors
    /// As [`sql`](Store::sql), and later ones in the stream.
    pub async fn sql_stream(&self, query: &str) -> Result<SendableRecordBatchStream, StoreError> {
        self.session().await?.sql_stream(query).await
    }

    /// A view of this moment.
    ///
    /// # Errors
    /// When tables or log cannot be read.
    pub async fn session(&self) -> Result<Session, StoreError> {
        let (view, tail) = united(&self.inner).await?;
        Session::of(&self.inner, &view, &tail).await
    }

    /// Finds one request by its id.
    ///
    /// # Errors
    /// When tables or log cannot be read.
    pub async fn find_request(&self, id: RequestId) -> Result<Found, StoreError> {
        let session = self.session().await?;
        let mut found = Found::default();
        for name in [TableName::Attempts, TableName::Postings] {
            let wanted = col("request_id").eq(lit(id.to_string()));
            for batch in session.look_up.table(name.as_str()).await?.filter(wanted)?.collect().await? {
                match name {
                    TableName::Attempts => found.attempts.extend(attempts_of(&batch)?),
                    _ => found.postings.extend(postings_of(&batch)?),
                }
            }
        }
        found.attempts.sort_by_key(|attempt| attempt.id);
        found.postings.sort_by_key(|posting| (posting.attempt, posting.id));
        Ok(found)
    }
}

impl Session {
    async fn of(inner: &Inner, view: &View, tail: &Rows) -> Result<Session, StoreError> {
        let session =
            Session { scan: inner.engine.session(Reading::Scan), look_up: inner.engine.session(Reading::LookUp) };
        for name in TableName::ALL {
            let fresh = tail.batch(name)?;
            for context in [&session.scan, &session.look_up] {
                register(context, view, name, &fresh).await?;
            }
        }
        Ok(session)
    }

    /// Answers a `SELECT`.
    ///
    /// # Errors
    /// As [`Store::sql`].
    pub async fn sql(&self, query: &str) -> Result<Vec<RecordBatch>, StoreError> {
        Ok(self.plan(query).await?.collect().await?)
    }

    /// Answers a `SELECT` piece by piece.
    ///
    /// # Errors
    /// As [`Store::sql_stream`].
    pub async fn sql_stream(&self, query: &str) -> Result<SendableRecordBatchStream, StoreError> {
        Ok(self.plan(query).await?.execute_stream().await?)
    }

    /// The engine's own session, for queries that are built rather than written.
    #[must_use]
    pub fn context(&self) -> &SessionContext {
        &self.scan
    }

    async fn plan(&self, query: &str) -> Result<DataFrame, StoreError> {
        let only_reading = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        let plan = self.scan.sql_with_options(query, only_reading).await?;
        if is_look_up(plan.logical_plan())? {
            Ok(self.look_up.sql_with_options(query, only_reading).await?)
        } else {
            Ok(plan)
        }
    }
}

async fn register(
    context: &SessionContext,
    view: &View,
    name: TableName,
    fresh: &RecordBatch,
) -> Result<(), StoreError> {
    let Some(table) = &view.tables[name.index()] else {
        context
            .register_table(name.as_str(), Arc::new(MemTable::try_new(fresh.schema(), vec![vec![fresh.clone()]])?))?;
        return Ok(());
    };
    let stored = provider(context, table).await?;
    if fresh.num_rows() == 0 {
        context.register_table(name.as_str(), stored)?;
        return Ok(());
    }
    let schema = stored.schema();
    let tail = MemTable::try_new(Arc::clone(&schema), vec![vec![conform(fresh, &schema)?]])?;
    let both = context.read_table(stored)?.union(context.read_table(Arc::new(tail))?)?;
    context.register_table(name.as_str(), both.into_view())?;
    Ok(())
}

/// The batch with the columns of `schema`. Columns that an older table lacks are left out, new ones are null.
fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, StoreError> {
    let columns = schema.fields().iter().map(|field| match batch.column_by_name(field.name()) {
        Some(column) => cast(column, field.data_type()),
        None => Ok(arrow::array::new_null_array(field.data_type(), batch.num_rows())),
    });
    Ok(RecordBatch::try_new(Arc::clone(schema), columns.collect::<Result<_, _>>()?)?)
}

/// Whether a filter names a value of an id, so that only a few rows are wanted.
fn is_look_up(plan: &LogicalPlan) -> Result<bool, StoreError> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::Filter(filter) = node {
            filter.predicate.apply(|expression| {
                found |= names_id(expression);
                Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
            })?;
        }
        Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(found)
}

fn names_id(expression: &Expr) -> bool {
    let is_id = |side: &Expr| matches!(side, Expr::Column(column) if IDS.contains(&column.name.as_str()));
    let is_value = |side: &Expr| matches!(side, Expr::Literal(..));
    match expression {
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) => {
            (is_id(left) && is_value(right)) || (is_value(left) && is_id(right))
        }
        Expr::InList(list) => {
            !list.negated && is_id(&list.expr) && list.list.len() <= 100 && list.list.iter().all(is_value)
        }
        _ => false,
    }
}
