//! The report for a terminal.

use std::fmt::Write as _;

use super::format::{bytes, millis};
use super::result::{Point, ProfileResult, Report};

fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "-".to_owned())
}

/// The columns of `row`.
pub fn header() -> String {
    format!(
        "{:<13} {:>7} {:>9} {:>10} {:>10} {:>11} {:>10} {:>9}",
        "level", "clients", "tps", "p50", "p99", "over local", "over RTT", "rec/flush"
    )
}

/// One run.
pub fn row(point: &Point) -> String {
    let clients = match point.rate {
        Some(_) => format!("{} open", point.clients),
        None => point.clients.to_string(),
    };
    let mut row = format!(
        "{:<13} {clients:>7} {:>9.0} {:>10} {:>10} {:>11} {:>10} {:>9}",
        point.level,
        point.load.tps,
        millis(point.load.latency_ms.p50),
        millis(point.load.latency_ms.p99),
        or_dash(point.over_local_ms.map(millis)),
        or_dash(point.over_rtt_ms.map(millis)),
        or_dash(point.records_per_flush.map(|records| format!("{records:.1}"))),
    );
    if point.load.failed > 0 {
        let example = point.load.failures.first().map_or("", |failure| failure.example.as_str());
        let _ = write!(row, "  {} failed: {example}", point.load.failed);
    }
    row
}

/// A distance's heading.
pub fn title(profile: &ProfileResult) -> String {
    format!("{}: measured round trip {}", profile.name, profile.rtt)
}

/// What the rows add up to; with the rows if they were not told on the way.
pub fn summary(report: &Report, with_rows: bool) -> String {
    let mut out = String::new();
    for profile in &report.profiles {
        // Writing into a String cannot fail.
        let _ = write_profile(profile, with_rows, &mut out);
    }
    let _ = write_model(report, &mut out);
    out
}

fn write_profile(profile: &ProfileResult, with_rows: bool, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\n{}", title(profile))?;
    if with_rows {
        writeln!(out, "{}", header())?;
        for point in &profile.points {
            writeln!(out, "{}", row(point))?;
        }
    }
    writeln!(out, "  clients that fill it (Little's law: what node and disk can do x the latency of one client)")?;
    for row in &profile.saturation {
        let measured = if row.is_reached { row.measured.to_string() } else { format!("over {}", row.measured) };
        writeln!(
            out,
            "    {:<13} {:>6.0} for {:.0} tps; measured {measured} for {:.0} tps",
            row.level, row.littles_law, row.capacity_tps, row.tps_max
        )?;
    }
    writeln!(out, "  a failover loses of what was acknowledged")?;
    for loss in &profile.losses {
        let lost = match (&loss.at_most, loss.level.is_remote()) {
            (Some(lag), _) => {
                format!("up to {}, {} (measured lag)", millis(lag.seconds_max * 1e3), bytes(lag.bytes_max as f64))
            }
            (None, true) => "nothing".to_owned(),
            (None, false) => "not measured".to_owned(),
        };
        writeln!(out, "    {:<13} {lost}", loss.level)?;
    }
    writeln!(out, "  which level for which data")?;
    for line in &profile.rule {
        writeln!(out, "    {line}")?;
    }
    Ok(())
}

fn write_model(report: &Report, out: &mut String) -> std::fmt::Result {
    if report.model.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nthe model: one client's stages with another round trip; error = predicted over measured")?;
    writeln!(
        out,
        "{:<10} {:>9} {:<13} {:>10} {:>10} {:>12}   {:<10} error of p50, p99, tps",
        "distance", "RTT", "level", "p50", "p99", "tps", "from"
    )?;
    for row in &report.model {
        let errors = row.error.as_ref().map_or("not measured".to_owned(), |error| {
            format!("{:+.0} %, {:+.0} %, {:+.0} %", error.p50 * 100.0, error.p99 * 100.0, error.tps * 100.0)
        });
        let tps = format!("{:.0} @{}", row.tps, row.clients);
        writeln!(
            out,
            "{:<10} {:>9} {:<13} {:>10} {:>10} {tps:>12}   {:<10} {errors}",
            row.profile,
            millis(row.rtt_ms),
            row.level,
            millis(row.p50_ms),
            millis(row.p99_ms),
            row.from
        )?;
    }
    Ok(())
}

/// One client's median and many clients' throughput, by level and distance.
pub fn brief(report: &Report) -> String {
    let mut out = format!("{:<13}", "level");
    let clients: Vec<usize> = report.profiles.first().map_or(Vec::new(), |profile| {
        let mut clients: Vec<usize> = profile.closed().map(|point| point.clients).collect();
        clients.sort_unstable();
        clients.dedup();
        clients
    });
    let (Some(fewest), Some(most)) = (clients.first(), clients.last()) else { return out };
    for profile in &report.profiles {
        let name = format!("{} ({})", profile.name, millis(profile.rtt.p50_us / 1e3));
        // Writing into a String cannot fail, here and below.
        let _ = write!(out, " | {name:<28}");
    }
    let _ = write!(out, "\n{:<13}", "");
    for _ in &report.profiles {
        let (alone, many) = (format!("p50, {fewest} client"), format!("tps, {most}"));
        let _ = write!(out, " | {alone:>14} {many:>13}");
    }
    let levels = report.profiles.first().map_or(Vec::new(), ProfileResult::levels);
    for level in levels {
        let _ = write!(out, "\n{level:<13}");
        for profile in &report.profiles {
            let alone = profile.point(level, *fewest).map(|point| millis(point.load.latency_ms.p50));
            let many = profile.point(level, *most).map(|point| format!("{:.0}", point.load.tps));
            let _ = write!(out, " | {:>14} {:>13}", or_dash(alone), or_dash(many));
        }
    }
    out
}
