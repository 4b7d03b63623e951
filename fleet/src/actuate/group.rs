//! Process groups: signals for all of one, and which process is which, also after this program was started anew.

use std::process::Stdio;

use serde::{Deserialize, Serialize};

/// Sends a signal to a process group. The shell does it: its `kill` is everywhere, and needs no unsafe code here.
pub(super) fn signal(name: &str, group: u32) {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("kill -s {name} -- -{group}")]);
    // That nobody is left is no failure.
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Whether anybody of a process group still runs. Where there is no `/proc` only its leader counts.
pub(super) fn lives(group: u32) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    let stats = processes.flatten().filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok());
    stats.into_iter().any(|stat| is_of(&stat, group))
}

/// Kills a group when it is dropped, unless it is let go before.
#[derive(Debug)]
pub(super) struct Hold(Option<u32>);

impl Hold {
    pub fn on(group: Option<u32>) -> Hold {
        Hold(group)
    }

    pub fn let_go(mut self) {
        self.0 = None;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.into_iter().for_each(|group| signal("KILL", group));
    }
}

/// One process and no other: a number alone is given to another one day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub pid: u32,
    /// Clock ticks from the machine's start to the process's.
    started: u64,
    /// Which start of the machine.
    boot: String,
}

impl Mark {
    /// Of a process that runs. `None` where there is no `/proc`.
    pub fn of(pid: u32) -> Option<Mark> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let started = started(&stat)?;
        Some(Mark { pid, started, boot: boot.trim().to_owned() })
    }

    /// Whether this very process still runs.
    pub fn runs(&self) -> bool {
        Mark::of(self.pid).as_ref() == Some(self)
    }
}

/// When a process started, unless it is only a zombie.
fn started(stat: &str) -> Option<u64> {
    let mut fields = after_name(stat);
    (!matches!(fields.next()?, "Z" | "X")).then_some(())?;
    fields.nth(18)?.parse().ok()
}

/// Whether a line of `/proc/PID/stat` is a process of this group that is more than a zombie.
fn is_of(stat: &str, group: u32) -> bool {
    let mut fields = after_name(stat);
    let state = fields.next();
    fields.nth(1).and_then(|group| group.parse().ok()) == Some(group) && !matches!(state, Some("Z" | "X"))
}

/// State, parent, group and so on. The name before them may contain anything, so only what follows its last bracket counts.
fn after_name(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit(')').next().unwrap_or_default().split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zombie_does_not_run() {
        let stat = |state: &str| format!("12 (a) b) {state} 1 77 12 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 9");
        assert!(is_of(&stat("S"), 77) && !is_of(&stat("Z"), 77) && !is_of(&stat("S"), 1));
        assert_eq!((started(&stat("S")), started(&stat("Z"))), (Some(4242), None));
    }

    #[test]
    fn a_process_is_told_from_another_with_its_number() {
        let this = Mark::of(std::process::id()).expect("there is a /proc here");
        assert!(this.runs());
        assert!(!Mark { started: this.started + 1, ..this.clone() }.runs());
        assert!(!Mark { boot: "another".to_owned(), ..this }.runs());
    }
}
