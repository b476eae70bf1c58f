//! Durations and sizes as the tables and the page show them.

/// Milliseconds with a fitting unit.
pub fn millis(ms: f64) -> String {
    match ms.abs() {
        ..1.0 => format!("{:.0} us", ms * 1e3),
        ..100.0 => format!("{ms:.2} ms"),
        ..10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1e3),
    }
}

/// Bytes with a fitting unit.
pub fn bytes(bytes: f64) -> String {
    match bytes {
        ..1024.0 => format!("{bytes:.0} B"),
        ..1_048_576.0 => format!("{:.0} KiB", bytes / 1024.0),
        _ => format!("{:.1} MiB", bytes / 1_048_576.0),
    }
}
