//! Every case of the rules for reads.

use super::*;

fn history(entries: &[(u64, u64)]) -> EpochHistory {
    let entries: Vec<_> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect();
    EpochHistory::from_entries(&entries).expect("ascending")
}

fn position(epoch: u64, lsn: u64) -> Position {
    Position { epoch: Epoch(epoch), lsn: Lsn(lsn) }
}

#[test]
fn tokens_round_trip_and_hold_cookie_octets_only() {
    let token = Token::new(0x9f31_c2aa_0000_0000_0000_0000_0000_0001, position(3, 0x16_B374_D848));
    assert_eq!(token.to_string(), "w1.9f31c2aa.3.16/B374D848");
    assert_eq!(token.to_string().parse(), Ok(token));
    let empty = Token::new(7 << 96, Position::default());
    assert_eq!(empty.to_string(), "w1.00000007.0.0/0");
    assert_eq!(empty.to_string().parse(), Ok(empty));
    // RFC 6265: no control characters, space, quote, comma, semicolon or backslash.
    assert!(token.to_string().bytes().all(|octet| octet.is_ascii_graphic() && !b"\",;\\".contains(&octet)));
}

#[test]
fn what_is_no_token_is_refused() {
    for wrong in [
        "",
        "w1",
        "w1.9f31c2aa.3",
        "w2.9f31c2aa.3.0/1000",
        "w1.9f31c2a.3.0/1000",
        "w1.9f31c2aa0.3.0/1000",
        "w1.9f31c2ag.3.0/1000",
        "w1.+f31c2aa.3.0/1000",
        "w1.9f31c2aa.+3.0/1000",
        "w1.9f31c2aa..0/1000",
        "w1.9f31c2aa.99999999999999999999.0/1000",
        "w1.9f31c2aa.3.1000",
        "w1.9f31c2aa.3.0/1000.",
        "w1.9f31c2aa.3.0/1000 ",
        "w1.9f31c2aa.0.0/1000",
        "w1.9f31c2aa.3.0/0",
    ] {
        assert_eq!(wrong.parse::<Token>(), Err(TokenSyntax), "{wrong:?}");
    }
}

#[test]
fn what_became_of_a_position() {
    let log = history(&[(2, 100), (3, 200), (5, 200), (6, 300)]);
    let lost = |to, start| Fate::Lost { to: Epoch(to), start: Lsn(start) };
    for ((epoch, lsn), expected) in [
        ((0, 0), Fate::Kept),
        // The newest epoch: it is there, or will come.
        ((6, 301), Fate::Kept),
        ((6, 9999), Fate::Kept),
        // Older ones up to where they ended.
        ((2, 200), Fate::Kept),
        ((2, 201), lost(3, 200)),
        ((5, 300), Fate::Kept),
        ((5, 301), lost(6, 300)),
        // An epoch without a frame in this log.
        ((3, 201), lost(5, 200)),
        // An epoch that this log never had: a leadership of which nothing was left.
        ((4, 150), lost(5, 200)),
        // Before all that is remembered.
        ((1, 100), Fate::Kept),
        ((1, 101), lost(2, 100)),
        // A leadership that has not been heard of here.
        ((7, 50), Fate::Unknown),
        // Another leader's epoch with the number of one of ours.
        ((5 | 1 << 32, 300), lost(5, 200)),
        ((6 | 1 << 32, 301), lost(6, 300)),
        ((7, 400), Fate::Unknown),
    ] {
        assert_eq!(fate(position(epoch, lsn), &log), expected, "{lsn} in epoch {epoch}");
    }
    assert_eq!(fate(position(1, 50), &EpochHistory::default()), Fate::Unknown, "a node that never met a leader");
    assert_eq!(fate(Position::default(), &EpochHistory::default()), Fate::Kept);
}

