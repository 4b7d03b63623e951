//! Policies on the recorded week of 2024 (public traces of Azure's inference services, requests in bins of ten seconds), in the fluid
//! mode: three days to learn from, four to be judged by, five minutes to start a replica, forty replicas at the judged peak.

use std::path::{Path, PathBuf};

use fleet::scale::{Bounds, Policy};
use fleet::sim::compare::{self, Row};
use fleet::sim::demand::Demand;
use fleet::sim::plan::Plan;
use fleet::sim::search::Goal;
use ledger::Timestamp;

/// Judged from the fourth day on.
const JUDGE_FROM_S: f64 = 3.0 * 86_400.0;
/// Replicas at the peak of the judged days.
const PEAK: f64 = 40.0;
/// The first day of each trace, midnight UTC: Friday, 10 May, and Sunday, 12 May 2024.
const WEEKS: [(&str, i64); 2] = [("code", 1_715_299_200), ("conv", 1_715_472_000)];

fn week(kind: &str, start_s: i64) -> Option<Demand> {
    let folder = std::env::var_os("FARTHING_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = folder.join(format!("traces/azure_llm_2024_{kind}_10s.csv"));
    let text = std::fs::read_to_string(path).ok()?;
    let counts = text.lines().skip(1).filter_map(|line| line.split(',').nth(1)?.trim().parse::<u32>().ok());
    // The last bin stands alone at the midnight after the week.
    let requests: Vec<u32> = counts.take(7 * 8640).collect();
    let judged = requests.chunks(6).skip(3 * 1440).map(|minute| minute.iter().sum::<u32>());
    let one = f64::from(judged.max()?) / PEAK;
    #[expect(clippy::cast_possible_truncation, reason = "loads need no more digits")]
    let load = requests.iter().map(|&requests| (f64::from(requests) * 6.0 / one) as f32).collect();
    Some(Demand::from_load(Timestamp::from_micros(start_s * 1_000_000), 10.0, load, requests))
}

fn plan(judge_from_s: f64) -> Plan {
    let bounds = Bounds {
        floor: 1,
        ceiling: 100,
        committed: 0,
        static_replicas: 40,
        cold_start_s: 300.0,
        batch_at_capacity: 64.0,
        requests_per_s_at_capacity: 2.0,
        input_tokens_per_s_at_capacity: 2000.0,
        output_tokens_per_s_at_capacity: 400.0,
    };
    Plan { judge_from_s, drain_s: 0.0, ..Plan::new(Policy::default(), bounds) }
}

fn weeks() -> Option<Vec<Demand>> {
    let weeks: Option<Vec<Demand>> = WEEKS.iter().map(|&(kind, start_s)| week(kind, start_s)).collect();
    if weeks.is_none() {
        eprintln!("skipped: the traces of 2024 are not here");
    }
    weeks
}

fn rows(demand: &Demand, policies: &[Policy]) -> Vec<Row> {
    let plan = plan(JUDGE_FROM_S);
    compare::compare(policies, &compare::fluid(&plan, demand), 2, &|_, _| {}).unwrap()
}

fn print(kind: &str, rows: &[Row]) {
    for row in rows {
        let percent = |part: Option<f64>| part.map_or_else(|| "-".to_owned(), |part| format!("{:.1} %", 100.0 * part));
        eprintln!(
            "{kind:5} {:60} {:8.0} GPU-hours, {} of static, {} of hpa, {} over oracle, {:.3} % in overload, {:.1} turns/h (most {})",
            row.policy.to_string(),
            row.outcome.gpu_hours,
            percent(Some(row.saved_static)),
            percent(row.saved_hpa),
            percent(row.over_oracle),
            100.0 * row.outcome.overload.share,
            row.direction_changes_per_hour,
            row.outcome.direction_changes_per_hour_max,
        );
    }
}

/// The cheapest of 108 autoscalers (targets from 0.55 to 0.8, with and without a queue, stabilised for 5 to 30 minutes, two tolerances) that keep
/// to the goal on the judged days of both weeks: chosen in hindsight, which no other policy here was.
const TUNED_HPA: &str = "hpa:tolerance=0.05,stabilise=1800";

/// What the default has to save of the static plan of the judged peak, of the tuned autoscaler, and how far above the oracle it may be.
///
/// The oracle itself saves 58.0 % (code) and 37.7 % (conv), so that no policy can save more. A minute strays from the best forecast by 8 to
/// 10 % (standard deviation), and the share of requests that may be in overloaded minutes leaves room for four minutes of 5,760: the margin that
/// takes keeps everybody who does not know the future a fifth to a quarter above the oracle.
const TARGETS: [(f64, f64, f64); 2] = [(0.45, 0.08, 0.29), (0.25, 0.08, 0.20)];

#[test]
fn the_default_policy_on_the_week_of_2024() {
    let Some(weeks) = weeks() else { return };
    let goal = Goal::default().overload_share;
    let parsed = |label: &str| label.parse::<Policy>().unwrap();
    let policies = [parsed(TUNED_HPA), Policy::default(), parsed("cost-optimal"), parsed("oracle")];
    for (((kind, _), week), (static_min, hpa_min, oracle_max)) in WEEKS.iter().zip(&weeks).zip(TARGETS) {
        let rows = rows(week, &policies);
        print(kind, &rows);
        let [hpa, default, cost_optimal, oracle] = rows.as_slice() else { panic!("four rows") };
        assert!(
            default.outcome.overload.share <= goal,
            "{kind}: {} of the requests in overload",
            default.outcome.overload.share
        );
        assert!(cost_optimal.outcome.overload.share <= goal, "{kind}: {}", cost_optimal.outcome.overload.share);
        assert!(
            hpa.outcome.overload.share <= goal,
            "{kind}: the autoscaler keeps to the same goal, {}",
            hpa.outcome.overload.share
        );
        assert!(default.saved_static >= static_min, "{kind}: saved {} of static", default.saved_static);
        assert!(default.saved_hpa.unwrap() >= hpa_min, "{kind}: saved {:?} of the tuned autoscaler", default.saved_hpa);
        assert!(default.over_oracle.unwrap() <= oracle_max, "{kind}: {:?} above the oracle", default.over_oracle);
        assert!(default.outcome.direction_changes_per_hour_max <= 6);
        // The oracle is the bound: it misses nothing, and no plan that misses nothing is cheaper.
        let from = usize::try_from(week.bin_us).map_or(0, |bin_us| 3 * 86_400_000_000 / bin_us / 6);
        let least =
            compare::bound(&week.minutes()[from..], &week.request_minutes()[from..], 5, 0.0).replica_minutes / 60.0;
        assert_eq!(oracle.outcome.overload.requests, 0, "{kind}");
        assert!(
            (least..1.001 * least).contains(&(oracle.outcome.gpu_hours + 1e-6)),
            "{kind}: {} {least}",
            oracle.outcome.gpu_hours
        );
    }
}

/// Savings count above the commitment only: who commits to 20 replicas saves nothing by letting the twentieth go.
#[test]
fn committed_replicas_save_no_cash_on_the_week_of_2024() {
    let Some(weeks) = weeks() else { return };
    let conv = &weeks[1];
    let saved = |committed: u32| {
        let mut plan = plan(JUDGE_FROM_S);
        plan.bounds.committed = committed;
        let rows = compare::compare(&[Policy::default()], &compare::fluid(&plan, conv), 1, &|_, _| {}).unwrap();
        rows[0].saved_static
    };
    assert!(saved(0) > saved(20) && saved(20) > saved(30) && saved(30) > saved(40) - 1e-9);
    assert!(saved(40).abs() < 0.01, "{}", saved(40));
}
