//! What a panic does to the process, seen from another one: this test binary runs itself.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::mpsc;

use walferry_engine::panics;

const PART: &str = "WALFERRY_TEST_PANICS";

fn run(part: &str) -> Output {
    let itself = std::env::current_exe().expect("this binary");
    let arguments = ["--ignored", "--exact", "in_a_process_of_its_own", "--nocapture"];
    Command::new(itself).args(arguments).env(PART, part).env("RUST_BACKTRACE", "0").output().expect("it runs")
}

#[test]
#[ignore = "what the others run"]
fn in_a_process_of_its_own() {
    let Ok(part) = std::env::var(PART) else { return };
    panics::end_the_process(|| ());
    if part == "caught" {
        let looked = panics::caught(|| Vec::<u8>::new()[std::hint::black_box(3)]);
        assert!(looked.is_err_and(|text| text.contains("index is 3")));
        assert_eq!(panics::caught(|| 5), Ok(5));
    } else {
        // Another thread than the one that waits, which nobody joins.
        let (sender, gone) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            let _sender = sender;
            panic!("the thread is gone");
        });
        let _ = gone.recv();
    }
}

#[test]
fn a_panic_of_any_thread_ends_the_process_and_says_why() {
    let output = run("thread");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("the thread is gone"), "{output:?}");
}

#[test]
fn a_panic_that_is_a_finding_ends_nothing_and_says_nothing() {
    let output = run("caught");
    assert!(output.status.success(), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
}
