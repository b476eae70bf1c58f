//! The simulator itself: a seed gives the same run twice, a few fresh ones hold, and a deliberate bug is found. CI and the nightly
//! run take many more seeds.

use std::process::{Command, Output};

fn sim(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sim")).args(arguments).output().expect("the binary starts")
}

fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}\n{err}")
}

#[test]
fn a_seed_gives_the_same_run_in_every_process() {
    let hash = || {
        let output = sim(&["--seed", "11"]);
        assert!(output.status.success(), "{}", text(&output));
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        out.split("hash ").nth(1).expect("a hash")[..16].to_owned()
    };
    assert_eq!(hash(), hash());
}

#[test]
fn seeds_hold_and_the_ones_that_found_something_do_so_now() {
    let known = concat!(env!("CARGO_MANIFEST_DIR"), "/seeds");
    for arguments in [["--seeds", "12"], ["--file", known]] {
        let output = sim(&arguments);
        assert!(output.status.success(), "{}", text(&output));
    }
}

#[test]
fn a_deliberate_bug_is_found_and_told_with_its_seed() {
    let output = sim(&["--mutant", "write-without-a-flush"]);
    assert!(output.status.success() && text(&output).contains("found by seed"), "{}", text(&output));
    let output = sim(&["--mutant", "no-such-bug"]);
    assert!(!output.status.success() && text(&output).contains("ack-before-flush"), "{}", text(&output));
}
