//! A disk of a few megabytes that can be filled up and made read-only: a tmpfs of our own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A mounted tmpfs, unmounted when it goes out of scope.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts a disk of `mib` MiB at `folder`.
    ///
    /// # Errors
    /// One line that says why not; mounting needs root.
    pub fn mount(folder: &Path, mib: u32) -> Result<SmallDisk, String> {
        fs::create_dir_all(folder).map_err(|error| error.to_string())?;
        let size = format!("size={mib}m");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &folder.to_string_lossy()])?;
        Ok(SmallDisk { folder: folder.to_owned() })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes whatever is free, to the last byte. Says how many bytes that was.
    ///
    /// # Errors
    /// When writing fails for another reason than a full disk.
    pub fn fill(&self) -> io::Result<u64> {
        let mut file = File::options().create(true).append(true).open(self.filler())?;
        let block = vec![0x5a_u8; 1 << 20];
        let (mut size, mut total) = (block.len(), 0);
        while size > 0 {
            match file.write(&block[..size]) {
                Ok(written) => total += written as u64,
                Err(error) if error.kind() == io::ErrorKind::StorageFull => size /= 2,
                Err(error) => return Err(error),
            }
        }
        Ok(total)
    }

    /// Gives back what [`SmallDisk::fill`] took.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn free(&self) -> io::Result<()> {
        fs::remove_file(self.filler())
    }

    /// Makes the whole disk read-only. Nobody may have a file open for writing.
    ///
    /// # Errors
    /// One line that says why not.
    pub fn make_read_only(&self) -> Result<(), String> {
        run("mount", &["-o", "remount,ro", &self.folder.to_string_lossy()])
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, because a process under test may be on its way out still.
        let _ = run("umount", &["-l", &self.folder.to_string_lossy()]);
    }
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let done = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if done.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()) }
}
