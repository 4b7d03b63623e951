//! One engine's timelines in, fitted constants and what they are worth out.

use super::fit::{Fit, FitError, Observed};
use super::quality::{EngineSample, Quality, compare, decode_observations};
use super::replica::Replica;
use super::sweep::{Part, Sweep};
use super::timeline::{EngineTimeline, Limits};
use crate::time::Timestamp;

/// Requests that a fit and its comparison with the engine's series look at, the first ones scheduled. More would make the
/// memory grow and the constants no better.
pub const REQUESTS_MAX: usize = 200_000;

/// Fewest decode steps of a request that a fit looks at: the jitter of a delivery is as long as a few steps.
const STEPS_MIN: f64 = 8.0;

/// What the timelines say about the engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// The constants, when there were enough requests that decoded undisturbed.
    pub fit: Option<Fit>,
    /// Errors on requests that the constants were not fitted to: each half judged by the fit on the other.
    pub held_out: Option<FitError>,
    /// Errors of the constants that came in, on the same requests.
    pub in_force: Option<FitError>,
    /// The reconstruction against the engine's own series.
    pub quality: Quality,
    /// Samples of the engine's series that lie within the timelines' time.
    pub samples: usize,
    /// Requests that must have been preempted.
    pub preempted_requests: usize,
    /// Preemptions that the cache's size made necessary.
    pub preemptions: u64,
}

/// Reconstructs the batch over time, compares it with the engine's `series`, and fits the constants to the decode phases.
/// `timelines` come in the order in which they were scheduled.
#[must_use]
pub fn calibrate(
    sheet: &Replica,
    limits: Limits,
    timelines: &[EngineTimeline],
    series: &[(Timestamp, EngineSample)],
) -> Calibration {
    let timelines = &timelines[..timelines.len().min(REQUESTS_MAX)];
    let base = timelines.first().map(|timeline| timeline.scheduled).unwrap_or_default();
    let mut sweep = Sweep::new(sheet.ideal(), limits, base).recording();
    let mut preempted = vec![0.0; timelines.len()];
    let mut emit = |part: Part| {
        if let Some(seconds) = usize::try_from(part.tag).ok().and_then(|tag| preempted.get_mut(tag)) {
            *seconds += part.preempted_s;
        }
    };
    for (tag, timeline) in timelines.iter().enumerate() {
        sweep.push(tag as u64, timeline, &mut emit);
    }
    sweep.finish(&mut emit);

    // The window of the comparison is from the first arrival to the last token: elsewhere nothing is known of the engine.
    let seconds = |at: Timestamp| sweep.seconds(at);
    let arrived = sorted(timelines.iter().map(|timeline| seconds(timeline.arrived)));
    let scheduled = sorted(timelines.iter().map(|timeline| seconds(timeline.scheduled)));
    let ended = timelines.iter().map(|timeline| seconds(timeline.last_token)).fold(f64::MIN, f64::max);
    let samples: Vec<EngineSample> = series
        .iter()
        .map(|(at, sample)| EngineSample { at_s: seconds(*at), ..*sample })
        .filter(|sample| arrived.first().is_some_and(|first| *first <= sample.at_s) && sample.at_s <= ended)
        .collect();
    let upto = |times: &[f64], t: f64| times.partition_point(|&at| at <= t) as f64;
    let waiting = |t: f64| upto(&arrived, t) - upto(&scheduled, t);
    let quality = compare(sweep.segments(), waiting, &samples, limits.kv_tokens);

    let window = |one: &EngineTimeline| (seconds(one.first_token), seconds(one.last_token));
    let ideal = Fit::in_force(&sheet.ideal());
    let observations: Vec<Option<Observed>> = decode_observations(sweep.segments(), timelines, sheet, window)
        .into_iter()
        .map(|observed| observed.filter(|observed| tells_of_steps(observed, &ideal)))
        .collect();
    // A preempted request's decode phase holds time that no step explains.
    let clean: Vec<(usize, &Observed)> = observations
        .iter()
        .enumerate()
        .filter(|(row, _)| preempted[*row] == 0.0)
        .filter_map(|(row, observed)| observed.as_ref().map(|observed| (row, observed)))
        .collect();
    let chosen = |half: Option<usize>| -> Vec<Observed> {
        let rows = clean.iter().filter(|(row, _)| half.is_none_or(|half| row % 2 == half));
        rows.map(|(_, observed)| (*observed).clone()).collect()
    };
    Calibration {
        fit: Fit::of(&chosen(None)),
        held_out: held_out(&observations, &preempted, |half| Fit::of(&chosen(Some(half)))),
        in_force: held_out(&observations, &preempted, |_| Some(Fit::in_force(sheet))),
        quality,
        samples: samples.len(),
        preempted_requests: preempted.iter().filter(|seconds| **seconds > 0.0).count(),
        preemptions: sweep.preemptions(),
    }
}

