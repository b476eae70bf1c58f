//! Tests of the configuration: where values come from, what wrong ones say.

use super::*;

fn flags(line: &str) -> Settings {
    #[derive(clap::Parser)]
    struct Only {
        #[command(flatten)]
        settings: Settings,
    }
    let words = std::iter::once("start").chain(line.split_whitespace());
    <Only as clap::Parser>::try_parse_from(words).unwrap().settings
}

fn file(text: &str) -> Result<Settings, ConfigError> {
    Settings::from_toml(text, "walferry.toml")
}

fn node(line: &str, text: &str) -> Result<NodeConfig, ConfigError> {
    NodeConfig::new(flags(line), file(text)?)
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let text =
        "data = \"/var/lib/a\"\nname = \"a\"\nclients_max = 5\nsegment_bytes = \"128MiB\"\npeer_timeout = \"9s\"";
    let config = node("--name b --clients-max 7", text).unwrap();
    assert_eq!((config.name.as_str(), config.clients_max), ("b", 7));
    assert_eq!(config.segment_bytes, 128 << 20);
    assert_eq!(config.peer_timeout, Duration::from_secs(9));
    assert_eq!(config.heartbeat_interval, Duration::from_millis(100), "the default");
    assert_eq!(config.data, PathBuf::from("/var/lib/a"));
    assert_eq!((config.write_depth, config.sync_method, config.commit_timeout), (None, None, None));
}

#[test]
fn a_member_listens_where_the_others_look_for_it() {
    let members = "members = \"a=10.0.0.1:7401,b=10.0.0.2:7401\"";
    let listen = |line: &str| node(line, members).unwrap().peer_listen.to_string();
    assert_eq!(listen("--data d --name b"), "10.0.0.2:7401");
    assert_eq!(listen("--data d --name b --peer-listen 0.0.0.0:7401"), "0.0.0.0:7401");
}

#[test]
fn every_key_is_a_flag_and_every_flag_a_key() {
    let keys = Settings::keys();
    assert!(keys.len() >= 25, "{keys:?}");
    let all = Settings::defaults().or(Settings {
        data: Some("/d".into()),
        follow: Some("h:1".parse().unwrap()),
        members: Some("a=h:1,b=h:3".parse().unwrap()),
        metrics_listen: Some("h:2".parse().unwrap()),
        password: Some("p".to_owned()),
        users_file: Some("/u".into()),
        ready_file: Some("/r".into()),
        tls_listen: Some("h:4".parse().unwrap()),
        tls_cert: Some("/c".into()),
        tls_key: Some("/k".into()),
        tls_ca: Some("/a".into()),
        peer_tls_ca: Some("/p".into()),
        peer_secret: Some("/s".into()),
        repair_from: Some("h:5".parse().unwrap()),
        write_depth: Some(4),
        sync_method: Some("dsync".parse().unwrap()),
        ..Settings::default()
    });
    let table = all.to_table();
    for key in &keys {
        assert!(table.contains_key(key), "{key} is a flag and no key of the file");
    }
    assert_eq!(table.len(), keys.len());
    let text = toml::to_string(&table).unwrap();
    let again = file(&text).unwrap();
    assert_eq!(again.to_table(), table, "what `config show` prints can be read again");
}

#[test]
fn an_unknown_key_is_an_error_with_a_suggestion() {
    let says = |text: &str| file(text).unwrap_err().to_string();
    let error = says("name = \"a\"\n\nsegment_size = 5\n");
    assert_eq!(error, "walferry.toml, line 3: unknown key `segment_size`; did you mean `segment_bytes`?");
    assert!(says("peer-timeout = \"5s\"").contains("did you mean `peer_timeout`?"));
    assert!(says("[log]\nlevel = 1").contains("unknown key `log`"));
    let error = says("zzz = 1");
    assert!(error.contains("line 1") && error.contains("`walferry config show` lists every key"), "{error}");
}

