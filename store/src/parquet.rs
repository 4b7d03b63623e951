//! Rows as Parquet files of their own: what comes from elsewhere, and what is handed on.

use std::fs::File;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use deltalake::parquet::arrow::ArrowWriter;
use deltalake::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use deltalake::parquet::basic::Compression;
use deltalake::parquet::errors::ParquetError;
use deltalake::parquet::file::properties::WriterProperties;

use crate::error::StoreError;

/// The first bytes of every Parquet file.
pub const MAGIC: &[u8; 4] = b"PAR1";

/// Rows that are read at once.
const BATCH_ROWS: usize = 8_192;

/// Reads a Parquet file batch by batch.
#[derive(Debug)]
pub struct Reader {
    batches: ParquetRecordBatchReader,
    schema: SchemaRef,
    rows: u64,
}

impl Reader {
    /// Opens a file.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it is no Parquet file.
    pub fn open(file: File) -> Result<Reader, StoreError> {
        let broken = |error: ParquetError| StoreError::corrupt("the Parquet file", error);
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(broken)?;
        let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let schema = SchemaRef::clone(builder.schema());
        let batches = builder.with_batch_size(BATCH_ROWS).build().map_err(broken)?;
        Ok(Reader { batches, schema, rows })
    }

    /// Its columns.
    #[must_use]
    pub fn schema(&self) -> SchemaRef {
        SchemaRef::clone(&self.schema)
    }

    /// How many rows it says that it holds.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.rows
    }
}

impl Iterator for Reader {
    type Item = Result<RecordBatch, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.batches.next()?.map_err(|error| StoreError::corrupt("the Parquet file", error)))
    }
}

/// Writes a Parquet file batch by batch. A file that is not finished is none.
#[derive(Debug)]
pub struct Writer(ArrowWriter<File>);

impl Writer {
    /// Begins a file with these columns.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(file: File, columns: SchemaRef) -> Result<Writer, StoreError> {
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        Ok(Writer(ArrowWriter::try_new(file, columns, Some(properties)).map_err(refused)?))
    }

    /// Adds rows.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        self.0.write(batch).map_err(refused)
    }

    /// Ends the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(self) -> Result<(), StoreError> {
        self.0.close().map(|_| ()).map_err(refused)
    }
}

fn refused(error: ParquetError) -> StoreError {
    StoreError::io("write the Parquet file")(std::io::Error::other(error))
}
