//! `walferry drill` against real clusters: what it promises has to hold again and again.

mod common;

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use common::{Node, directory};

/// Runs a drill that has to succeed; what it found.
fn drill(root: &Path, flags: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.arg("drill").arg("--dir").arg(root.join("drill")).arg("--json").args(flags);
    let output = command.output().expect("the binary starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{flags:?}: {err}\n{out}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{flags:?}: {error}: {out}"))
}

/// Every round of a drill keeps what was promised.
fn check(found: &Value, rounds: usize) {
    let all = found["rounds"].as_array().expect("rounds");
    assert_eq!(all.len(), rounds, "{found:#}");
    for round in all {
        for level in ["remote_flush", "remote_apply"] {
            assert!(round["lost"][level]["acknowledged"].as_u64() > Some(0), "nothing was written: {round:#}");
            assert_eq!(round["lost"][level]["lost"], 0, "{round:#}");
        }
        for level in ["local", "off"] {
            let loss = &round["lost"][level];
            assert!(loss["lost"].as_u64() <= loss["bound"].as_u64(), "more than the replicas lacked: {round:#}");
        }
        assert!(round["reads"].as_u64() > Some(0), "nothing was read: {round:#}");
        assert_eq!(round["reads_back"], 0, "{round:#}");
        assert_eq!(round["stream_ids_out_of_order"], 0, "{round:#}");
    }
}

#[test]
fn five_kills_lose_nothing_that_was_confirmed() {
    let root = directory();
    let found = drill(root.path(), &["--faults", "kill", "--rounds", "5", "--rate", "100"]);
    check(&found, 5);
    for round in found["rounds"].as_array().expect("rounds") {
        assert_ne!(round["leader"], round["new_leader"], "the killed one cannot lead on: {round:#}");
        assert!(round["logs_same_to"].as_str().is_some_and(|lsn| lsn != "0/0"), "{round:#}");
        assert!(round["detection_ms"].as_f64() > Some(0.0), "{round:#}");
    }
}

#[test]
fn running_cluster_is_drilled_by_configured_commands() {
    let root = directory();
    let process = std::process::id();
    let host = |index: usize| format!("127.{}.{}.{}", 1 + process % 250, process / 250 % 250, 201 + index);
    let names = ["a", "b", "c"];
    let peers: Vec<String> = (0..3).map(|index| format!("{}={}:7401", names[index], host(index))).collect();
    let hosts: Vec<String> = (0..3).map(|index| format!("{}={}:7400", names[index], host(index))).collect();
    let members = peers.join(",");
    let nodes: Vec<Node> = (0..3)
        .map(|index| {
            let (listen, peer) = (format!("{}:7400", host(index)), format!("{}:7401", host(index)));
            let flags = ["--members", &members, "--listen", &listen, "--peer-listen", &peer];
            Node::start(root.path(), names[index], &flags)
        })
        .collect();
    for (name, node) in names.iter().zip(&nodes) {
        std::fs::write(root.path().join(format!("{name}.pid")), node.pid().to_string()).expect("a pid file");
    }
    let signal = |what: &str| format!("kill -{what} $(cat {}/{{name}}.pid)", root.path().display());
    let (stop, go_on, hosts) = (signal("STOP"), signal("CONT"), hosts.join(","));
    let flags = ["--hosts", &hosts, "--faults", "switchover,stop", "--on-fault", &stop, "--on-heal", &go_on];
    let found = drill(root.path(), &flags);
    check(&found, 2);
    for round in found["rounds"].as_array().expect("rounds") {
        assert_ne!(round["leader"], round["new_leader"], "{round:#}");
        assert!(round["logs_same_to"].is_null(), "nobody can read the logs of other hosts: {round:#}");
    }
}

#[test]
fn what_cannot_be_drilled_is_said() {
    let root = directory();
    let refused = |flags: &[&str], code: i32, text: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        let output = command.arg("drill").arg("--dir").arg(root.path().join("drill")).args(flags).output();
        let output = output.expect("the binary starts");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {said}");
        assert!(said.contains(text), "{flags:?}: {said}");
    };
    refused(&["--faults", "klll"], 2, "there are kill, stop");
    refused(&["--nodes", "2"], 2, "--nodes: 3 to 5");
    refused(&["--faults", "random,kill"], 2, "random stands alone");
    refused(&["--hosts", "a=127.0.0.1:1"], 2, "name every member");
    refused(&["--hosts", "127.0.0.1:1"], 2, "NAME=HOST:PORT");
    refused(&["--on-fault", "true"], 2, "--hosts");
    let hosts = ["--hosts", "a=127.0.0.1:1,b=127.0.0.1:2,c=127.0.0.1:3", "--faults", "kill"];
    refused(&hosts, 1, "it needs --on-fault and --on-heal");
}

/// Every fault that the system allows, twice, then any of them in any order.
#[test]
#[ignore = "takes eight minutes, and root for most faults: cargo test -p walferry --test drill -- --ignored"]
fn every_fault_and_any_sequence_of_them_is_survived() {
    let root = directory();
    let found = drill(root.path(), &["--rounds", "2"]);
    check(&found, found["rounds"].as_array().map_or(0, Vec::len));
    let found = drill(root.path(), &["--faults", "random", "--rounds", "30"]);
    assert_eq!(found["rounds"].as_array().map_or(0, Vec::len), 30);
    for level in ["remote_flush", "remote_apply"] {
        assert_eq!(found["total"][level]["lost"], 0, "{found:#}");
    }
}