#[test]
fn every_guarantee_against_every_state() {
    let log = history(&[(1, 0), (2, 100)]);
    let ms = Duration::from_millis;
    let refused = || Strong::Refused("MOVED 0 b:1".to_owned());
    let floors = [
        ("none", (0, 0)),
        ("reached", (2, 150)),
        ("pending", (2, 180)),
        ("ahead", (2, 500)),
        ("newer", (3, 150)),
        ("lost", (1, 120)),
    ];
    let modes = [Mode::Any, Mode::AtMost(ms(500)), Mode::Committed, Mode::Strong];
    let states = [
        ("fresh leader", Some(ms(0)), Strong::Held),
        ("replaying leader", None, Strong::Replaying),
        ("leader without a lease", None, refused()),
        ("fresh replica", Some(ms(500)), refused()),
        ("stale replica", Some(ms(501)), refused()),
    ];
    let mut cases = 0;
    for (floor_name, (epoch, lsn)) in floors {
        for mode in modes {
            for (state, staleness, strong) in &states {
                let strong = strong.clone();
                let facts =
                    Facts { history: &log, applied: Lsn(150), readable: Lsn(180), staleness: *staleness, strong };
                let verdict = judge(&Guarantee { floor: position(epoch, lsn), mode }, &facts);
                let is_behind = matches!(floor_name, "ahead" | "newer");
                let fresh = staleness.is_some_and(|age| age <= ms(500));
                let expected = match mode {
                    _ if floor_name == "lost" => "refuse LOST",
                    Mode::Strong if matches!(facts.strong, Strong::Refused(_)) => "refuse MOVED",
                    _ if is_behind => "wait Floor",
                    Mode::Strong if *state == "replaying leader" => "wait Replay",
                    Mode::AtMost(_) if !fresh => "wait Fresh",
                    _ => "ready",
                };
                let told = match &verdict {
                    Verdict::Ready => "ready".to_owned(),
                    Verdict::Wait(missing) => format!("wait {missing:?}"),
                    Verdict::Refuse(text) => format!("refuse {}", text.split(' ').next().expect("a code")),
                };
                assert_eq!(told, expected, "floor {floor_name}, {mode}, {state}");
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 6 * 4 * 5);
}

#[test]
fn errors_name_what_is_here_and_what_was_asked_for() {
    let log = history(&[(1, 0), (4, 0x1000)]);
    let facts = |staleness| Facts {
        history: &log,
        applied: Lsn(0x1234),
        readable: Lsn(0x1234),
        staleness,
        strong: Strong::Replaying,
    };
    let asks = |floor, mode| Guarantee { floor, mode };
    let at_most = Mode::AtMost(Duration::from_millis(500));
    let told = |missing, guarantee, staleness| waited(missing, &guarantee, &facts(staleness));
    assert_eq!(
        told(Missing::Floor, asks(position(4, 0x5678), Mode::Any), None),
        "BEHIND this node has applied 0/1234, the session has seen 0/5678; wait longer (READ TIMEOUT) or ask another node"
    );
    assert!(
        told(Missing::Floor, asks(position(6, 0x5678), Mode::Any), None)
            .contains("has seen 0/5678 in epoch 6, this node knows epoch 4;")
    );
    assert_eq!(
        told(Missing::Fresh, asks(Position::default(), at_most), Some(Duration::from_millis(1234))),
        "STALE this node's state may be 1234 ms old, at most 500 ms were asked for; it has applied 0/1234"
    );
    assert!(told(Missing::Fresh, asks(Position::default(), at_most), None).starts_with("STALE this node cannot say"));
    assert!(told(Missing::Replay, asks(Position::default(), Mode::Strong), None).starts_with("BEHIND "));
    assert_eq!(
        lost(position(1, 0x1001), &log).expect("it was lost"),
        "LOST what this session has seen up to 0/1001 in epoch 1 was lost in the failover to epoch 4, which began at 0/1000; \
         SESSION RESET goes on from there"
    );
    assert_eq!(lost(position(1, 0x1000), &log), None);
}
