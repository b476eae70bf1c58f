//! What keeps the source tree readable: no large circles of imports, the terms of the field, and short test names. Reads the sources of
//! every crate; builds and starts nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Crates with modules of their own.
const CRATES: [&str; 12] = [
    "applier",
    "client",
    "cluster",
    "engine",
    "mounts",
    "node",
    "power",
    "shipper",
    "sim",
    "tls",
    "tools",
    "fuzz/bodies",
];

/// Files of one circle at most.
const CIRCLE_FILES_MAX: usize = 3;

/// Bytes of a test's name at most.
const TEST_NAME_BYTES_MAX: usize = 60;

/// Words that have a standard term instead: the word, that term, and files in which the word means something else.
const WORDS: &[(&str, &str, &[&str])] = &[
    ("canvass", "pre-vote", &[]),
    ("canvassing", "pre-vote", &[]),
    (
        "sealing",
        "fencing; frames are sealed",
        &["engine/", "perf/", "applier/", "shipper/", "ARCHITECTURE.md", "TESTING.md"],
    ),
    ("seat", "member agent, membership", &[]),
    ("seated", "joined", &[]),
    ("chair", "controller, leader", &[]),
    ("voice", "vote", &[]),
    ("vouch", "confirm leadership", &[]),
    ("vouches", "confirm leadership", &[]),
    ("farewell", "DisconnectReason, closing", &[]),
    ("lend", "send frames, frame server", &[]),
    ("lends", "send frames, frame server", &[]),
    ("lending", "frame server", &[]),
    ("lendings", "frame server", &[]),
    ("ledger", "flush accounting", &[]),
    ("base copy", "snapshot", &[]),
    ("base copies", "snapshots", &[]),
    ("base_copy", "snapshot", &[]),
    ("durable mark", "durable watermark", &[]),
    ("room", "free space, capacity", &[]),
    ("rooms", "components, modules", &[]),
    ("make_room", "reserve, evict", &[]),
    ("has_room", "has_capacity", &[]),
    ("trouble", "blocked_reason", &[]),
    ("troubles", "blocked_reason", &[]),
    ("standstill", "blocked_reason, no leader since", &[]),
    ("sign of life", "heartbeat", &[]),
    ("signs of life", "heartbeats", &[]),
    ("stranger", "unidentified peer", &[]),
    ("strangers", "unidentified peers", &[]),
    ("mute", "handshake timeout", &[]),
    ("settle", "commit, recover, acknowledge", &[]),
    ("settled", "committed, recovered, acknowledged", &[]),
    ("patiently", "retry_until", &[]),
    ("urge", "poke", &[]),
    ("chance", "random", &[]),
    ("follower", "replica", &[]),
    ("house", "components", &[]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// Every file below `dir` whose name ends with one of `ends`, without build results.
fn files(dir: &Path, ends: &[&str], found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.')
                && !["target", "results", "corpus", "artifacts", "walferry-demo"].contains(&name.as_str())
            {
                files(&path, ends, found);
            }
        } else if ends.iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).expect("below the workspace").display().to_string()
}

