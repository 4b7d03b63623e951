//! Interruptible GPUs: what they save for work that can be repeated, and what they would break for work that is waited for.
//!
//! A GPU is taken away `rate` times an hour, each time `notice` after it was said, and its replacement does work again
//! `restart` after it was asked for, which is when the notice came. Interruptions come independently of one another; a
//! region that takes all of them at once is worse than anything here.

use crate::money::GpuHourRate;

/// How a provider interrupts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interruptions {
    /// Interruptions of one replica in an hour.
    pub per_hour: f64,
    /// Seconds from the notice to the end.
    pub notice_s: f64,
    /// Seconds from asking for a replacement until it works.
    pub restart_s: f64,
}

/// What spot saves for work that can be repeated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saving {
    /// The part of the paid time that does work which is kept.
    pub useful: f64,
    /// Seconds of work that one interruption costs.
    pub lost_s: f64,
    /// What an hour of kept work costs; `None` where no work is ever kept.
    pub effective: Option<GpuHourRate>,
    /// The part of the on-demand price that is saved for an hour of kept work; negative when it is dearer, `None` where no
    /// work is ever kept or on-demand is free.
    pub saving: Option<f64>,
}

impl Interruptions {
    /// Seconds in which a replica is missing after each interruption.
    #[must_use]
    pub fn outage_s(&self) -> f64 {
        (self.restart_s - self.notice_s).max(0.0)
    }

    /// What work costs that is written down every `checkpoint_s` and repeated from there. Half of that time is lost on
    /// average, less where the notice is long enough to write down once more (`saves_on_notice`); a start that is paid and
    /// does nothing yet is lost too.
    #[must_use]
    pub fn interruptible(
        &self,
        spot: GpuHourRate,
        on_demand: GpuHourRate,
        checkpoint_s: f64,
        saves_on_notice: bool,
    ) -> Saving {
        let repeated_s = if saves_on_notice { 0.0 } else { checkpoint_s.max(0.0) / 2.0 };
        let lost_s = repeated_s + self.restart_s.max(0.0);
        // One interruption on average every 1/rate hours of paid time, each with its lost seconds.
        let useful = (1.0 - self.per_hour.max(0.0) * lost_s / 3_600.0).clamp(0.0, 1.0);
        let effective = dearer(spot, useful);
        let price = effective.filter(|_| on_demand.pico() > 0);
        let saving = price.map(|price| 1.0 - price.pico() as f64 / on_demand.pico() as f64);
        Saving { useful, lost_s, effective, saving }
    }

    /// The part of all requests that are cut: those in flight at the notice that take longer than the notice, when nothing
    /// new is sent there from then on. Lengths are exponential around `request_s`.
    #[must_use]
    pub fn requests_cut(&self, request_s: f64) -> f64 {
        if request_s <= 0.0 {
            return 0.0;
        }
        let outlive_s = request_s * (-self.notice_s.max(0.0) / request_s).exp();
        (self.per_hour.max(0.0) * outlive_s / 3_600.0).min(1.0)
    }

    /// The chance that at a moment more than `spare` of `replicas` are missing: replicas missing at once follow a Poisson
    /// distribution around `replicas x rate x outage`.
    #[must_use]
    pub fn short_of(&self, replicas: f64, spare: u32) -> f64 {
        let mean = replicas.max(0.0) * self.per_hour.max(0.0) * self.outage_s() / 3_600.0;
        let mut term = (-mean).exp();
        let mut at_most = term;
        for missing in 1..=spare.min(10_000) {
            term *= mean / f64::from(missing);
            at_most += term;
        }
        (1.0 - at_most).clamp(0.0, 1.0)
    }
}

/// What a minute of a trace needs and has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Minute {
    /// Requests that arrived, or anything in proportion.
    pub requests: f64,
    /// Arriving work, in replicas.
    pub load: f64,
    /// Replicas that serve.
    pub ready: f64,
    /// Of those, replicas that can be interrupted.
    pub spot: f64,
}

