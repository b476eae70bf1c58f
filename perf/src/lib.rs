//! Benchmarks of walferry; see `benches/` and `compare`.
