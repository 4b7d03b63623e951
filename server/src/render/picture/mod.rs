//! Pictures as SVG text: a series goes in, one file comes out. Nothing here computes what is shown.

mod axis;
mod course;
mod curve;
mod frontier;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use ledger::Timestamp;
use plotters::coord::Shift;
use plotters::prelude::*;

pub use course::{Course, Moment, course};
pub use curve::{Curve, curve};
pub use frontier::{Point, best, frontier};

const SIZE: (u32, u32) = (1_200, 560);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(38, 42, 51);
const FAINT: RGBColor = RGBColor(225, 228, 234);
const DEMAND: RGBColor = RGBColor(86, 124, 184);
const CAPACITY: RGBColor = RGBColor(32, 36, 46);
const PAID: RGBColor = RGBColor(230, 159, 0);
const MISSED: RGBColor = RGBColor(204, 51, 51);
const GOOD: RGBColor = RGBColor(0, 135, 108);

/// Checks before any work that a picture can be written there: only SVG is drawn.
///
/// # Errors
/// One line when the name ends otherwise.
pub fn check(file: &Path) -> anyhow::Result<()> {
    match file.extension().and_then(|ending| ending.to_str()) {
        Some(ending) if ending.eq_ignore_ascii_case("svg") => Ok(()),
        _ => bail!("{}: pictures are SVG; let the name end in .svg", file.display()),
    }
}

/// Writes a picture.
///
/// # Errors
/// When the file cannot be written.
pub fn write(file: &Path, svg: &str) -> anyhow::Result<()> {
    std::fs::write(file, svg).with_context(|| format!("cannot write {}", file.display()))
}

/// A name and the colour that it is drawn in.
type Key = (String, RGBAColor);

/// An SVG with a title and the keys to its colours, and below them whatever `draw` puts there.
fn canvas(
    title: &str,
    subtitle: &str,
    keys: &[Key],
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), DrawingFailed>,
) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let painted = (|| {
            area.fill(&WHITE)?;
            area.draw(&Text::new(title.to_owned(), (24, 14), font(20).color(&INK)))?;
            area.draw(&Text::new(subtitle.to_owned(), (24, 41), font(13).color(&INK.mix(0.7))))?;
            let mut left = 24;
            for (name, colour) in keys {
                area.draw(&Rectangle::new([(left, 63), (left + 14, 73)], colour.filled()))?;
                area.draw(&Text::new(name.clone(), (left + 20, 62), font(13).color(&INK)))?;
                left += 48 + 7 * i32::try_from(name.chars().count()).unwrap_or(0);
            }
            draw(&area.margin(if keys.is_empty() { 70 } else { 86 }, 12, 12, 24))?;
            area.present()
        })();
        painted.map_err(|error| anyhow!("cannot draw the picture: {error}"))?;
    }
    Ok(svg)
}

/// What drawing into a text can end with.
type DrawingFailed = DrawingAreaErrorKind<std::io::Error>;

fn font(size: u32) -> FontDesc<'static> {
    FontDesc::new(FontFamily::Name(FONT), f64::from(size), FontStyle::Normal)
}

/// Round values between which an axis is divided, about `count` of them.
fn ticks(range: Range<f64>, count: u32) -> Vec<f64> {
    let span = range.end - range.start;
    if !(span > 0.0 && span.is_finite()) {
        return vec![range.start];
    }
    let rough = span / f64::from(count.max(1));
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let first = (range.start / step).ceil();
    (0..=count.saturating_mul(4))
        .map(|index| (first + f64::from(index)) * step)
        .take_while(|value| *value <= range.end + step * 1e-9)
        .collect()
}

/// Whole hours or days since `start` at which a clock shows a round time, and how to write them.
fn time_ticks(start: Timestamp, hours: f64) -> (Vec<f64>, impl Fn(f64) -> String) {
    const HOUR_US: f64 = 3_600e6;
    let step = [1.0 / 12.0, 0.25, 0.5, 1.0, 2.0, 3.0, 6.0, 12.0, 24.0, 48.0, 168.0, 336.0, 720.0];
    let step = step.into_iter().find(|step| hours / step <= 12.0).unwrap_or(2_160.0);
    let since_midnight = start.micros().rem_euclid(86_400_000_000) as f64 / HOUR_US;
    let first = (since_midnight / step).ceil() * step - since_midnight;
    let points = (0..40).map(|index| first + f64::from(index) * step).take_while(|at| *at <= hours + 1e-9).collect();
    let shown = move |at: f64| {
        let text = start.plus_micros(whole(at * HOUR_US)).to_string();
        let (day, clock) = text.split_once('T').unwrap_or((&text, ""));
        let (day, clock) = (day.get(5..).unwrap_or(day), clock.get(..5).unwrap_or(clock));
        if step >= 24.0 { day.to_owned() } else { format!("{day} {clock}") }
    };
    (points, shown)
}

#[expect(clippy::cast_possible_truncation, reason = "hours of a trace in microseconds")]
fn whole(micros: f64) -> i64 {
    micros.round() as i64
}

/// A number on an axis: no more digits than the step needs.
fn number(value: f64) -> String {
    let text = if value.abs() >= 100.0 || value.fract().abs() < 1e-9 {
        format!("{value:.0}")
    } else if value.abs() >= 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Opens and closes every tag in order, and has no stray ampersand: what a reader of XML insists on.
    pub fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let end = rest[at..].find('>').expect("every tag ends") + at;
            let tag = &rest[at + 1..end];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name.trim()), "{name} closes what was opened last");
            } else if !tag.ends_with('/') && !tag.starts_with(['?', '!']) {
                open.push(tag.split_whitespace().next().expect("a tag has a name"));
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "left open: {open:?}");
        for part in svg.split('&').skip(1) {
            assert!(
                ["amp;", "lt;", "gt;", "quot;", "apos;", "#"].iter().any(|entity| part.starts_with(entity)),
                "{part:.20}"
            );
        }
        assert!(svg.starts_with("<svg") && svg.contains(&format!("width=\"{}\"", SIZE.0)), "{svg:.80}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "a coordinate is no number");
    }

    #[test]
    fn axes_are_divided_at_round_values() {
        assert_eq!(ticks(0.0..40.0, 8), [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0]);
        assert_eq!(ticks(0.0..1.0, 5), [0.0, 0.2, 0.4, 0.600_000_000_000_000_1, 0.8, 1.0]);
        assert_eq!(ticks(3.0..3.0, 5), [3.0]);
        assert_eq!([0.2, 12.5, 250.0, 40.0, 0.0].map(number), ["0.2", "12.5", "250", "40", "0"]);
    }

    #[test]
    fn days_and_hours_stand_on_the_time_axis() {
        let start: Timestamp = "2024-05-10T00:00:00Z".parse().unwrap();
        let (points, shown) = time_ticks(start, 168.0);
        assert_eq!((points.len(), shown(points[0]), shown(points[7])), (8, "05-10".to_owned(), "05-17".to_owned()));
        let (points, shown) = time_ticks(start.plus_micros(30 * 60 * 1_000_000), 3.0);
        assert_eq!(shown(points[0]), "05-10 00:30");
        assert_eq!(points.len(), 13);
    }

    #[test]
    fn only_svg_is_drawn() {
        assert!(check(Path::new("week.SVG")).is_ok());
        assert!(check(Path::new("week.png")).unwrap_err().to_string().contains("let the name end in .svg"));
    }
}
