//! Demand against capacity over time: what arrived, what could serve it, what was paid, and where it was too little.

use ledger::Timestamp;
use plotters::prelude::*;

use super::axis::Axis;
use super::{CAPACITY, DEMAND, FAINT, INK, MISSED, PAID, canvas, font, number, ticks, time_ticks};

/// Most moments that are drawn; more are merged, the most demand and the most paid with the least capacity.
const MOMENTS_MAX: usize = 1_000;

/// What a simulation or a ledger saw over time.
#[derive(Debug, Clone, Default)]
pub struct Course {
    /// Above the picture.
    pub title: String,
    /// Below the title.
    pub subtitle: String,
    /// When the first moment begins.
    pub start: Timestamp,
    /// How long each moment is, seconds.
    pub every_s: f64,
    /// The moments.
    pub moments: Vec<Moment>,
    /// Moments before this one are not judged; they are shaded.
    pub judged_from: usize,
    /// What the static plan has running.
    pub static_replicas: Option<u32>,
    /// Replicas that are paid for in any case.
    pub committed: u32,
}

/// One moment, in replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moment {
    /// Work that arrived.
    pub load: f64,
    /// What served.
    pub ready: f64,
    /// What was paid for.
    pub paid: f64,
    /// Whether more arrived than could be done.
    pub overloaded: bool,
}

impl Course {
    /// The course in at most `most` moments. Demand keeps its peaks, capacity its dips: nothing that was missed is lost.
    #[must_use]
    pub fn merged(&self, most: usize) -> Vec<Moment> {
        let each = self.moments.len().div_ceil(most.max(1)).max(1);
        self.moments
            .chunks(each)
            .map(|moments| Moment {
                load: moments.iter().map(|moment| moment.load).fold(0.0, f64::max),
                ready: moments.iter().map(|moment| moment.ready).fold(f64::INFINITY, f64::min),
                paid: moments.iter().map(|moment| moment.paid).fold(0.0, f64::max),
                overloaded: moments.iter().any(|moment| moment.overloaded),
            })
            .collect()
    }

    /// The course in at most `most` moments, each the mean of what it holds.
    #[must_use]
    pub fn averaged(&self, most: usize) -> Vec<Moment> {
        let each = self.moments.len().div_ceil(most.max(1)).max(1);
        let mean =
            |moments: &[Moment], of: fn(&Moment) -> f64| moments.iter().map(of).sum::<f64>() / moments.len() as f64;
        self.moments
            .chunks(each)
            .map(|moments| Moment {
                load: mean(moments, |moment| moment.load),
                ready: mean(moments, |moment| moment.ready),
                paid: mean(moments, |moment| moment.paid),
                overloaded: moments.iter().any(|moment| moment.overloaded),
            })
            .collect()
    }

    /// The highest value of anything.
    #[must_use]
    pub fn highest(&self) -> f64 {
        let of = |moment: &Moment| moment.load.max(moment.ready).max(moment.paid);
        let known = f64::from(self.static_replicas.unwrap_or(0).max(self.committed));
        self.moments.iter().map(of).fold(known, f64::max)
    }
}

