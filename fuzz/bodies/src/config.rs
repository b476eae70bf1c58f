//! `walferry.toml`: text that is taken as a configuration holds what its bounds say, and is the same when it is written again.

use std::path::PathBuf;
use std::time::Duration;

use walferry_engine::limits::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, WRITE_DEPTH_MAX};
use walferry_node::config::{NodeConfig, Settings};

/// Any bytes.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let settings = match Settings::from_toml(text, "walferry.toml") {
        Ok(settings) => settings,
        Err(error) => {
            assert!(error.to_string().starts_with("walferry.toml"), "an error names the file: {error}");
            return;
        }
    };
    let again = settings.to_table();
    let read = Settings::from_toml(&again.to_string(), "again").expect("what was taken is taken again");
    assert_eq!(read.to_table(), again);
    let flags = Settings { data: Some(PathBuf::from("data")), ..Settings::default() };
    let Ok(config) = NodeConfig::new(flags, settings) else { return };
    assert!((SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&config.segment_bytes));
    assert!(config.write_depth.is_none_or(|depth| (1..=WRITE_DEPTH_MAX).contains(&depth)));
    assert!(config.clients_max >= 1 && !config.heartbeat_interval.is_zero());
    assert!(config.commit_timeout != Some(Duration::ZERO));
    assert!(config.entries.iter().all(|(key, _)| key != "password"), "CONFIG GET tells no password");
}
