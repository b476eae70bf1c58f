//! A table as text for people or as Markdown for `perf/results`. Core.

/// A heading and rows of as many cells.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(heading: &[&str]) -> Table {
        Table { rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// One more row.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.rows[0].len(), "a row has the heading's cells");
        self.rows.push(cells);
    }

    /// Columns under each other.
    pub fn text(&self) -> String {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cell = |(column, cell): (usize, &String)| match column {
                0 => format!("{cell:<width$}", width = widths[0]),
                _ => format!("{cell:>width$}", width = widths[column]),
            };
            row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The same for a Markdown file.
    pub fn markdown(&self) -> String {
        let line = |row: &Vec<String>| format!("| {} |", row.join(" | "));
        let mut lines: Vec<String> = self.rows.iter().map(line).collect();
        lines.insert(1, "|---".repeat(self.rows[0].len()) + "|");
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_their_heading() {
        let mut table = Table::new(&["fault", "median"]);
        table.row(vec!["kill".to_owned(), "450 ms".to_owned()]);
        table.row(vec!["isolate".to_owned(), "9 ms".to_owned()]);
        assert_eq!(table.text(), "fault    median\nkill     450 ms\nisolate    9 ms");
        assert_eq!(table.markdown(), "| fault | median |\n|---|---|\n| kill | 450 ms |\n| isolate | 9 ms |");
    }
}
