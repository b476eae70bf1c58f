//! What walferry is made of: licences, sources and banned crates, by the rules of `deny.toml`. `cargo deny` checks the same and the
//! advisories, where it is installed; this needs neither it nor a network.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The rules of `deny.toml` that are checked here.
struct Rules {
    licences: BTreeSet<String>,
    registries: BTreeSet<String>,
    banned: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

impl Rules {
    fn read() -> Rules {
        let text = std::fs::read_to_string(root().join("deny.toml")).expect("the rules");
        let rules: toml::Table = text.parse().expect("TOML");
        let texts = |section: &str, key: &str| -> BTreeSet<String> {
            let values = rules[section][key].as_array().expect("an array");
            let text = |value: &toml::Value| value.get("crate").unwrap_or(value).as_str().expect("text").to_owned();
            values.iter().map(text).collect()
        };
        Rules {
            licences: texts("licenses", "allow"),
            registries: texts("sources", "allow-registry"),
            banned: texts("bans", "deny"),
        }
    }

    /// What is wrong with a package of `cargo metadata`; nothing is wrong with those of the workspace.
    fn complaints(&self, package: &Value) -> Vec<String> {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let Some(source) = package["source"].as_str() else { return Vec::new() };
        let mut complaints = Vec::new();
        let mut complain = |text: String| complaints.push(text);
        let (name, version, licence) = (text("name"), text("version"), text("license"));
        if !source.strip_prefix("registry+").is_some_and(|registry| self.registries.contains(registry)) {
            complain(format!("{name} {version} comes from {source}"));
        }
        if !is_allowed(licence, &self.licences) {
            complain(format!("{name} {version} is under {licence:?}"));
        }
        if self.banned.contains(name) {
            complain(format!("{name} {version} is banned"));
        }
        complaints
    }
}

/// Whether an SPDX expression can be met with these licences; `/` is an older way to write OR.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ").replace(" WITH ", "+WITH+");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = either(&words, &mut at, allowed);
    met && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(words, at, allowed);
    }
    met
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let word = words.get(*at).copied();
    *at += 1;
    match word {
        Some("(") => {
            let met = either(words, at, allowed);
            *at += 1;
            met && words.get(*at - 1) == Some(&")")
        }
        Some(licence) => allowed.contains(&licence.replace("+WITH+", " WITH ")),
        None => false,
    }
}

#[test]
fn dependencies_keep_to_the_rules_of_deny_toml() {
    let arguments = ["metadata", "--format-version", "1", "--locked", "--offline", "--all-features"];
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(cargo)
        .args(arguments)
        .args(["--filter-platform", &target])
        .current_dir(root())
        .output()
        .expect("cargo runs, as it runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    // Those that are built for this target, of all that the lock file names.
    let nodes = metadata["resolve"]["nodes"].as_array().expect("an array");
    let used: BTreeSet<&str> = nodes.iter().filter_map(|node| node["id"].as_str()).collect();
    let packages = metadata["packages"].as_array().expect("an array");
    let packages: Vec<&Value> =
        packages.iter().filter(|package| package["id"].as_str().is_some_and(|id| used.contains(id))).collect();
    assert!(packages.len() > 100, "{} packages", packages.len());
    let rules = Rules::read();
    let complaints: Vec<String> = packages.iter().flat_map(|package| rules.complaints(package)).collect();
    assert_eq!(complaints, Vec::<String>::new());
}

#[test]
fn package_against_the_rules_is_named() {
    let rules = Rules::read();
    let crates_io = format!("registry+{}", rules.registries.first().expect("one"));
    let complaints = |name: &str, licence: &str, source: &str| {
        rules.complaints(&serde_json::json!({ "name": name, "version": "1.0.0", "license": licence, "source": source }))
    };
    assert_eq!(complaints("fine", "MIT OR GPL-3.0-only", &crates_io), Vec::<String>::new());
    assert_eq!(
        complaints("viral", "MIT AND GPL-3.0-only", &crates_io),
        ["viral 1.0.0 is under \"MIT AND GPL-3.0-only\""]
    );
    assert_eq!(complaints("none", "", &crates_io).len(), 1, "no licence is none that is allowed");
    assert_eq!(complaints("openssl-sys", "MIT", &crates_io), ["openssl-sys 1.0.0 is banned"]);
    let branch = "git+https://example.org/fork?branch=main#0123";
    assert_eq!(complaints("fork", "MIT", branch), [format!("fork 1.0.0 comes from {branch}")]);
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
    for expression in [
        "MIT",
        "GPL-2.0/MIT",
        "GPL-2.0 OR MIT",
        "(GPL-2.0 OR MIT) AND ISC",
        "GPL-2.0 AND LGPL-3.0 OR MIT",
        "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
    ] {
        assert!(is_allowed(expression, &allowed), "{expression}");
    }
    for expression in
        ["", "GPL-2.0", "MIT AND GPL-2.0", "(MIT OR ISC) AND GPL-2.0", "Apache-2.0", "(MIT", "MIT ISC", "MIT)"]
    {
        assert!(!is_allowed(expression, &allowed), "{expression}");
    }
}
