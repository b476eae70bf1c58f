//! Whether a leader streams to a replica that says hello, and from where. Core: compares what both say of themselves;
//! called by the shipper, which looks into the log for the rest.

use walferry_cluster::member::{ClusterId, MemberName};
use walferry_cluster::message::{Fetch, Hello, PROTOCOL_VERSION, Refuse, RefuseCode};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;

/// What a leader compares with a hello.
#[derive(Clone, Copy, Debug)]
pub struct Leader<'a> {
    /// Its cluster.
    pub cluster_id: ClusterId,
    /// Its name.
    pub name: &'a MemberName,
    /// Its segment size.
    pub segment_bytes: u64,
    /// Its epochs.
    pub history: &'a EpochHistory,
    /// The oldest byte that it can still give.
    pub log_start: Lsn,
    /// The end of its sealed frames.
    pub sealed: Lsn,
}

fn refuse<T>(code: RefuseCode, text: String) -> Result<T, Refuse> {
    Err(Refuse { code, text })
}

/// Whether a replica that asks for a snapshot is one of ours.
pub fn judge_fetch(fetch: &Fetch, leader: &Leader<'_>) -> Result<(), Refuse> {
    let (name, flushed) = (fetch.name.clone(), Lsn::ZERO);
    // As a replica that has nothing: where it is does not matter.
    let hello = Hello {
        protocol: fetch.protocol,
        cluster_id: fetch.cluster_id,
        name,
        client_address: String::new(),
        flushed,
        segment_bytes: fetch.segment_bytes,
        crc: 0,
        member: MemberId(0),
        gives_up: Epoch(0),
        history: Vec::new(),
    };
    judge(&hello, &Leader { log_start: Lsn::ZERO, ..*leader }).map(|_| ())
}

/// Where the stream to the replica starts: the end of what both logs have in common.
pub fn judge(hello: &Hello, leader: &Leader<'_>) -> Result<Lsn, Refuse> {
    let name = &hello.name;
    if hello.protocol != PROTOCOL_VERSION {
        let text = format!("the leader speaks protocol {PROTOCOL_VERSION}, the replica {}", hello.protocol);
        return refuse(RefuseCode::Protocol, text);
    }
    if let Some(id) = hello.cluster_id.filter(|id| *id != leader.cluster_id) {
        let text = format!(
            "{name} belongs to cluster {id}, the leader to cluster {}: start {name} with an empty data directory to follow this one",
            leader.cluster_id
        );
        return refuse(RefuseCode::ClusterId, text);
    }
    if name == leader.name {
        return refuse(RefuseCode::Protest, format!("the leader itself has the name {name}"));
    }
    if hello.segment_bytes != leader.segment_bytes {
        let (theirs, ours) = (hello.segment_bytes, leader.segment_bytes);
        let text = format!(
            "{name} has segments of {theirs} bytes, the leader of {ours}: they must be the same, and a data directory keeps the size that \
             it was made with. Start {name} with an empty data directory and --segment-bytes {ours}"
        );
        return refuse(RefuseCode::SegmentBytes, text);
    }
    let Some(theirs) = EpochHistory::from_entries(&hello.history) else {
        return refuse(RefuseCode::Protest, format!("{name} has an impossible epoch history"));
    };
    let (ours, newest) = (leader.history.last_epoch(), theirs.last_epoch());
    if !newest.is_near(ours) {
        let text = format!("{name} knows epoch {newest}, too far after this leader's {ours} to be an honest one");
        return refuse(RefuseCode::Protest, text);
    }
    // Where no register numbers the epochs, only the number tells which is newer, and one that its own leader gives up
    // supersedes nobody.
    if newest.number() > ours.number() && hello.gives_up != newest {
        let text = format!("{name} knows epoch {newest}, this leader is of epoch {ours}: it is superseded");
        return refuse(RefuseCode::NewerEpoch, text);
    }
    let shared = theirs.entries().iter().any(|entry| leader.history.entries().binary_search(entry).is_ok());
    // In the same cluster it is a leadership that nobody followed: all of it is cut off. Without epochs it is damage.
    let ours_by_id = hello.cluster_id.is_some() && !theirs.entries().is_empty();
    if hello.flushed > Lsn::ZERO && !shared && !ours_by_id {
        let text = format!("{name} has a log up to {} that shares no epoch with the leader's", hello.flushed);
        return refuse(RefuseCode::Diverged, text);
    }
    let start = leader.history.fork_with(&theirs, hello.flushed);
    let start = if mutants::is_on("forget-the-fork") { hello.flushed } else { start };
    if start > leader.sealed {
        let text = format!("{name} has the log up to {start}, the leader only up to {}", leader.sealed);
        return refuse(RefuseCode::Diverged, text);
    }
    if start < leader.log_start {
        return Err(log_gone(hello, start, leader.log_start));
    }
    Ok(start)
}

