//! Segments as files: `<first position>.log`, and the note of how far the log has been deleted.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::log::frame::{self, HEADER_BYTES, Position};

/// One file of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The position of its first record.
    pub first: Position,
    /// The file.
    pub path: PathBuf,
}

/// Where the segment that starts at `first` lies.
pub(crate) fn path_of(dir: &Path, first: Position) -> PathBuf {
    dir.join(format!("{:020}.log", first.0))
}

/// The segments in `dir`, oldest first. Other files are not ours and are left alone.
pub(crate) fn list(dir: &Path) -> Result<Vec<Segment>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io(format!("list {}", dir.display()))(error)),
    };
    let mut segments = Vec::new();
    for entry in entries {
        let path = entry.map_err(StoreError::io(format!("list {}", dir.display())))?.path();
        let first = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".log"))
            .filter(|stem| stem.len() == 20)
            .and_then(|stem| stem.parse().ok());
        if let Some(first) = first {
            segments.push(Segment { first: Position(first), path });
        }
    }
    segments.sort_by_key(|segment| segment.first);
    Ok(segments)
}

/// Refuses a log that another version of this program wrote.
pub(crate) fn check_format(ledger: &Path, dir: &Path) -> Result<(), StoreError> {
    for segment in list(dir)? {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        let limit = u64::try_from(HEADER_BYTES).unwrap_or(u64::MAX);
        let read = fs::File::open(&segment.path).and_then(|file| file.take(limit).read_to_end(&mut header));
        match read {
            Ok(_) => {}
            // A writer beside us has deleted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StoreError::io(format!("read {}", segment.path.display()))(error)),
        }
        if let Some(version) = frame::version(&header).filter(|&version| version != frame::VERSION) {
            let found = format!("its log has format {version}, this program writes {}", frame::VERSION);
            return Err(StoreError::Format { dir: ledger.to_owned(), found });
        }
    }
    Ok(())
}

/// The highest position of any deleted segment: positions up to here that are missing were deleted and not lost.
pub(crate) fn passed(dir: &Path) -> Position {
    let text = fs::read_to_string(dir.join("passed")).unwrap_or_default();
    Position(text.trim().parse().unwrap_or(0))
}

/// Notes that segments up to `position` are about to be deleted.
pub(crate) fn note_passed(dir: &Path, position: Position) -> Result<(), StoreError> {
    if position <= passed(dir) {
        return Ok(());
    }
    replace(&dir.join("passed"), format!("{position}\n").as_bytes())
}

/// Writes a small file so that it has either its old or its new content after a crash.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let fresh = path.with_extension("new");
    let write = || {
        let mut file = fs::File::create(&fresh)?;
        file.write_all(content)?;
        file.sync_data()?;
        fs::rename(&fresh, path)
    };
    write().map_err(StoreError::io(format!("write {}", path.display())))
}
