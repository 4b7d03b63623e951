use ledger::Timestamp;

use super::*;
use crate::scale::observe::{Bounds, Objective, Sample};

/// 2024-05-06 00:00 UTC, a Monday.
pub(crate) const MONDAY_US: i64 = 1_714_953_600_000_000;
pub(crate) const DAY: usize = 1440;

/// What a policy sees, made up.
pub(crate) struct Scene {
    pub(crate) history: Vec<f32>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) ready: u32,
    pub(crate) committed: u32,
    /// Minutes between the end of the history and now.
    pub(crate) gap: i64,
}

impl Scene {
    /// Loads of each minute since Monday.
    pub(crate) fn of(minutes: usize, load: impl Fn(usize) -> f32) -> Scene {
        Scene { history: (0..minutes).map(load).collect(), samples: Vec::new(), ready: 10, committed: 0, gap: 0 }
    }

    pub(crate) fn now(&self) -> Timestamp {
        let minutes = i64::try_from(self.history.len()).unwrap() + self.gap;
        Timestamp::from_micros(MONDAY_US + minutes * HISTORY_BIN_US)
    }

    /// Looks every ten seconds up to now.
    pub(crate) fn looks(mut self, looks: &[Sample]) -> Scene {
        let now = self.now();
        let count = i64::try_from(looks.len()).unwrap();
        let at = |index: usize| now.plus_micros((i64::try_from(index).unwrap() + 1 - count) * 10_000_000);
        self.samples = looks.iter().enumerate().map(|(index, look)| Sample { at: at(index), ..*look }).collect();
        self
    }

    pub(crate) fn observation(&self) -> Observation<'_> {
        Observation {
            samples: &self.samples,
            history: &self.history,
            history_start: Timestamp::from_micros(MONDAY_US),
            future: &[],
            ready: self.ready,
            pending: &[],
            draining: 0,
            decisions: &[],
            manual: None,
            objective: Objective::default(),
            bounds: Bounds {
                floor: 0,
                ceiling: 100,
                committed: self.committed,
                static_replicas: 20,
                cold_start_s: 300.0,
                batch_at_capacity: 64.0,
                requests_per_s_at_capacity: 2.0,
                input_tokens_per_s_at_capacity: 2000.0,
                output_tokens_per_s_at_capacity: 400.0,
            },
        }
    }

    fn outlook(&self) -> Option<Outlook> {
        Outlook::of(&self.observation(), &Model::default(), self.now(), 5)
    }
}

/// Low at night, a step at nine, high by day.
fn office(minute: usize) -> f32 {
    if (540..1080).contains(&(minute % DAY)) { 20.0 } else { 5.0 }
}

#[test]
fn a_steady_load_is_expected_to_stay() {
    let outlook = Scene::of(300, |_| 4.0).outlook().unwrap();
    assert!((outlook.peak - 4.0).abs() < 1e-6 && (outlook.at_cold_start - 4.0).abs() < 1e-6, "{outlook:?}");
    assert_eq!(outlook.season_days, 0, "a Monday without a former weekday");
    assert_eq!(outlook.peaks_before.len(), 5);
    assert!(outlook.spread < spread::USUAL, "nothing strays: {}", outlook.spread);
}

#[test]
fn a_rise_of_every_day_is_expected_before_it_comes() {
    // Thursday, five minutes before nine.
    let scene = Scene::of(3 * DAY + 535, office);
    let outlook = scene.outlook().unwrap();
    assert_eq!(outlook.season_days, 3);
    assert!(outlook.at_cold_start > 1.5 * 5.0, "the last hour's load was 5: {outlook:?}");
    // On the first day nobody can know.
    let first = Scene::of(535, office).outlook().unwrap();
    assert!((first.peak - 5.0).abs() < 1e-6);
}

#[test]
fn a_season_is_of_days_of_the_same_type() {
    // Saturday morning before nine: five weekdays are known and no weekend.
    let outlook = Scene::of(5 * DAY + 535, office).outlook().unwrap();
    assert_eq!(outlook.season_days, 0);
    assert!((outlook.peak - 5.0).abs() < 1e-6);
    // Sunday: one day.
    assert_eq!(Scene::of(6 * DAY + 535, office).outlook().unwrap().season_days, 1);
}

#[test]
fn the_season_is_moved_to_the_level_of_today() {
    // Everything doubles on the fourth day; the season's shape still holds.
    let outlook =
        Scene::of(3 * DAY + 700, |minute| office(minute) * if minute < 3 * DAY { 1.0 } else { 2.0 }).outlook().unwrap();
    assert!((outlook.peak - 40.0).abs() < 2.0, "{outlook:?}");
}

#[test]
fn unknown_minutes_are_not_zero() {
    let gappy = |minute: usize| if minute.is_multiple_of(3) { f32::NAN } else { 6.0 };
    let outlook = Scene::of(2 * DAY, gappy).outlook().unwrap();
    assert!((outlook.peak - 6.0).abs() < 1e-6, "{outlook:?}");
    let mut scene = Scene::of(DAY, |_| 6.0);
    scene.gap = 20;
    assert!((scene.outlook().unwrap().peak - 6.0).abs() < 1e-6, "the last known minutes are what is known");
    assert!(Scene::of(300, |_| f32::NAN).outlook().is_none());
    assert!(Scene::of(0, |_| 0.0).outlook().is_none());
}

#[test]
fn looks_serve_until_there_is_a_minute_of_history() {
    let look = |load| Sample { load, ..Sample::default() };
    let outlook = Scene::of(0, |_| 0.0).looks(&[look(Some(2.0)), look(None), look(Some(4.0))]).outlook().unwrap();
    assert!((outlook.peak - 3.0).abs() < 1e-9);
    assert_eq!(outlook.fresh, Some(3.0));
    assert!(Scene::of(0, |_| 0.0).looks(&[look(None)]).outlook().is_none());
}

#[test]
fn the_spread_is_that_of_the_time_of_day() {
    // Noise of 20 % in the afternoon only, the same every day.
    let noisy = |minute: usize| {
        let sign = if minute.is_multiple_of(2) { 1.0 } else { -1.0 };
        if minute % DAY > 720 { 10.0 * (1.0 + 0.2 * sign) } else { 10.0 }
    };
    let calm = Scene::of(4 * DAY + 500, noisy).outlook().unwrap().spread;
    let wild = Scene::of(4 * DAY + 1000, noisy).outlook().unwrap().spread;
    assert!(calm < 0.08 && (0.13..0.25).contains(&wild), "{calm} {wild}");
}

#[test]
fn a_forecast_looks_only_back() {
    // The same past with two different futures behind it gives the same forecast: the history ends at now.
    let past = |minute: usize| office(minute) + (minute % 7) as f32 * 0.1;
    let short = Scene::of(2 * DAY + 100, past);
    let long = Scene::of(2 * DAY + 400, |minute| if minute < 2 * DAY + 100 { past(minute) } else { 99.0 });
    let now = short.now();
    let then = |scene: &Scene| Outlook::of(&scene.observation(), &Model::default(), now, 5).unwrap();
    let cut = Scene { history: long.history[..2 * DAY + 100].to_vec(), ..long };
    assert_eq!(then(&short), then(&cut));
}