/// The replica's slot is lost, or it never had one, or what it held is damaged.
fn log_gone(hello: &Hello, start: Lsn, log_start: Lsn) -> Refuse {
    let name = &hello.name;
    let text = format!(
        "{name} needs the log from {start} on, the leader can give it from {log_start} on: its slot is lost, \
         it needs a snapshot"
    );
    Refuse { code: RefuseCode::LogGone, text }
}

/// The refusal for a log whose bytes are not the leader's although the epochs say so.
pub fn diverged(hello: &Hello, start: Lsn) -> Refuse {
    let text = format!("the log of {} does not hold the leader's frames before {start}", hello.name);
    Refuse { code: RefuseCode::Diverged, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(entries: &[(u64, u64)]) -> Vec<(Epoch, Lsn)> {
        entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect()
    }

    #[test]
    fn every_kind_of_hello_gets_its_answer() {
        let history = EpochHistory::from_entries(&entries(&[(1, 0), (3, 100), (4, 200)])).expect("ascending");
        let name: MemberName = "leader".parse().expect("a name");
        let leader = Leader {
            cluster_id: ClusterId(7),
            name: &name,
            segment_bytes: 1 << 26,
            history: &history,
            log_start: Lsn(50),
            sealed: Lsn(300),
        };
        let hello = |flushed, history: &[(u64, u64)]| Hello {
            protocol: PROTOCOL_VERSION,
            cluster_id: Some(ClusterId(7)),
            name: "a".parse().expect("a name"),
            client_address: String::new(),
            flushed: Lsn(flushed),
            segment_bytes: 1 << 26,
            crc: 0,
            member: MemberId(0),
            gives_up: Epoch(0),
            history: entries(history),
        };
        const OTHER_4: Epoch = Epoch(4 | 99 << 32);
        let all = &[(1, 0), (3, 100), (4, 200)][..];
        use RefuseCode::{Diverged, LogGone, NewerEpoch, Protest, Protocol, SegmentBytes};
        let table = [
            ("keeps up", hello(300, all), Ok(300)),
            ("is behind", hello(60, all), Ok(60)),
            ("was down during the promotion", hello(150, &all[..2]), Ok(150)),
            ("has a tail that the leader lost", hello(250, &all[..2]), Ok(200)),
            ("led an epoch of its own", hello(250, &[(1, 0), (2, 90)]), Ok(90)),
            ("knows no cluster yet", Hello { cluster_id: None, ..hello(60, all) }, Ok(60)),
            ("needs recycled log", hello(40, all), Err(LogGone)),
            ("is empty, and the log is not whole", hello(0, &[]), Err(LogGone)),
            ("is ahead", hello(400, all), Err(Diverged)),
            ("led epochs that nobody else knows", hello(60, &[(2, 0)]), Err(LogGone)),
            ("has a log of its own", Hello { cluster_id: None, ..hello(60, &[(2, 0)]) }, Err(Diverged)),
            ("has a log without epochs", hello(60, &[]), Err(Diverged)),
            ("saw a newer leader", hello(60, &[(1, 0), (5, 80)]), Err(NewerEpoch)),
            ("led a newer epoch alone", Hello { gives_up: Epoch(5), ..hello(99, &[(1, 0), (5, 80)]) }, Ok(80)),
            ("followed one of our number", hello(250, &[(1, 0), (3, 100), (OTHER_4.0, 150)]), Ok(150)),
            ("other cluster", Hello { cluster_id: Some(ClusterId(8)), ..hello(60, all) }, Err(RefuseCode::ClusterId)),
            ("has our name", Hello { name: name.clone(), ..hello(60, all) }, Err(Protest)),
            ("other segments", Hello { segment_bytes: 1 << 24, ..hello(60, all) }, Err(SegmentBytes)),
            ("other protocol", Hello { protocol: PROTOCOL_VERSION + 1, ..hello(60, all) }, Err(Protocol)),
        ];
        for (what, hello, expected) in table {
            let verdict = judge(&hello, &leader).map(|start| start.0).map_err(|refuse| refuse.code);
            assert_eq!(verdict, expected, "{what}");
        }
    }
}
