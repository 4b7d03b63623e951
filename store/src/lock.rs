//! One writer per ledger: an operating-system lock on a file in its folder, which ends with the process however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::StoreError;

/// The lock, held as long as this lives.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the lock of `dir`.
    ///
    /// # Errors
    /// [`StoreError::Locked`] with the holder's process id when another process has it.
    pub(crate) fn take(dir: &Path) -> Result<FolderLock, StoreError> {
        let path = dir.join("lock");
        let action = || format!("open {}", path.display());
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(StoreError::io(action()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { dir: dir.to_owned(), holder: holder(&mut file) });
            }
            Err(TryLockError::Error(error)) => return Err(StoreError::io(format!("lock {}", path.display()))(error)),
        }
        // Who holds it is for people; failing to say so is no reason to refuse.
        let note = format!("process {}\n", std::process::id());
        let written = file.set_len(0).and_then(|()| file.write_all(note.as_bytes()));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot note the process id in the lock file");
        }
        Ok(FolderLock { _file: file })
    }
}

fn holder(file: &mut File) -> String {
    let mut note = String::new();
    let read = file.rewind().and_then(|()| file.take(200).read_to_string(&mut note));
    match read {
        Ok(_) if !note.trim().is_empty() => note.trim().to_owned(),
        _ => "another process".to_owned(),
    }
}
