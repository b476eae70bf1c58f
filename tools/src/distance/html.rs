//! The report as one page that needs nothing else: style and charts are inside of it.

use std::fmt::Write as _;

use super::format::{bytes, millis};
use super::result::{Point, ProfileResult, Report};
use super::svg::{Chart, Line, escaped};
use crate::status::waterfall::{Bar, bars};

const STYLE: &str = include_str!("page.css");
/// A bar that begins at the very end still shows.
const BAR_BEGINS_PERCENT_MAX: f64 = 99.5;
/// Percentiles that are marked on the axis.
const PERCENTILE_MARKS: [f64; 5] = [50.0, 90.0, 99.0, 99.9, 99.99];

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    let _ = write_page(report, &mut out);
    out
}

fn write_page(report: &Report, out: &mut String) -> std::fmt::Result {
    let machine = &report.machine;
    write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>What a commit costs, by level and distance</title><style>{STYLE}</style></head><body><main>\
         <h1>What a commit costs, by level and distance</h1>\
         <p class=\"facts\">walferry {} on {} processors ({}), Linux {}. Link: {}; {} replica{}, a remote commit waits for \
         {}; {} bytes a commit. Every round trip below was measured through the link.</p>",
        escaped(machine.version),
        machine.cpus,
        escaped(&machine.cpu),
        escaped(&machine.kernel),
        escaped(&report.link),
        report.replicas,
        if report.replicas == 1 { "" } else { "s" },
        escaped(&report.sync),
        report.payload_bytes,
    )?;
    if report.interrupted {
        write!(out, "<p class=\"warning\">Interrupted: what is missing was not measured.</p>")?;
    }
    write_overview(report, out)?;
    for profile in &report.profiles {
        write_profile(profile, out)?;
    }
    write_model(report, out)?;
    writeln!(out, "</main></body></html>")
}

fn row(out: &mut String, tag: &str, cells: &[String]) -> std::fmt::Result {
    write!(out, "<tr>")?;
    for cell in cells {
        write!(out, "<{tag}>{}</{tag}>", escaped(cell))?;
    }
    write!(out, "</tr>")
}

fn head(out: &mut String, cells: &[&str]) -> std::fmt::Result {
    write!(out, "<div class=\"scroll\"><table>")?;
    row(out, "th", &cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>())
}

const TABLE_END: &str = "</table></div>";

/// One client's median, by level and distance: the answer in one look.
fn write_overview(report: &Report, out: &mut String) -> std::fmt::Result {
    let Some(first) = report.profiles.first() else { return Ok(()) };
    write!(out, "<h2>One client, median</h2>")?;
    let names =
        report.profiles.iter().map(|profile| format!("{} ({})", profile.name, millis(profile.rtt.p50_us / 1e3)));
    let titles: Vec<String> = std::iter::once("level".to_owned()).chain(names).collect();
    head(out, &titles.iter().map(String::as_str).collect::<Vec<_>>())?;
    for level in first.levels() {
        let cell = |profile: &ProfileResult| {
            let point = profile.point(level, profile.fewest_clients());
            point.map_or("-".to_owned(), |point| millis(point.load.latency_ms.p50))
        };
        let cells: Vec<String> = std::iter::once(level.to_string()).chain(report.profiles.iter().map(cell)).collect();
        row(out, "td", &cells)?;
    }
    write!(out, "{TABLE_END}")
}

fn write_profile(profile: &ProfileResult, out: &mut String) -> std::fmt::Result {
    write!(out, "<h2>{}</h2><p class=\"facts\">Measured round trip {}</p>", escaped(&profile.name), profile.rtt)?;
    write!(out, "<ul class=\"rule\">")?;
    for line in &profile.rule {
        write!(out, "<li>{}</li>", escaped(line))?;
    }
    write!(out, "</ul><div class=\"charts\">")?;
    let one = format!("Latency by percentile, {} client", profile.fewest_clients());
    figure(out, &one, &percentiles(profile))?;
    figure(out, "Commits a second by clients", &throughput(profile))?;
    write!(out, "</div>")?;
    write!(
        out,
        "<h3>The waterfall of a commit</h3><p class=\"facts\">Mean of each stage, {} client. The filled bars are the \
         critical path; the grey ones run beside it.</p>",
        profile.fewest_clients()
    )?;
    for level in profile.levels() {
        if let Some(point) = profile.point(level, profile.fewest_clients()) {
            write_waterfall(point, out)?;
        }
    }
    write_points(profile, out)?;
    write_saturation(profile, out)
}

fn figure(out: &mut String, caption: &str, svg: &str) -> std::fmt::Result {
    write!(out, "<figure><figcaption>{}</figcaption>{svg}</figure>", escaped(caption))
}

fn percentiles(profile: &ProfileResult) -> String {
    // The axis is the share that is slower, so that the tail is spread out: 50 % is 2, 99 % is 100.
    let place = |percentile: f64| 100.0 / (100.0 - percentile);
    let line = |(colour, level)| {
        let point = profile.point(level, profile.fewest_clients())?;
        let curve = point.load.percentiles_ms.iter().filter(|(percentile, _)| *percentile < 100.0);
        let points = curve.map(|(percentile, ms)| (place(*percentile), *ms)).collect();
        Some(Line { name: level.to_string(), colour, points })
    };
    let lines = profile.levels().into_iter().enumerate().filter_map(line).collect();
    let x_marks = PERCENTILE_MARKS.iter().map(|percentile| (place(*percentile), format!("{percentile} %"))).collect();
    Chart { x_title: "percentile of commits", x_marks, y_label: decade, lines }.svg()
}