/// Whether a decode phase says how long steps take. Tokens that came faster than the data sheet allows were delivered together,
/// after they were made.
fn tells_of_steps(observed: &Observed, ideal: &Fit) -> bool {
    let steps: f64 = observed.loads.iter().map(|load| load.steps).sum();
    steps >= STEPS_MIN && ideal.predict(&observed.loads) <= observed.seconds
}

/// Errors of predicted decode times, each request judged by the fit on the half that it is not in. Preempted requests
/// count too: their prediction is the model's plus the waiting that the reconstruction gave them.
fn held_out(
    observations: &[Option<Observed>],
    preempted: &[f64],
    fit_on: impl Fn(usize) -> Option<Fit>,
) -> Option<FitError> {
    let fits = [fit_on(0)?, fit_on(1)?];
    let mut errors: Vec<f64> = observations
        .iter()
        .enumerate()
        .filter_map(|(row, observed)| {
            let observed = observed.as_ref()?;
            let predicted = fits[1 - row % 2].predict(&observed.loads) + preempted[row];
            Some(predicted / observed.seconds - 1.0)
        })
        .collect();
    let count = errors.len();
    let bias = errors.iter().sum::<f64>() / count as f64;
    errors.iter_mut().for_each(|error| *error = error.abs());
    errors.sort_by(f64::total_cmp);
    let last = count.checked_sub(1)?;
    Some(FitError { median: errors[count / 2], p95: errors[(count * 95 / 100).min(last)], bias })
}

fn sorted(times: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::timeline::whole_micros;
    use crate::step::{Efficiencies, GpuSheet, ModelShape, Work};

    /// Requests that run one after the other on an engine with known constants, each alone in its steps.
    fn alone(truth: &Replica, count: u32) -> Vec<EngineTimeline> {
        let mut now = 1_000.0;
        let mut timelines = Vec::new();
        for number in 0..count {
            let (input_tokens, output_tokens) = (200 + 400 * number % 8_000, 50 + 30 * number % 700);
            let prefill_s = truth.step_s(&[Work { new_tokens: input_tokens, cached_tokens: 0 }]);
            let decode_s: f64 = (1..output_tokens)
                .map(|step| truth.step_s(&[Work { new_tokens: 1, cached_tokens: input_tokens + step }]))
                .sum();
            let at = |seconds: f64| Timestamp::from_micros(whole_micros(seconds));
            timelines.push(EngineTimeline {
                arrived: at(now),
                scheduled: at(now),
                first_token: at(now + prefill_s),
                last_token: at(now + prefill_s + decode_s),
                input_tokens,
                cached_tokens: 0,
                output_tokens,
            });
            now += prefill_s + decode_s + 0.01;
        }
        timelines
    }

    #[test]
    fn an_engine_is_calibrated_and_its_series_confirmed() {
        let sheet = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::A100, 1);
        let truth = Replica { efficiencies: Efficiencies { compute: 0.5, bandwidth: 0.7, overhead_s: 0.0 }, ..sheet };
        let timelines = alone(&truth, 40);
        let sample = EngineSample { running: Some(1.0), waiting: Some(0.0), ..EngineSample::default() };
        let inside = timelines[3].first_token.plus_micros(1_000);
        let series = [(inside, sample), (Timestamp::from_micros(0), sample)];
        let found = calibrate(&sheet, Limits::default(), &timelines, &series);
        let fit = found.fit.unwrap();
        assert!((fit.predict(&[]), fit.observations) == (0.0, 40));
        assert!(found.held_out.unwrap().median < 0.01, "{found:?}");
        assert_eq!((found.samples, found.quality.running_error), (1, Some(0.0)), "the other sample is outside");
        assert_eq!(found.preempted_requests, 0);
    }

    #[test]
    fn nothing_gives_no_constants() {
        let sheet = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::A100, 1);
        let found = calibrate(&sheet, Limits::default(), &[], &[]);
        assert_eq!((found.fit, found.held_out, found.samples), (None, None, 0));
    }
}
