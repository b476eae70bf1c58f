//! One log on one disk.
pub mod frame;
pub mod limits;
pub mod lsn;
