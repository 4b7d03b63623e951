//! Tables in Markdown, so that a program's output can be pasted into `docs/`.

/// A table with its columns aligned: text to the left, anything that looks like a number to the right.
#[must_use]
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headers[column].chars().count(), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headers.len()).map(width).collect();
    let numeric: Vec<bool> = (0..headers.len())
        .map(|column| rows.iter().all(|row| row.get(column).is_none_or(|cell| is_number(cell))))
        .collect();
    let line = |cells: &mut dyn Iterator<Item = String>| -> String {
        let padded: Vec<String> = cells
            .enumerate()
            .map(|(column, cell)| {
                let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
                if numeric[column] { format!("{pad}{cell}") } else { format!("{cell}{pad}") }
            })
            .collect();
        format!("| {} |\n", padded.join(" | "))
    };
    let mut text = line(&mut headers.iter().map(|header| (*header).to_owned()));
    let rule = |column: usize| {
        if numeric[column] { format!("{}:", "-".repeat(widths[column] - 1)) } else { "-".repeat(widths[column]) }
    };
    text.push_str(&line(&mut (0..headers.len()).map(rule)));
    for row in rows {
        text.push_str(&line(&mut row.iter().cloned()));
    }
    text
}

/// A number with as many decimals as are worth reading; `-` for none.
#[must_use]
pub fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.3}"),
    }
}

/// The middle of some measurements; the mean of the two middle ones when their number is even. `None` of none.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[sorted.len() / 2 - 1], upper) })
}

fn is_number(cell: &str) -> bool {
    cell.starts_with(|first: char| first.is_ascii_digit() || "+-".contains(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_medians_are_medians() {
        let rows = vec![vec!["direct".to_owned(), "7".to_owned()], vec!["x".to_owned(), "1234".to_owned()]];
        assert_eq!(
            table(&["target", "req/s"], &rows),
            "| target | req/s |\n| ------ | ----: |\n| direct |     7 |\n| x      |  1234 |\n"
        );
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }
}
