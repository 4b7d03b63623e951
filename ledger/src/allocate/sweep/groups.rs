//! What some requests share equally among themselves: a virtual time for each group, brought up to date only when the
//! group's size changes.

/// Groups by number. Those that were never named have no members.
#[derive(Debug, Clone, Default)]
pub(super) struct Groups {
    all: Vec<Group>,
    /// Groups with members.
    active: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Group {
    members: u32,
    /// `integral of x / members` up to `since`, a value of the integral of `x`.
    passed: f64,
    since: f64,
    /// What the group demands once in a step, and what each new token of it demands beside the model, in seconds.
    once_s: f64,
    token_s: f64,
}

impl Groups {
    /// A new group and its number.
    pub(super) fn with(&mut self, once_s: f64, token_s: f64) -> u32 {
        self.all.push(Group { once_s, token_s, ..Group::default() });
        u32::try_from(self.all.len() - 1).expect("fewer than four billion adapters")
    }

    pub(super) fn once_s(&self, group: u32) -> f64 {
        self.all[group as usize].once_s
    }

    pub(super) fn token_s(&self, group: u32) -> f64 {
        self.all[group as usize].token_s
    }

    /// Groups with members.
    pub(super) fn active(&self) -> f64 {
        f64::from(self.active)
    }

    /// What all groups with members demand once in a step, in seconds.
    pub(super) fn read_once_s(&self) -> f64 {
        self.all.iter().filter(|group| group.members > 0).map(|group| group.once_s).sum()
    }

    /// The group's virtual time when the integral of `x` is `integral`.
    pub(super) fn at(&self, group: u32, integral: f64) -> f64 {
        self.all.get(group as usize).map_or(0.0, |group| group.at(integral))
    }

    /// One more member; what the batch demands more because the group is there now.
    pub(super) fn join(&mut self, group: u32, integral: f64) -> f64 {
        let index = group as usize;
        if index >= self.all.len() {
            self.all.resize(index + 1, Group::default());
        }
        let group = &mut self.all[index];
        group.move_to(integral);
        group.members += 1;
        if group.members > 1 {
            return 0.0;
        }
        self.active += 1;
        group.once_s
    }

    /// One member less; what the batch demands less because the group is gone.
    pub(super) fn leave(&mut self, group: u32, integral: f64) -> f64 {
        let group = &mut self.all[group as usize];
        group.move_to(integral);
        group.members -= 1;
        if group.members > 0 {
            return 0.0;
        }
        self.active -= 1;
        group.once_s
    }

    /// All integrals begin at zero again; the members stay.
    pub(super) fn begin_afresh(&mut self) {
        for group in &mut self.all {
            (group.passed, group.since) = (0.0, 0.0);
        }
    }
}

impl Group {
    fn at(&self, integral: f64) -> f64 {
        if self.members == 0 { self.passed } else { self.passed + (integral - self.since) / f64::from(self.members) }
    }

    fn move_to(&mut self, integral: f64) {
        self.passed = self.at(integral);
        self.since = integral;
    }
}

#[cfg(test)]
#[path = "groups_tests.rs"]
mod tests;