/// The source without comments, strings that span no lines, and the tests at its end.
fn code(text: &str) -> String {
    let text = text.find("#[cfg(test)]\nmod tests {").map_or(text, |at| &text[..at]);
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The paths that `use` declarations name, groups spelled out.
fn used(code: &str) -> Vec<Vec<String>> {
    fn spell(prefix: &[String], tree: &str, found: &mut Vec<Vec<String>>) {
        let (mut depth, mut part) = (0, String::new());
        let mut parts = Vec::new();
        for letter in tree.chars() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if letter == ',' && depth == 0 {
                parts.push(std::mem::take(&mut part));
            } else {
                part.push(letter);
            }
        }
        parts.push(part);
        for part in parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()) {
            let names = |path: &str| -> Vec<String> {
                path.split("::").map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
            };
            let mut path = prefix.to_vec();
            match part.find('{') {
                Some(open) => {
                    path.extend(names(&part[..open]));
                    spell(&path, &part[open + 1..part.rfind('}').expect("a closed group")], found);
                }
                None => {
                    path.extend(names(part.split(" as ").next().unwrap_or_default()));
                    found.push(path);
                }
            }
        }
    }
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("use ") {
        let begins = at == 0 || rest[..at].ends_with(['\n', ' ', ')']);
        let after = &rest[at + 4..];
        let Some(end) = after.find(';') else { break };
        if begins && !after[..end].contains(['=', '(', '"']) {
            spell(&[], &after[..end], &mut found);
        }
        rest = &rest[at + 4..];
    }
    // Paths in the code itself.
    for (at, _) in code.match_indices("crate::").filter(|(at, _)| !code[..*at].ends_with("use ")) {
        if code[..at].ends_with("in ") || code[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_')
        {
            continue;
        }
        let path: String =
            code[at..].chars().take_while(|letter| letter.is_alphanumeric() || matches!(letter, '_' | ':')).collect();
        found.push(path.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect());
    }
    found
}

/// For each module of a crate the modules that it imports from, by their paths.
fn imports(krate: &str) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let src = root().join(krate).join("src");
    let mut sources = Vec::new();
    files(&src, &[".rs"], &mut sources);
    let is_test = |path: &PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        name.ends_with("_tests.rs") || name.starts_with("test_") || ["tests.rs", "testing.rs"].contains(&name.as_str())
    };
    let module = |path: &Path| -> Vec<String> {
        let path = path.strip_prefix(&src).expect("a source").with_extension("");
        let mut names: Vec<String> = path.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        if matches!(names.last().map(String::as_str), Some("mod" | "lib" | "main")) {
            names.pop();
        }
        names
    };
    let modules: BTreeMap<Vec<String>, PathBuf> =
        sources.into_iter().filter(|path| !is_test(path)).map(|path| (module(&path), path)).collect();
    let mut graph = BTreeMap::new();
    for (module, path) in &modules {
        let code = code(&fs::read_to_string(path).expect("a source"));
        let mut targets = BTreeSet::new();
        for path in used(&code) {
            let absolute: Vec<String> = match path.first().map(String::as_str) {
                Some("crate") => path[1..].to_vec(),
                Some("self") => module.iter().chain(&path[1..]).cloned().collect(),
                Some("super") => {
                    let up = path.iter().take_while(|name| *name == "super").count();
                    let kept = module.len().saturating_sub(up);
                    module[..kept].iter().chain(&path[up..]).cloned().collect()
                }
                Some(first) if modules.contains_key(&[&module[..], &[first.to_owned()]].concat()) => {
                    module.iter().chain(&path).cloned().collect()
                }
                _ => continue,
            };
            // The longest prefix that is a module; the crate's root only re-exports.
            let target =
                (1..=absolute.len()).rev().map(|length| &absolute[..length]).find(|path| modules.contains_key(*path));
            if let Some(target) = target.filter(|target| *target != module) {
                targets.insert(target.to_vec());
            }
        }
        graph.insert(module.clone(), targets);
    }
    graph
}

/// Sets of modules of which each reaches each other.
fn circles(graph: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> Vec<BTreeSet<Vec<String>>> {
    let reach: BTreeMap<_, BTreeSet<Vec<String>>> = graph
        .keys()
        .map(|from| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
            while let Some(next) = open.pop() {
                open.extend(graph[next].iter().filter(|target| seen.insert((*target).clone())));
            }
            (from, seen)
        })
        .collect();
    let mut found: Vec<BTreeSet<Vec<String>>> = Vec::new();
    for from in graph.keys().filter(|from| reach[from].contains(*from)) {
        if found.iter().any(|circle| circle.contains(from)) {
            continue;
        }
        found.push(reach[from].iter().filter(|other| reach[other].contains(from)).cloned().collect());
    }
    found
}