#[test]
fn a_wrong_value_names_key_and_form() {
    for (text, says) in [
        ("segment_bytes = \"64MB\"", "such as 64MiB"),
        ("peer_timeout = 5", "a time in quotes with its unit"),
        ("peer_timeout = \"5 parsecs\"", "such as 100us or 5s"),
        ("commit_level = \"durable\"", "is not a commit level"),
        ("sync = \"ANY x (a)\"", "sync"),
        ("members = \"a\"", "is not NAME=PEER_HOST:PORT"),
        ("members = \"a=h:1,a=h:2\"", "named twice"),
        ("members = \"a=h:1,b=h:1\"", "two members have the peer address"),
        ("redirect = \"ask\"", "`moved`, `readonly`"),
        ("listen = \"6400\"", "is not HOST:PORT"),
        ("sync_method = \"fsync\"", "expected dsync or fdatasync"),
        ("on_sync_loss = \"panic\"", "degrade:LEVEL"),
        ("clients_max = -1", "clients_max"),
        ("name = ", "line 1"),
    ] {
        let error = file(text).unwrap_err().to_string();
        assert!(error.starts_with("walferry.toml: ") && error.contains(says), "{text}: {error}");
    }
}

#[test]
fn values_out_of_bounds_say_what_would_do() {
    let long = format!("--data d --name {}", "a".repeat(64));
    for (line, says) in [
        ("--name a", "data is not set: give --data"),
        ("--data d --name A", "expected 1 to 63 of a-z"),
        (long.as_str(), "expected 1 to 63"),
        ("--data d --segment-bytes 8MiB", "segment_bytes = 8MiB: choose a whole number of MiB from 16MiB to 1GiB"),
        ("--data d --segment-bytes 16777217", "a whole number of MiB"),
        ("--data d --write-depth 0", "write_depth = 0: choose 1 to 32"),
        ("--data d --log-buffer-bytes 1MiB", "at least 64MiB"),
        ("--data d --heartbeat-interval 4s", "two heartbeats must fit into peer_timeout = 5s"),
        ("--data d --heartbeat-interval 0", "two heartbeats"),
        ("--data d --name d --members a=h:1,b=h:2", "it does not name this node, d"),
        ("--data d --name a --members a=h:1 --follow h:2", "give --members or --follow"),
        (
            "--data d --name a --members a=h:1 --election-timeout 200ms",
            "3 heartbeats must fit into election_timeout = 200ms",
        ),
        ("--data d --name a --members a=h:1 --election-timeout 10ms", "at least 80ms"),
        ("--data d --clients-max 0", "choose 1 or more"),
        ("--data d --on-sync-loss degrade:remote_write", "`local` or `off` only"),
    ] {
        let error = node(line, "").unwrap_err().to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[test]
fn values_take_their_types() {
    let line = "--data d --commit-level ON --commit-delay 100us --commit-timeout 2s --buffered --sync-method dsync \
                --on-sync-loss degrade:local --follow [::1]:6401 --listen 127.0.0.1:0";
    let config = node(line, "sync = \"ANY 1 (b, c)\"").unwrap();
    assert_eq!(config.commit_level, CommitLevel::RemoteFlush);
    assert_eq!(config.commit_delay, Duration::from_micros(100));
    assert_eq!(config.commit_timeout, Some(Duration::from_secs(2)));
    assert!(config.buffered);
    assert_eq!(config.sync_method, Some(SyncMethod::Dsync));
    assert_eq!(config.on_sync_loss, OnSyncLoss::Degrade(CommitLevel::Local));
    assert_eq!(config.sync.unwrap().to_string(), "ANY 1 (b, c)");
    assert_eq!(node("--data d", "").unwrap().sync, None, "another than one that says nobody");
    assert_eq!(node("--data d", "sync = ''").unwrap().sync, Some(SyncPolicy::None));
    assert_eq!(config.follow.unwrap().to_string(), "[::1]:6401");
    assert_eq!(config.listen.resolve().unwrap().port(), 0);
    assert!(!node("--data d --buffered=false", "buffered = true").unwrap().buffered);
}

#[test]
fn show_tells_each_value_and_its_source() {
    let text = file("name = \"a\"\npassword = \"s3cret\"\n").unwrap();
    let shown = show(&flags("--clients-max 7"), &text, Some(Path::new("a.toml")));
    let line = |key: &str| shown.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    assert!(line("name =").ends_with("# a.toml"), "{shown}");
    assert!(line("clients_max = 7").ends_with("# flag"));
    assert!(line("segment_bytes = \"64MiB\"").ends_with("# default"));
    assert!(line("# follow").contains("not set"));
    assert!(!shown.contains("s3cret"), "a password is never shown");
    let again = file(&shown).unwrap();
    assert_eq!(again.clients_max, Some(7), "what is shown can be read as a file");
}

#[test]
fn a_missing_file_is_named() {
    let error = Settings::from_file(Path::new("/nonexistent/walferry.toml")).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/walferry.toml") && error.contains("No such file"), "{error}");
}
