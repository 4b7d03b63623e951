//! Tables for people: a header, right-aligned numbers, and totals under a line.

use comfy_table::{Cell, CellAlignment, ContentArrangement, presets};

/// Which side a column's values stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Names.
    Left,
    /// Numbers.
    Right,
}

/// A table in the making.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
    totals: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    #[must_use]
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Align)>) -> Table {
        let columns = columns.into_iter().map(|(name, align)| (name.to_owned(), align)).collect();
        Table { columns, rows: Vec::new(), totals: Vec::new() }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Adds a row under the line.
    pub fn total(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.totals.push(cells.into_iter().map(Into::into).collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        let widths = self.widths();
        let cell = |index: usize, text: &str| {
            let align = self.columns.get(index).map_or(Align::Left, |&(_, align)| align);
            let cell = Cell::new(printable(text));
            cell.set_alignment(if align == Align::Right { CellAlignment::Right } else { CellAlignment::Left })
        };
        table.set_header(self.columns.iter().enumerate().map(|(index, (name, _))| cell(index, name)));
        let rule = || widths.iter().enumerate().map(|(index, &width)| cell(index, &"─".repeat(width)));
        table.add_row(rule());
        for row in &self.rows {
            table.add_row(row.iter().enumerate().map(|(index, text)| cell(index, text)));
        }
        if !self.totals.is_empty() {
            table.add_row(rule());
        }
        for row in &self.totals {
            table.add_row(row.iter().enumerate().map(|(index, text)| cell(index, text)));
        }
        for line in table.to_string().lines() {
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl Table {
    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.columns.iter().map(|(name, _)| name.chars().count()).collect();
        for row in self.rows.iter().chain(&self.totals) {
            for (width, text) in widths.iter_mut().zip(row) {
                *width = (*width).max(printable(text).chars().count());
            }
        }
        widths
    }
}

/// Labels come from clients: control characters would let one rewrite the terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_and_totals_under_a_line() {
        let mut table = Table::new([("team", Align::Left), ("usd", Align::Right)]);
        table.row(["search", "1.00"]);
        table.row(["a\u{1b}[2J", "12.00"]);
        table.total(["total", "13.00"]);
        let text = table.to_string();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(lines[2].ends_with(" 1.00") && lines[5].starts_with("total"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
