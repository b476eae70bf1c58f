//! The fsync probe on a real disk and on one without O_DIRECT.

mod common;

use std::time::Duration;

use walferry_engine::log::SyncMethod;
use walferry_engine::probe::{ProbeConfig, ProbeMethod, run};

#[test]
fn a_brief_probe_recommends_and_leaves_nothing_behind() {
    let dir = common::directory();
    let config = ProbeConfig { budget: Duration::from_millis(160), ..ProbeConfig::brief(false) };
    let report = run(dir.path(), &config).expect("a report");
    assert_eq!(report.rows.len(), 8);
    assert!(report.rows.iter().all(|row| row.writes > 0 && row.per_second > 0.0));
    let recommended = report.recommendation.expect("a recommendation");
    assert!(!recommended.buffered && config.depths.contains(&recommended.write_depth));
    let text = report.to_string();
    assert!(text.contains("recommended: sync_method = "), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("the directory").count(), 0);
}

#[test]
fn a_full_probe_covers_every_combination() {
    let dir = common::directory();
    let config = ProbeConfig { file_bytes: 4 << 20, ..ProbeConfig::full(Duration::from_millis(75)) };
    let report = run(dir.path(), &config).expect("a report");
    assert_eq!(report.rows.len(), 3 * 5 * 5);
}

#[test]
fn a_memory_filesystem_gets_the_buffered_recommendation() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: there is no /dev/shm to write to");
        return;
    };
    let config = ProbeConfig { budget: Duration::from_millis(30), ..ProbeConfig::full(Duration::ZERO) };
    let report = run(dir.path(), &config).expect("a report");
    let refused: Vec<_> = report.refused.iter().map(|(method, _)| *method).collect();
    assert_eq!(refused, [ProbeMethod::Dsync, ProbeMethod::Fdatasync]);
    let recommended = report.recommendation.expect("a recommendation");
    assert!(recommended.buffered && recommended.sync_method == SyncMethod::Fdatasync);
}
