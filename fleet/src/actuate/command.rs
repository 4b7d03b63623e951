//! Programs of somebody's own: one is told how many replicas there should be, another says how many there are.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Actual, ActuateError, group, webhook};

/// Most of a program's words that are repeated in an error.
const REPEATED_BYTES_MAX: usize = 200;
/// Most of them that is kept at all.
const PRINTED_BYTES_MAX: usize = 65_536;
/// Wait for the last words of a program that has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The programs. Neither goes through a shell.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Told: run with `FARTHING_REPLICAS` and `FARTHING_KEY` set; `{replicas}` in an argument is replaced. It ends with
    /// status 0 when it was done.
    pub tell: Vec<String>,
    /// Asked: it prints `{"replicas": 3}`, and `"ready"` when it knows. Without it nobody is asked.
    #[serde(default)]
    pub read: Option<Vec<String>>,
    /// Milliseconds that each may take; then it is killed.
    #[serde(default = "half_a_minute")]
    pub ms_max: u64,
}

const fn half_a_minute() -> u64 {
    30_000
}

impl Command {
    pub(super) fn check(&self) -> Result<(), String> {
        let empty = |program: &Vec<String>| program.first().is_none_or(String::is_empty);
        if empty(&self.tell) || self.read.as_ref().is_some_and(empty) {
            return Err("a command needs a program: tell = [\"program\", \"argument\"]".to_owned());
        }
        Ok(())
    }

    pub(super) async fn read(&self, folder: &Path) -> Result<Option<Actual>, ActuateError> {
        let Some(read) = &self.read else { return Ok(None) };
        let printed = self.run(folder, read, &[]).await?;
        webhook::understood(&read[0], &printed).map(Some)
    }

    pub(super) async fn tell(&self, folder: &Path, replicas: u32, key: &str) -> Result<(), ActuateError> {
        let replicas = replicas.to_string();
        let tell: Vec<String> = self.tell.iter().map(|word| word.replace("{replicas}", &replicas)).collect();
        self.run(folder, &tell, &[("FARTHING_REPLICAS", &replicas), ("FARTHING_KEY", key)]).await.map(|_| ())
    }

    async fn run(&self, folder: &Path, words: &[String], said: &[(&str, &str)]) -> Result<Vec<u8>, ActuateError> {
        let what = words.first().cloned().unwrap_or_default();
        let failed = |error: io::Error| ActuateError::Unreachable { what: what.clone(), cause: error.to_string() };
        let mut command = tokio::process::Command::new(&what);
        command.args(words.get(1..).unwrap_or_default()).envs(said.iter().copied()).current_dir(folder);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        // Whether time runs out or nobody waits any more, it goes with everything that it started.
        let hold = group::Hold::on(child.id());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (mut printed, mut complained) = (Vec::new(), Vec::new());
        let patience = Duration::from_millis(self.ms_max);
        let ended = {
            let mut listening =
                pin!(async { tokio::join!(listen(stdout, &mut printed), listen(stderr, &mut complained)) });
            tokio::time::timeout(patience, async {
                tokio::select! {
                    ended = child.wait() => {
                        // Something that it left behind may keep these open for ever.
                        let _ = tokio::time::timeout(LAST_WORDS, listening).await;
                        ended
                    }
                    _ = &mut listening => child.wait().await,
                }
            })
            .await
        };
        let ended = ended.map_err(|_| ActuateError::TimedOut { what: what.clone(), after: patience })?;
        hold.let_go();
        let ended = ended.map_err(failed)?;
        tracing::debug!(what, status = %ended, printed = %start_of(&printed), complained = %start_of(&complained), "ran");
        if ended.success() {
            return Ok(printed);
        }
        Err(ActuateError::Refused { cause: format!("{ended}: {}", start_of(&complained)), what })
    }
}

/// Reads to the end and keeps the beginning, so that nobody who says much has to wait for a reader.
async fn listen(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut chunk = [0; 4_096];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        let room = PRINTED_BYTES_MAX.saturating_sub(into.len());
        into.extend_from_slice(&chunk[..read.min(room)]);
    }
}

fn start_of(words: &[u8]) -> String {
    String::from_utf8_lossy(words.get(..REPEATED_BYTES_MAX).unwrap_or(words)).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(script: &str) -> Command {
        let shell = |script: &str| ["sh", "-c", script].map(str::to_owned).to_vec();
        Command { tell: shell(script), read: Some(shell("cat told")), ms_max: 2_000 }
    }

    #[tokio::test]
    async fn a_program_is_told_and_asked() {
        let folder = tempfile::tempdir().unwrap();
        let command =
            of("printf '{\"replicas\": %s}' {replicas} > told; echo \"$FARTHING_KEY $FARTHING_REPLICAS\" >> keys");
        for _ in 0..2 {
            command.tell(folder.path(), 3, "k/1").await.unwrap();
        }
        assert_eq!(command.read(folder.path()).await.unwrap().unwrap().replicas, 3);
        assert_eq!(std::fs::read_to_string(folder.path().join("keys")).unwrap(), "k/1 3\nk/1 3\n");
    }

    #[tokio::test]
    async fn what_goes_wrong_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let refused = of("echo no GPU left >&2; exit 3").tell(folder.path(), 1, "k").await.unwrap_err().to_string();
        assert!(refused.contains("no GPU left") && refused.contains('3'), "{refused}");
        let mut slow = of("sleep 20");
        slow.ms_max = 50;
        assert!(matches!(slow.tell(folder.path(), 1, "k").await, Err(ActuateError::TimedOut { .. })));
        let mut parent = of("sleep 30 & echo $! > child; wait");
        parent.ms_max = 300;
        assert!(matches!(parent.tell(folder.path(), 1, "k").await, Err(ActuateError::TimedOut { .. })));
        let child: u32 = std::fs::read_to_string(folder.path().join("child")).unwrap().trim().parse().unwrap();
        let begun = tokio::time::Instant::now();
        while group::Mark::of(child).is_some() {
            assert!(begun.elapsed() < Duration::from_secs(5), "what it started outlived it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let missing = Command { tell: vec!["/no/such/program".into()], ..of("") };
        assert!(matches!(missing.tell(folder.path(), 1, "k").await, Err(ActuateError::Unreachable { .. })));
        assert!(Command { tell: Vec::new(), ..of("") }.check().is_err());
    }

    #[tokio::test]
    async fn words_are_bounded_and_leftovers_are_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let loud = of("yes | head -c 1000000; sleep 20 & exit 0");
        let printed = loud.run(folder.path(), &loud.tell, &[]).await.unwrap();
        assert_eq!(printed.len(), PRINTED_BYTES_MAX);
    }
}
