//! An axis divided where we say, not where the drawing library would.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, KeyPointWeight, NoDefaultFormatting, Ranged, ValueFormatter};

/// A range of numbers with the places at which it is divided.
#[derive(Debug, Clone)]
pub struct Axis {
    range: Range<f64>,
    points: Vec<f64>,
}

impl Axis {
    /// A range divided at these values.
    pub fn new(range: Range<f64>, points: Vec<f64>) -> Axis {
        Axis { range, points }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    #[expect(
        clippy::cast_possible_truncation,
        reason = "pixels of one picture; a float saturates at the integer's ends"
    )]
    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let span = self.range.end - self.range.start;
        let part = if span > 0.0 { (value - self.range.start) / span } else { 0.5 };
        from + (f64::from(to - from) * part + 0.5).floor() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Only our own lines: none between them.
        if matches!(hint.weight(), KeyPointWeight::Bold) { self.points.clone() } else { Vec::new() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        super::number(*value)
    }
}
