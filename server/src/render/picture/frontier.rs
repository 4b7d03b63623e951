//! Cost against what was missed: each policy a point, the best ones joined.

use plotters::prelude::*;

use super::axis::Axis;
use super::{DEMAND, FAINT, GOOD, INK, MISSED, PAID, canvas, font, number, ticks};

/// One policy, or one setting of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Beside the point; nothing where it is empty.
    pub label: String,
    /// Dollars.
    pub usd: f64,
    /// Part of all requests that was missed, 0 to 1.
    pub missed: f64,
    /// Whether it knows the future.
    pub oracle: bool,
}

/// Points that no other point beats in both, cheapest first.
#[must_use]
pub fn best(points: &[Point]) -> Vec<&Point> {
    let mut order: Vec<&Point> = points.iter().filter(|point| !point.oracle).collect();
    order.sort_by(|a, b| a.usd.total_cmp(&b.usd).then(a.missed.total_cmp(&b.missed)));
    let mut least = f64::INFINITY;
    order.retain(|point| {
        let better = point.missed < least;
        least = least.min(point.missed);
        better
    });
    order
}

/// The share below which misses stand on a scale that is nearly even; above it every factor takes the same space.
const FINE: f64 = 0.000_1;
/// Where a name stands beside its point, and where when others stand there already.
const BESIDE: [i32; 4] = [-7, 8, -22, 23];

/// Draws the points. Small shares of misses are what matters, so they get most of the scale.
///
/// # Errors
/// When it cannot be drawn.
pub fn frontier(title: &str, subtitle: &str, points: &[Point]) -> anyhow::Result<String> {
    let dollars = points.iter().map(|point| point.usd);
    let (least, most) =
        dollars.fold((f64::INFINITY, 0.0), |(least, most): (f64, f64), usd| (least.min(usd), most.max(usd)));
    let least = if least.is_finite() { least } else { 0.0 };
    let pad = ((most - least) * 0.08).max(most * 0.01).max(0.01);
    let across = (least - pad).max(0.0)..most + pad * 2.5;
    let spread = |missed: f64| (missed.max(0.0) / FINE).ln_1p();
    let top = spread(points.iter().map(|point| point.missed).fold(0.000_1, f64::max)) * 1.12;
    let shares = [0.0, 0.0001, 0.0005, 0.002, 0.01, 0.05, 0.2, 1.0];
    let shares: Vec<f64> = shares.into_iter().map(spread).filter(|share| *share <= top).collect();
    let keys = [
        ("nothing costs less and misses less".to_owned(), GOOD.to_rgba()),
        ("knows the future".to_owned(), PAID.to_rgba()),
        ("misses more than 1 %".to_owned(), MISSED.to_rgba()),
    ];
    canvas(title, subtitle, &keys, |area| {
        let mut chart = ChartBuilder::on(area).x_label_area_size(44).y_label_area_size(70).build_cartesian_2d(
            Axis::new(across.clone(), ticks(across.clone(), 8)),
            Axis::new(-top * 0.04..top, shares),
        )?;
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .axis_style(INK.mix(0.4))
            .label_style(font(13).color(&INK))
            .x_labels(40)
            .y_labels(40)
            .x_label_formatter(&|usd| format!("${}", number(*usd)))
            .y_label_formatter(&|place| format!("{} %", number((place.exp_m1() * FINE * 1e6).round() / 1e4)))
            .x_desc("cost")
            .y_desc("requests in overloaded minutes")
            .axis_desc_style(font(13).color(&INK))
            .draw()?;
        let line = best(points).into_iter().map(|point| (point.usd, spread(point.missed)));
        chart.draw_series(LineSeries::new(line, GOOD.stroke_width(2)))?;
        let on_line = best(points);
        let close = |a: &Point, b: &Point| {
            (a.usd - b.usd).abs() < 0.1 * (across.end - across.start)
                && (spread(a.missed) - spread(b.missed)).abs() < 0.04 * top
        };
        for (index, point) in points.iter().enumerate() {
            let place = (point.usd, spread(point.missed));
            let colour = match () {
                () if point.oracle => PAID,
                () if on_line.contains(&point) => GOOD,
                () if point.missed > 0.01 => MISSED,
                () => DEMAND,
            };
            chart.draw_series([Circle::new(place, 5, colour.filled())])?;
            let before = points[..index].iter().filter(|other| close(other, point)).count();
            let label = Text::new(point.label.clone(), (8, BESIDE[before % BESIDE.len()]), font(13).color(&INK));
            chart.draw_series([EmptyElement::at(place) + label])?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_well_formed;
    use super::*;

    fn points() -> Vec<Point> {
        let point =
            |label: &str, usd, missed| Point { label: label.to_owned(), usd, missed, oracle: label == "oracle" };
        vec![
            point("static", 100.0, 0.0),
            point("hpa", 60.0, 0.004),
            point("kpa", 62.0, 0.006),
            point("forecast", 52.0, 0.000_8),
            point("oracle", 47.0, 0.0),
        ]
    }

    #[test]
    fn the_best_are_those_that_nothing_beats() {
        let points = points();
        let names: Vec<&str> = best(&points).iter().map(|point| point.label.as_str()).collect();
        assert_eq!(names, ["forecast", "static"], "the oracle is a bound, not a choice");
    }

    #[test]
    fn every_policy_is_a_point_with_its_name() {
        let svg = frontier("the week", "", &points()).unwrap();
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 5);
        for name in ["static", "hpa", "kpa", "forecast", "oracle", "0.05 %"] {
            assert!(svg.contains(name), "{name}");
        }
    }

    #[test]
    fn one_point_or_none_can_be_drawn() {
        assert_well_formed(&frontier("none", "", &[]).unwrap());
        assert_well_formed(&frontier("one", "", &points()[..1]).unwrap());
    }
}
