//! `walferry`: one binary for the node and for everything that an operator does with it.

use std::process::ExitCode;

fn main() -> ExitCode {
    walferry::main()
}
