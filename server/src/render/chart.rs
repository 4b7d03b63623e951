//! A course in the terminal, with block characters: demand as solid columns, spare capacity above it in light ones.

use super::picture::Course;

/// Eighths of a character's height.
const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The course in `columns` by `rows` characters, with the scale at the left and marks below where demand was above capacity.
#[must_use]
pub fn course(course: &Course, columns: usize, rows: usize) -> String {
    let moments = course.averaged(columns);
    let top = course.highest();
    if moments.is_empty() || top <= 0.0 {
        return "nothing to show\n".to_owned();
    }
    let unit = top / rows as f64;
    let width = format!("{top:.0}").len();
    let mut text = String::new();
    for row in (0..rows).rev() {
        let floor = row as f64 * unit;
        let scale = if row + 1 == rows || row == 0 {
            format!("{:>width$.0}", floor + unit * f64::from(u8::from(row > 0)))
        } else {
            " ".repeat(width)
        };
        text.push_str(&format!("{scale} │"));
        for moment in &moments {
            text.push(match () {
                () if moment.load > floor => block((moment.load - floor) / unit),
                () if moment.ready > floor + unit * 0.35 => '░',
                () => ' ',
            });
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    let missed = moments.iter().map(|moment| if moment.overloaded { '×' } else { '─' });
    text.push_str(&format!("{} └{}\n", " ".repeat(width), missed.collect::<String>()));
    let (first, last) = (day(course, 0), day(course, course.moments.len()));
    let gap = moments.len().saturating_sub(first.len() + last.len());
    text.push_str(&format!("{}  {first}{}{last}\n", " ".repeat(width), " ".repeat(gap)));
    text.push_str(&format!("{}  █ demand  ░ serving and spare  × overloaded\n", " ".repeat(width)));
    text
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the blocks there are")]
fn block(part: f64) -> char {
    BLOCKS[(part * 8.0).ceil().clamp(1.0, 8.0) as usize]
}

#[expect(clippy::cast_possible_truncation, reason = "seconds of a trace")]
fn day(course: &Course, moment: usize) -> String {
    let at = course.start.plus_micros((moment as f64 * course.every_s * 1e6) as i64).to_string();
    at.get(..16).unwrap_or(&at).replace('T', " ")
}

#[cfg(test)]
mod tests {
    use super::super::picture::Moment;
    use super::*;

    #[test]
    fn demand_stands_on_the_axis_and_spare_above_it() {
        let moment = |load: f64, ready: f64| Moment { load, ready, paid: ready, overloaded: load > ready };
        let shown = Course {
            start: "2024-05-10".parse().unwrap(),
            every_s: 3_600.0,
            moments: vec![moment(1.0, 4.0), moment(4.0, 4.0), moment(3.0, 2.0)],
            ..Course::default()
        };
        let text = course(&shown, 40, 4);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "4 │░█");
        assert_eq!(lines[1], "  │░██");
        assert_eq!(lines[3], "0 │███");
        assert_eq!(lines[4], "  └──×");
        assert!(lines[5].contains("2024-05-10 00:00"), "{text}");
    }

    #[test]
    fn a_long_course_fits_the_width() {
        let moments = vec![Moment { load: 12.3, ready: 14.0, paid: 14.0, overloaded: false }; 10_080];
        let text = course(&Course { moments, every_s: 60.0, ..Course::default() }, 72, 8);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(course(&Course::default(), 72, 8), "nothing to show\n");
    }
}
