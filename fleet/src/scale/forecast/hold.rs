//! Letting go late: a replica that is let go and needed again costs a cold start.

/// What to ask for, when so many replicas are there or on their way and so many were wanted now and in each of the last minutes.
///
/// Up at once. Down to the most that was wanted in those minutes, and only by at least `slack` of what there is (rounded, at
/// least one replica).
pub(crate) fn held(current: u32, wanted: u32, before: impl Iterator<Item = u32>, slack: f64) -> u32 {
    if wanted >= current {
        return wanted;
    }
    let most = before.fold(wanted, u32::max);
    let least = super::whole(f64::from(current) * slack.clamp(0.0, 1.0) - 0.5).max(1);
    if most.saturating_add(least) <= current { most } else { current }
}

#[cfg(test)]
mod tests {
    use super::held;

    #[test]
    fn up_at_once_and_down_to_the_most_of_late() {
        let check = |current, wanted, before: &[u32], slack, then| {
            assert_eq!(
                held(current, wanted, before.iter().copied(), slack),
                then,
                "{current} {wanted} {before:?} {slack}"
            );
        };
        check(10, 12, &[9], 0.05, 12);
        check(10, 8, &[], 0.05, 8);
        check(10, 8, &[9, 7], 0.05, 9);
        check(10, 8, &[11], 0.05, 10);
        check(40, 39, &[], 0.05, 40);
        check(40, 38, &[], 0.05, 38);
        check(2, 1, &[1], 0.05, 1);
        check(0, 0, &[], 0.05, 0);
    }
}