/// A whole power of ten of milliseconds, or what a dot stands for.
fn decade(ms: f64) -> String {
    millis(ms).replace(".00 ", " ")
}

fn per_second(tps: f64) -> String {
    if tps < 1000.0 { format!("{tps:.0}") } else { format!("{:.0}k", tps / 1e3) }
}

fn throughput(profile: &ProfileResult) -> String {
    let line = |(colour, level)| {
        let runs = profile.closed().filter(|point| point.level == level);
        let points = runs.map(|point| (point.clients as f64, point.load.tps)).collect();
        Line { name: level.to_string(), colour, points }
    };
    let lines = profile.levels().into_iter().enumerate().map(line).collect();
    let mut clients: Vec<usize> = profile.closed().map(|point| point.clients).collect();
    clients.sort_unstable();
    clients.dedup();
    let x_marks = clients.into_iter().map(|clients| (clients as f64, clients.to_string())).collect();
    Chart { x_title: "clients", x_marks, y_label: per_second, lines }.svg()
}

/// The stages as bars on one time axis; the two branches overlap.
fn write_waterfall(point: &Point, out: &mut String) -> std::fmt::Result {
    let total_us = point.waterfall["total"]["us"]["mean"].as_f64().unwrap_or(0.0);
    if total_us <= 0.0 {
        return Ok(());
    }
    write!(out, "<h4>{}: {} in all</h4><div class=\"waterfall\">", point.level, millis(total_us / 1e3))?;
    let share = |us: f64| (us / total_us * 100.0).clamp(0.0, 100.0);
    for Bar { stage, from_us, mean_us, is_critical, .. } in bars(&point.waterfall) {
        let from = share(from_us).min(BAR_BEGINS_PERCENT_MAX);
        write!(
            out,
            "<span>{}</span><span class=\"number\">{}</span><span class=\"track\">\
             <i class=\"{}\" style=\"margin-left:{from:.2}%;width:{:.2}%\"></i></span>",
            escaped(stage),
            millis(mean_us / 1e3),
            if is_critical { "critical" } else { "beside" },
            share(mean_us).min(100.0 - from),
        )?;
    }
    write!(out, "</div>")
}

fn write_points(profile: &ProfileResult, out: &mut String) -> std::fmt::Result {
    write!(out, "<details><summary>Every run</summary>")?;
    head(out, &["level", "clients", "tps", "p50", "p90", "p99", "p99.9", "over local", "over RTT", "records/flush"])?;
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for point in &profile.points {
        let latency = &point.load.latency_ms;
        let clients = match point.rate {
            Some(rate) => format!("{}, open loop at {rate:.0}/s", point.clients),
            None => point.clients.to_string(),
        };
        let cells = [
            point.level.to_string(),
            clients,
            format!("{:.0}", point.load.tps),
            millis(latency.p50),
            millis(latency.p90),
            millis(latency.p99),
            millis(latency.p999),
            or_dash(point.over_local_ms.map(millis)),
            or_dash(point.over_rtt_ms.map(millis)),
            or_dash(point.records_per_flush.map(|records| format!("{records:.1}"))),
        ];
        row(out, "td", &cells)?;
    }
    write!(out, "{TABLE_END}</details>")
}

fn write_saturation(profile: &ProfileResult, out: &mut String) -> std::fmt::Result {
    write!(out, "<details><summary>Clients that fill it, and what a failover loses</summary>")?;
    head(out, &["level", "Little's law", "measured", "tps reached", "lost in a failover, at most"])?;
    for row_of in &profile.saturation {
        let loss = profile.losses.iter().find(|loss| loss.level == row_of.level);
        let lost = match loss.and_then(|loss| loss.at_most) {
            Some(lag) => format!("{}, {}", millis(lag.seconds_max * 1e3), bytes(lag.bytes_max as f64)),
            None if row_of.level.is_remote() => "nothing".to_owned(),
            None => "not measured".to_owned(),
        };
        let measured =
            if row_of.is_reached { row_of.measured.to_string() } else { format!("over {}", row_of.measured) };
        let law = format!("{:.0}", row_of.littles_law);
        row(out, "td", &[row_of.level.to_string(), law, measured, format!("{:.0}", row_of.tps_max), lost])?;
    }
    write!(out, "{TABLE_END}</details>")
}

fn write_model(report: &Report, out: &mut String) -> std::fmt::Result {
    if report.model.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>The model</h2><p class=\"facts\">One client's stages with another round trip in their midst. \
        The error is predicted over measured.</p>"
    )?;
    head(out, &["distance", "RTT", "level", "from", "p50", "p99", "tps", "error of p50", "of p99", "of tps"])?;
    for of in &report.model {
        let percent =
            |value: Option<f64>| value.map_or("not measured".to_owned(), |value| format!("{:+.0} %", value * 100.0));
        let error = of.error.as_ref();
        let cells = [
            of.profile.clone(),
            millis(of.rtt_ms),
            of.level.to_string(),
            of.from.clone(),
            millis(of.p50_ms),
            millis(of.p99_ms),
            format!("{:.0} ({} clients)", of.tps, of.clients),
            percent(error.map(|error| error.p50)),
            percent(error.map(|error| error.p99)),
            percent(error.map(|error| error.tps)),
        ];
        row(out, "td", &cells)?;
    }
    write!(out, "{TABLE_END}")
}
