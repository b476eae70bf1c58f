//! What all parts of a run share: the size of segments, and a broken property.

/// Small segments, so that a run recycles many.
pub const SEGMENT_BYTES: u64 = 128 << 10;

/// A broken property.
#[derive(Debug)]
pub struct Broken(pub String);

/// One seed of so many is also about latency.
pub const LATENCY_SEEDS: u64 = 32;