/// Draws a course.
///
/// # Errors
/// When it cannot be drawn.
pub fn course(course: &Course) -> anyhow::Result<String> {
    let hours = (course.moments.len() as f64 * course.every_s / 3_600.0).max(1e-3);
    let moments = course.merged(MOMENTS_MAX);
    let every_h = hours / moments.len().max(1) as f64;
    let top = (course.highest() * 1.08).max(1.0);
    let at = |index: usize| index as f64 * every_h;
    // Steps, not slopes: a replica is there or not.
    let steps = |of: fn(&Moment) -> f64| -> Vec<(f64, f64)> {
        moments
            .iter()
            .enumerate()
            .flat_map(|(index, moment)| [(at(index), of(moment)), (at(index + 1), of(moment))])
            .collect()
    };
    let (time_points, shown) = time_ticks(course.start, hours);
    let dashed = INK.mix(0.6);
    let levels =
        [(course.static_replicas, "static plan"), (Some(course.committed).filter(|&level| level > 0), "committed")];
    let levels: Vec<(f64, String)> = levels
        .into_iter()
        .filter_map(|(level, name)| Some((f64::from(level?), format!("{name}: {}", level?))))
        .collect();
    let mut keys = vec![
        ("demand".to_owned(), DEMAND.mix(0.55)),
        ("serving".to_owned(), CAPACITY.to_rgba()),
        ("paid for".to_owned(), PAID.to_rgba()),
        ("overloaded".to_owned(), MISSED.mix(0.35)),
    ];
    keys.extend(levels.iter().map(|(_, name)| (name.clone(), dashed)));
    keys.extend((course.judged_from > 0).then(|| ("to learn, not judged".to_owned(), FAINT.mix(0.7))));
    canvas(&course.title, &course.subtitle, &keys, |area| {
        let mut chart = ChartBuilder::on(area)
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d(Axis::new(0.0..hours, time_points), Axis::new(0.0..top, ticks(0.0..top, 8)))?;
        if course.judged_from > 0 {
            let until = (course.judged_from as f64 * course.every_s / 3_600.0).min(hours);
            chart.draw_series([Rectangle::new([(0.0, 0.0), (until, top)], FAINT.mix(0.45).filled())])?;
        }
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(FAINT)
            .axis_style(INK.mix(0.4))
            .label_style(font(13).color(&INK))
            .x_labels(40)
            .y_labels(40)
            .x_label_formatter(&|at| shown(*at))
            .y_label_formatter(&|value| number(*value))
            .y_desc("replicas")
            .axis_desc_style(font(13).color(&INK))
            .draw()?;
        let missed = moments.iter().enumerate().filter(|(_, moment)| moment.overloaded).map(|(index, _)| {
            let until = at(index + 1).max(at(index) + hours / 900.0);
            Rectangle::new([(at(index), 0.0), (until, top)], MISSED.mix(0.35).filled())
        });
        chart.draw_series(missed)?;
        chart.draw_series(AreaSeries::new(steps(|moment| moment.load), 0.0, DEMAND.mix(0.55)))?;
        chart.draw_series(LineSeries::new(steps(|moment| moment.paid), PAID.stroke_width(1)))?;
        chart.draw_series(LineSeries::new(steps(|moment| moment.ready), CAPACITY.stroke_width(2)))?;
        for (level, _) in levels {
            chart.draw_series(DashedLineSeries::new([(0.0, level), (hours, level)], 6, 5, dashed.stroke_width(1)))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_well_formed;
    use super::*;

    fn week() -> Course {
        let moment = |index: usize| {
            let load = 20.0 + 15.0 * (index as f64 / 1_440.0 * std::f64::consts::TAU).sin();
            Moment { load, ready: 36.0, paid: 36.5, overloaded: index == 5_000 }
        };
        Course {
            title: "code & <conversation>".to_owned(),
            subtitle: "token-rate".to_owned(),
            start: "2024-05-10".parse().unwrap(),
            every_s: 60.0,
            moments: (0..10_080).map(moment).collect(),
            judged_from: 4_320,
            static_replicas: Some(40),
            committed: 6,
        }
    }

    #[test]
    fn a_week_is_drawn_with_everything_it_has() {
        let svg = course(&week()).unwrap();
        assert_well_formed(&svg);
        for text in [
            "code &amp; &lt;conversation&gt;",
            "05-12",
            "static plan: 40",
            "committed: 6",
            "overloaded",
            "demand",
            "serving",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.contains("<polygon") && svg.matches("<polyline").count() >= 2, "an area and lines are there");
        assert!(svg.len() < 300_000, "{} bytes", svg.len());
    }

    #[test]
    fn merging_keeps_peaks_dips_and_misses() {
        let merged = week().merged(100);
        assert_eq!(merged.len(), 100);
        assert_eq!(merged.iter().filter(|moment| moment.overloaded).count(), 1);
        assert!(merged.iter().all(|moment| moment.ready == 36.0));
        assert!((merged.iter().map(|moment| moment.load).fold(0.0, f64::max) - 35.0).abs() < 0.01);
    }

    #[test]
    fn nothing_can_be_drawn_too() {
        assert_well_formed(&course(&Course::default()).unwrap());
    }
}