#[test]
fn circles_of_imports_have_at_most_three_files() {
    let mut wrong = Vec::new();
    for krate in CRATES {
        for circle in circles(&imports(krate)) {
            if circle.len() > CIRCLE_FILES_MAX {
                let names: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
                wrong.push(format!("{krate}: {} files: {}", circle.len(), names.join(", ")));
            }
        }
    }
    assert!(wrong.is_empty(), "move what the files of a circle share into a file below them:\n{}", wrong.join("\n"));
}

#[test]
fn circles_of_a_small_graph_are_found() {
    let module = |name: &str| vec![name.to_owned()];
    let edges = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e")];
    let mut graph: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> =
        ["a", "b", "c", "d", "e"].iter().map(|name| (module(name), BTreeSet::new())).collect();
    for (from, to) in edges {
        graph.get_mut(&module(from)).expect("a module").insert(module(to));
    }
    assert_eq!(circles(&graph), [["a", "b", "c"].iter().map(|name| module(name)).collect::<BTreeSet<_>>()]);
    let paths = used("use crate::{a::B, c::{self, D}};\npub use super::e;\nlet x = crate::f::g();\n");
    let paths: Vec<String> = paths.iter().map(|path| path.join("::")).collect();
    assert_eq!(paths, ["crate::a::B", "crate::c::self", "crate::c::D", "super::e", "crate::f::g"]);
}

/// A name or a line in small words: `LinkHeartbeat::new` and `link_heartbeat` are `link heartbeat new` and `link heartbeat`.
fn words(line: &str) -> String {
    let mut text = String::new();
    let mut small = false;
    for letter in line.chars() {
        if letter.is_uppercase() && small {
            text.push(' ');
        }
        small = letter.is_lowercase();
        if letter.is_alphanumeric() { text.extend(letter.to_lowercase()) } else { text.push(' ') }
    }
    format!(" {} ", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[test]
fn words_with_a_standard_term_do_not_occur() {
    let mut sources = Vec::new();
    files(root(), &[".rs", ".md", ".toml", ".service", ".timer", ".conf", ".sh"], &mut sources);
    let mut wrong = Vec::new();
    for path in sources.iter().filter(|path| !path.ends_with("tools/tests/tree.rs")) {
        let name = shown(path);
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (number, line) in text.lines().enumerate() {
            let line_words = words(line);
            for (word, term, except) in WORDS {
                let is_here = line_words.contains(&words(word));
                if is_here && !except.iter().any(|place| name.starts_with(place)) {
                    wrong.push(format!("{name}:{}: {word:?}: say {term}: {}", number + 1, line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} places:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn words_of_names_and_prose_are_found() {
    assert_eq!(words("fn base_copy(MakeRoom, \"at once\")"), " fn base copy make room at once ");
    assert_eq!(words("HTTPServer x_y"), " httpserver x y ");
}

#[test]
fn test_names_are_short() {
    let mut sources = Vec::new();
    files(root(), &[".rs"], &mut sources);
    let (mut names, mut wrong) = (0, Vec::new());
    for path in &sources {
        let text = fs::read_to_string(path).expect("a source");
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            is_test |= line == "#[test]" || line.starts_with("#[tokio::test");
            let Some(rest) = line.strip_prefix("fn ").or(line.strip_prefix("async fn ")).filter(|_| is_test) else {
                continue;
            };
            is_test = false;
            names += 1;
            let name = rest.split('(').next().unwrap_or_default();
            if name.len() > TEST_NAME_BYTES_MAX {
                wrong.push(format!("{}: {name} ({} bytes)", shown(path), name.len()));
            }
        }
    }
    assert!(names > 500, "{names} tests were found");
    assert!(wrong.is_empty(), "a test is named subject_condition_result:\n{}", wrong.join("\n"));
}
