//! A load-duration curve with what is committed to, and beside it what each level costs.

use plotters::prelude::*;

use super::axis::Axis;
use super::{DEMAND, FAINT, GOOD, INK, PAID, canvas, font, number, ticks};

/// What is drawn.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curve {
    /// Above the picture.
    pub title: String,
    /// Below the title.
    pub subtitle: String,
    /// Numbers of GPUs, falling, each with the part of the time in which at least so many were in use.
    pub steps: Vec<(u32, f64)>,
    /// GPUs committed to.
    pub level: u32,
    /// The part of the time that a GPU has to be in use to be worth committing to: `r / p`.
    pub break_even: f64,
    /// Cost in dollars of committing to 0, 1, 2, … GPUs.
    pub costs: Vec<f64>,
}

/// Draws the curve on the left and the costs on the right.
///
/// # Errors
/// When it cannot be drawn.
pub fn curve(curve: &Curve) -> anyhow::Result<String> {
    let peak = curve.steps.iter().map(|(gpus, _)| *gpus).max().unwrap_or(0).max(curve.level).max(1);
    let top = f64::from(peak) * 1.1;
    let level = f64::from(curve.level);
    canvas(&curve.title, &curve.subtitle, &[], |area| {
        let (left, right) = area.split_horizontally((52).percent_width());
        let mut chart = ChartBuilder::on(&left)
            .x_label_area_size(44)
            .y_label_area_size(52)
            .build_cartesian_2d(Axis::new(0.0..1.0, ticks(0.0..1.0, 5)), Axis::new(0.0..top, ticks(0.0..top, 8)))?;
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .axis_style(INK.mix(0.4))
            .label_style(font(13).color(&INK))
            .x_labels(40)
            .y_labels(40)
            .x_label_formatter(&|part| format!("{} %", number(part * 100.0)))
            .y_label_formatter(&|gpus| number(*gpus))
            .x_desc("of the time at least so many")
            .y_desc("GPUs in use")
            .axis_desc_style(font(13).color(&INK))
            .draw()?;
        // From the longest to the shortest use: (part, GPUs) pairs, as stairs.
        let mut stairs = Vec::new();
        let mut before = 0.0;
        for &(gpus, part) in &curve.steps {
            stairs.extend([(before, f64::from(gpus)), (part, f64::from(gpus))]);
            before = part;
        }
        chart.draw_series(AreaSeries::new(stairs, 0.0, DEMAND.mix(0.5)).border_style(DEMAND.stroke_width(2)))?;
        let committed = Rectangle::new([(0.0, 0.0), (1.0, level)], GOOD.mix(0.25).filled());
        chart.draw_series([committed])?;
        let across = [(0.0, level), (1.0, level)];
        chart.draw_series(LineSeries::new(across, GOOD.stroke_width(2)))?;
        let name = Text::new(format!("committed: {}", curve.level), (0.62, level + top * 0.045), font(14).color(&GOOD));
        chart.draw_series([name])?;
        if curve.break_even.is_finite() && curve.break_even <= 1.0 {
            let up = [(curve.break_even, 0.0), (curve.break_even, top)];
            chart.draw_series(DashedLineSeries::new(up, 6, 5, PAID.stroke_width(2)))?;
            let name = format!("r/p = {}", number(curve.break_even));
            chart.draw_series([Text::new(name, (curve.break_even + 0.01, top * 0.97), font(13).color(&INK))])?;
        }
        costs(curve, &right)
    })
}

fn costs(
    curve: &Curve,
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
) -> Result<(), super::DrawingFailed> {
    let most = curve.costs.iter().copied().fold(0.0, f64::max).max(0.01) * 1.08;
    let last = curve.costs.len().saturating_sub(1).max(1) as f64;
    let mut chart = ChartBuilder::on(area).x_label_area_size(44).y_label_area_size(80).build_cartesian_2d(
        Axis::new(0.0..last * 1.03, ticks(0.0..last, 8)),
        Axis::new(0.0..most, ticks(0.0..most, 6)),
    )?;
    chart
        .configure_mesh()
        .bold_line_style(FAINT)
        .axis_style(INK.mix(0.4))
        .label_style(font(13).color(&INK))
        .x_labels(40)
        .y_labels(40)
        .x_label_formatter(&|gpus| number(*gpus))
        .y_label_formatter(&|usd| format!("${}", number(*usd)))
        .x_desc("GPUs committed")
        .y_desc("cost")
        .axis_desc_style(font(13).color(&INK))
        .draw()?;
    let line = curve.costs.iter().enumerate().map(|(level, cost)| (level as f64, *cost));
    chart.draw_series(LineSeries::new(line, CAPACITY_LINE))?;
    if let Some(&cost) = curve.costs.get(curve.level as usize) {
        let place = (f64::from(curve.level), cost);
        chart.draw_series([Circle::new(place, 6, GOOD.filled())])?;
    }
    Ok(())
}

const CAPACITY_LINE: ShapeStyle = ShapeStyle {
    color: RGBAColor(super::CAPACITY.0, super::CAPACITY.1, super::CAPACITY.2, 1.0),
    filled: false,
    stroke_width: 2,
};

#[cfg(test)]
mod tests {
    use super::super::tests::assert_well_formed;
    use super::*;

    #[test]
    fn the_level_and_every_cost_are_there() {
        let drawn = Curve {
            title: "commit".to_owned(),
            subtitle: String::new(),
            steps: vec![(10, 0.1), (6, 0.5), (2, 1.0)],
            level: 6,
            break_even: 0.5,
            costs: vec![10.0, 9.0, 8.5, 8.0, 7.8, 7.6, 7.5, 8.0, 9.0, 10.0, 11.0],
        };
        let svg = curve(&drawn).unwrap();
        assert_well_formed(&svg);
        for text in ["committed: 6", "r/p = 0.5", "GPUs in use", "GPUs committed"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.contains("<polygon") && svg.matches("<circle").count() == 1);
        let line =
            svg.split("<polyline").map(|part| part.split_whitespace().filter(|point| point.contains(',')).count());
        assert!(line.max().unwrap() >= 11, "every level is on the line");
    }

    #[test]
    fn nothing_can_be_drawn_too() {
        assert_well_formed(&curve(&Curve::default()).unwrap());
        let dear = Curve { break_even: f64::INFINITY, ..Curve::default() };
        assert_well_formed(&curve(&dear).unwrap());
    }
}
