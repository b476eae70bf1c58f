//! Line charts as inline SVG; colours come from the page's style, so that light and dark are its choice. Knows no commit.

use std::fmt::Write as _;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 104.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 44.0;
/// Labels at the lines' ends keep this distance.
const LABEL_GAP: f64 = 13.0;

/// A line with a name and the style's colour of this number.
pub struct Line {
    /// Its label.
    pub name: String,
    /// Which colour.
    pub colour: usize,
    /// x and y, both above 0.
    pub points: Vec<(f64, f64)>,
}

/// One chart; both axes are logarithmic.
pub struct Chart<'a> {
    /// Below the x axis.
    pub x_title: &'a str,
    /// Marks on the x axis: where, and what they say.
    pub x_marks: Vec<(f64, String)>,
    /// How a value on the y axis is written.
    pub y_label: fn(f64) -> String,
    /// The lines.
    pub lines: Vec<Line>,
}

/// Text that is safe in HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Chart<'_> {
    /// The element, or nothing if there is nothing to draw.
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points).filter(|(x, y)| *x > 0.0 && *y > 0.0);
        let bounds = |of: fn(&(f64, f64)) -> f64| {
            let (low, high) = points().map(of).fold((f64::MAX, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
            (low, high.max(low * 1.01))
        };
        if points().next().is_none() {
            return String::new();
        }
        let (x_low, x_high) = bounds(|point| point.0);
        let (y_low, y_high) = bounds(|point| point.1);
        // Whole decades, so that the marks frame the lines.
        let (y_low, y_high) = (10_f64.powf(y_low.log10().floor()), 10_f64.powf(y_high.log10().ceil()));
        let share = |v: f64, low: f64, high: f64| (v.ln() - low.ln()) / (high.ln() - low.ln());
        let x = |v: f64| LEFT + share(v, x_low, x_high) * (WIDTH - LEFT - RIGHT);
        let y = |v: f64| HEIGHT - BOTTOM - share(v, y_low, y_high) * (HEIGHT - TOP - BOTTOM);
        let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
        let mut mark = y_low;
        // Writing into a String cannot fail, here and below.
        while mark <= y_high * 1.001 {
            let (at, right, label) = (y(mark), WIDTH - RIGHT, (self.y_label)(mark));
            let _ = write!(out, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
            let _ = write!(
                out,
                "<text class=\"mark\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 8.0,
                at + 4.0
            );
            mark *= 10.0;
        }
        for (value, label) in self.x_marks.iter().filter(|(value, _)| (x_low..=x_high).contains(value)) {
            let (at, below) = (x(*value), HEIGHT - BOTTOM + 16.0);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\"/>",
                HEIGHT - BOTTOM
            );
            let _ = write!(
                out,
                "<text class=\"mark\" x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{}</text>",
                escaped(label)
            );
        }
        let middle = LEFT + (WIDTH - LEFT - RIGHT) / 2.0;
        let _ = write!(
            out,
            "<text class=\"mark\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 8.0,
            escaped(self.x_title)
        );
        for line in &self.lines {
            let path: Vec<String> = line
                .points
                .iter()
                .filter(|(x, y)| *x > 0.0 && *y > 0.0)
                .map(|(px, py)| format!("{:.1},{:.1}", x(*px), y(*py)))
                .collect();
            let _ = write!(out, "<polyline class=\"line c{}\" points=\"{}\"/>", line.colour, path.join(" "));
            for (px, py) in line.points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0) {
                let title = format!("{}: {}", escaped(&line.name), (self.y_label)(*py));
                let _ = write!(
                    out,
                    "<circle class=\"dot f{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{title}</title></circle>",
                    line.colour,
                    x(*px),
                    y(*py)
                );
            }
        }
        for (line, at) in self.lines.iter().zip(self.label_places(y)) {
            let _ = write!(
                out,
                "<text class=\"label f{}\" x=\"{}\" y=\"{:.1}\">{}</text>",
                line.colour,
                WIDTH - RIGHT + 8.0,
                at + 4.0,
                escaped(&line.name)
            );
        }
        out.push_str("</svg>");
        out
    }

    /// Where the lines' labels stand: beside their ends, pushed apart where they would cover each other.
    fn label_places(&self, y: impl Fn(f64) -> f64) -> Vec<f64> {
        let ends: Vec<f64> = self.lines.iter().map(|line| line.points.last().map_or(TOP, |point| y(point.1))).collect();
        let mut order: Vec<usize> = (0..ends.len()).collect();
        order.sort_by(|a, b| ends[*a].total_cmp(&ends[*b]));
        let mut places = ends.clone();
        let mut free = TOP;
        for index in &order {
            places[*index] = places[*index].max(free);
            free = places[*index] + LABEL_GAP;
        }
        // What was pushed below the chart moves up again, from the lowest on.
        let mut limit = HEIGHT - BOTTOM;
        for index in order.iter().rev() {
            places[*index] = places[*index].min(limit);
            limit = places[*index] - LABEL_GAP;
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_cover_each_other_and_points_stay_inside() {
        let line = |name: &str, y: f64| Line { name: name.to_owned(), colour: 0, points: vec![(1.0, y), (100.0, y)] };
        let chart = Chart {
            x_title: "clients",
            x_marks: vec![(1.0, "1".to_owned()), (1e6, "far".to_owned())],
            y_label: |value| value.to_string(),
            lines: vec![line("a<b", 10.0), line("c", 10.1), line("d", 10.2)],
        };
        let svg = chart.svg();
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b") && !svg.contains(">far<"));
        let mut places = chart.label_places(|_| 255.0);
        places.sort_by(f64::total_cmp);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= LABEL_GAP - 0.01), "{places:?}");
        assert!(places.iter().all(|at| (TOP..=HEIGHT - BOTTOM).contains(at)), "{places:?}");
        assert!(Chart { lines: Vec::new(), ..chart }.svg().is_empty());
    }
}
