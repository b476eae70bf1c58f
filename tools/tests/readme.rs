//! The commands in README.md, pasted block by block into one shell, in a network namespace of their own: README names fixed ports.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

mod common;
use common::directory;

/// The blocks that a reader pastes: those of ```sh.
fn blocks(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block: Option<String> = None;
    for line in text.lines() {
        match &mut block {
            None if line == "```sh" => block = Some(String::new()),
            None => {}
            Some(commands) if line == "```" => {
                found.push(std::mem::take(commands));
                block = None;
            }
            Some(commands) => {
                commands.push_str(line);
                commands.push('\n');
            }
        }
    }
    found
}

/// Pastes `block` into a shell in `dir`; a line that fails ends it, and its nodes end with it.
fn paste(block: &str, dir: &Path) -> Output {
    let binary = Path::new(env!("CARGO_BIN_EXE_walferry")).parent().expect("a directory");
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("unshare")
        .args(["--net", "bash"])
        .current_dir(dir)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a shell");
    let begin = "ip link set lo up\nset -e\ntrap 'kill $(jobs -p) && wait' EXIT\n";
    let mut input = shell.stdin.take().expect("piped");
    input.write_all(begin.as_bytes()).and_then(|()| input.write_all(block.as_bytes())).expect("a shell that reads");
    drop(input);
    shell.wait_with_output().expect("it ends")
}

fn can_run() -> bool {
    let tried = |program: &str, args: &[&str]| {
        Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !tried("unshare", &["--net", "true"]) {
        eprintln!("skipped: a network namespace needs root");
        return false;
    }
    if !tried("redis-cli", &["--version"]) || !tried("ip", &["-V"]) {
        eprintln!("skipped: redis-cli or ip is not installed");
        return false;
    }
    true
}

#[test]
fn blocks_of_the_readme_work_when_pasted() {
    if !can_run() {
        return;
    }
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("README.md");
    let text = fs::read_to_string(&readme).expect("a README");
    let blocks = blocks(&text);
    assert_eq!(blocks.len(), 2, "a block of sh for the first write and one for a cluster");
    let said: Vec<String> = blocks
        .iter()
        .map(|block| {
            let dir = directory();
            let output = paste(block, dir.path());
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}\n{block}\n{said}\n{errors}", output.status);
            said
        })
        .collect();
    // What README says that the first block shows.
    let refusal =
        text.lines().flat_map(|line| line.split('`')).find(|quoted| quoted.starts_with("READONLY ")).expect("quoted");
    for shown in ["hello\n", refusal, "a at 127.0.0.1:6400"] {
        assert!(said[0].contains(shown), "{shown:?} is missing:\n{}", said[0]);
    }
    assert!(said[1].contains("policy") && said[1].contains("leader"), "{}", said[1]);
}
