//! Commitments on a measured week: what hindsight would have committed to at `r / p` of 0.6.

use super::{Bill, Demand, Rates, best_level};
use crate::allocate::measured::table;

const HOUR: u64 = 3_600_000_000;
/// Bins of ten seconds.
const PER_MINUTE: usize = 6;
const PER_HOUR: usize = 360;

/// GPUs of each hour: its mean rate in whole replicas of one GPU, forty of which do the work of the busiest minute but one
/// in a thousand. Nothing is started early or kept warm here: this is what the demand alone asks for.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some forty replicas")]
fn demand(trace: &str) -> Option<Demand> {
    let bins: Vec<f64> =
        table(&format!("traces/{trace}"))?.iter().map(|row| row["TIMESTAMP"].parse().unwrap()).collect();
    let bins = &bins[..bins.len() / PER_HOUR * PER_HOUR];
    let sums = |length: usize| bins.chunks(length).map(|bins| bins.iter().sum::<f64>());
    let mut minutes: Vec<f64> = sums(PER_MINUTE).collect();
    minutes.sort_by(f64::total_cmp);
    let one_replica = minutes[minutes.len() * 999 / 1_000] / 40.0;
    Some(Demand::every(HOUR, sums(PER_HOUR).map(|hour| (hour / 60.0 / one_replica).ceil() as u32)))
}

#[test]
fn the_measured_week_commits_six_and_twenty_one_of_forty() {
    let rates = Rates { committed: "3.00".parse().unwrap(), on_demand: "5.00".parse().unwrap() };
    for (trace, level, paid) in [("azure_llm_2024_code_10s.csv", 6, 0.860), ("azure_llm_2024_conv_10s.csv", 21, 0.718)]
    {
        let Some(demand) = demand(trace) else { return };
        assert_eq!(best_level(&demand, rates), level, "{trace}");
        let of = |level| Bill::of(&demand, rates, level).total().pico() as f64;
        let share = of(level) / of(0);
        println!("{trace}: commits {level} of {}, pays {share:.4} of on-demand", demand.peak());
        assert!((share - paid).abs() < 0.000_5, "{trace}: {share}");
    }
}
