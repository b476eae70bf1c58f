//! One log on one disk.
pub mod frame;
pub mod limits;
pub mod lsn;
pub mod buffer;
pub mod commit;
pub mod lock;
pub mod prepare;
pub mod ring;
pub mod waker;
