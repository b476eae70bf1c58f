//! `walferry init`: creates a data directory ahead of its node's first start, and prints what its disk can do.

use walferry_node::DaemonError;
use walferry_node::config::NodeConfig;
use walferry_node::data_dir;
use walferry_node::units::ByteSize;

use crate::failure::{Failure, say};

/// Runs `walferry init`.
pub fn run(config: &NodeConfig) -> Result<(), Failure> {
    let dir = config.data.display();
    if data_dir::load(config)?.is_some() {
        return Err(Failure::failed(format_args!("--data {dir}: is initialised already; `walferry start` uses it")));
    }
    let (meta, report) = data_dir::create(config)?;
    if let Some(line) = data_dir::close_to_others(&config.data).map_err(DaemonError::from)? {
        say(line)?;
    }
    if let Some(report) = report {
        say(format_args!("{report}\n"))?;
    }
    let (name, sync, depth) = (&meta.name, meta.sync_method, meta.write_depth);
    let segment = ByteSize(meta.segment_bytes);
    say(format_args!("{dir}: node {name}, sync_method = {sync}, write_depth = {depth}, segment_bytes = {segment}"))
}