/// The part of all requests that arrive in overloaded minutes, without and with interruptions.
#[must_use]
pub fn overloaded(interruptions: Interruptions, minutes: impl IntoIterator<Item = Minute>) -> (f64, f64) {
    let (mut all, mut without, mut with) = (0.0, 0.0, 0.0);
    for minute in minutes {
        let spare = minute.ready - minute.load;
        all += minute.requests;
        if spare < 0.0 {
            without += minute.requests;
            with += minute.requests;
        } else {
            with += minute.requests * interruptions.short_of(minute.spot, whole(spare));
        }
    }
    if all > 0.0 { (without / all, with / all) } else { (0.0, 0.0) }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the range before")]
fn whole(spare: f64) -> u32 {
    // A float just below a whole number is that number: 3.0 of load on 4 replicas leave one.
    (spare + 1e-9).floor().clamp(0.0, 1e6) as u32
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn dearer(rate: GpuHourRate, useful: f64) -> Option<GpuHourRate> {
    (useful > 0.0).then(|| GpuHourRate::from_pico((rate.pico() as f64 / useful).round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OFTEN: Interruptions = Interruptions { per_hour: 0.2, notice_s: 120.0, restart_s: 420.0 };

    fn rate(text: &str) -> GpuHourRate {
        text.parse().unwrap()
    }

    #[test]
    fn repeated_work_and_restarts_eat_a_part_of_the_saving() {
        let saving = OFTEN.interruptible(rate("2"), rate("5"), 1_800.0, false);
        // Every five hours 15 minutes repeated and 7 minutes of a start: 0.2 * 1320 / 3600.
        assert!((saving.useful - (1.0 - 0.2 * 1_320.0 / 3_600.0)).abs() < 1e-12);
        assert!((saving.saving.unwrap() - (1.0 - 0.4 / saving.useful)).abs() < 1e-9, "{saving:?}");
        let saved = OFTEN.interruptible(rate("2"), rate("5"), 1_800.0, true);
        assert!(saved.saving > saving.saving);
        let never = Interruptions { per_hour: 0.0, ..OFTEN }.interruptible(rate("2"), rate("5"), 1_800.0, false);
        assert_eq!((never.useful, never.effective), (1.0, Some(rate("2"))));
    }

    #[test]
    fn work_that_is_never_kept_has_no_price() {
        let saving = Interruptions { per_hour: 4.0, ..OFTEN }.interruptible(rate("2"), rate("5"), 3_600.0, false);
        assert_eq!((saving.useful, saving.effective, saving.saving), (0.0, None, None));
    }

    #[test]
    fn a_notice_longer_than_requests_cuts_few_of_them() {
        let cut = |notice_s| Interruptions { notice_s, ..OFTEN }.requests_cut(10.0);
        assert!((cut(0.0) - 0.2 * 10.0 / 3_600.0).abs() < 1e-12);
        assert!(cut(120.0) < cut(0.0) * 1e-5);
    }

    #[test]
    fn spare_replicas_absorb_interruptions() {
        let minute = |ready| Minute { requests: 100.0, load: 9.5, ready, spot: ready };
        let with = |ready| overloaded(OFTEN, [minute(ready)]);
        assert_eq!(with(9.0), (1.0, 1.0));
        let (none, one_short) = with(10.0);
        assert_eq!(none, 0.0);
        // Ten replicas, 0.2 an hour, five minutes each: a sixth of a replica is missing on average.
        assert!((one_short - (1.0 - (-10.0f64 * 0.2 * 300.0 / 3_600.0).exp())).abs() < 1e-12);
        assert!(with(11.0).1 < one_short / 5.0);
        assert_eq!(overloaded(OFTEN, []), (0.0, 0.0));
    }

    proptest! {
        #[test]
        fn chances_are_chances_and_fall_with_what_is_spare(replicas in 0.0f64..500.0, spare in 0u32..50, per_hour in 0.0f64..5.0) {
            let spot = Interruptions { per_hour, ..OFTEN };
            let (less, more) = (spot.short_of(replicas, spare), spot.short_of(replicas, spare + 1));
            prop_assert!((0.0..=1.0).contains(&less) && more <= less + 1e-12);
        }
    }
}
