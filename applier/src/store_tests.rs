//! The store and the pending view against a plain model, with checkpoints, rollbacks and restarts at random moments.

use std::collections::BTreeMap;

use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{FRAME_HEADER_BYTES, frame_aligned};
use walferry_engine::lsn::Epoch;
use walferry_mounts as mounts;

use super::check::{Condition, examine};
use super::*;
use crate::pending::Pending;
use crate::record::Effect;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Model {
    String(Vec<u8>),
    Stream(Vec<(StreamId, Vec<u8>)>),
}

type Keys = BTreeMap<Vec<u8>, Model>;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Frames in the making; keeps them all, as the log does.
#[derive(Default)]
struct TestLog {
    frames: Vec<(Lsn, Vec<u8>)>,
    end: Lsn,
}

impl TestLog {
    fn seal(&mut self, records: &[Vec<u8>]) -> Lsn {
        let mut bytes = vec![0; FRAME_HEADER_BYTES];
        for record in records {
            bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
            bytes.extend_from_slice(record);
        }
        let header = FrameHeader {
            filler: false,
            epoch: Epoch(1),
            lsn: self.end,
            payload_bytes: (bytes.len() - FRAME_HEADER_BYTES) as u32,
            record_count: records.len() as u32,
            previous_crc: 0,
            crc: 0,
            flushed: self.end,
            committed: self.end,
            sealed_at_us: self.end.0,
        };
        bytes.resize(frame_aligned(bytes.len()), 0);
        let header = header.seal(&mut bytes);
        self.frames.push((self.end, bytes));
        self.end = header.end();
        self.end
    }

    fn replay(&self, store: &mut Store) {
        let from = store.applied();
        for (lsn, bytes) in self.frames.iter().filter(|frame| frame.0 >= from) {
            store.apply(&Frame::read(bytes, *lsn).expect("a sealed frame")).expect("it applies");
        }
    }
}

fn open(dir: &Path) -> Store {
    let config = StoreConfig {
        checkpoint_bytes: CHECKPOINT_BYTES_MIN,
        checkpoint_log_bytes: u64::MAX,
        checkpoint_interval: Duration::MAX,
        cache_bytes: 1 << 20,
    };
    Store::open(dir, config, Box::new(|| ())).expect("a store in a temporary directory")
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a temporary directory")
}

fn random_record(random: &mut Random, model: &mut Keys, next_id: &mut u64) -> Vec<u8> {
    let key = format!("key:{}", random.below(40)).into_bytes();
    let value = vec![b'v'; random.below(200) as usize];
    let mut record = Vec::new();
    match (random.below(10), model.get_mut(&key)) {
        (0..=2, _) => {
            Effect::Put { key: &key, value: &value }.encode_into(&mut record);
            model.insert(key, Model::String(value));
        }
        (3, _) => {
            Effect::Delete { key: &key }.encode_into(&mut record);
            model.remove(&key);
        }
        (4..=6, Some(Model::String(held))) => {
            Effect::Append { key: &key, bytes: &value }.encode_into(&mut record);
            held.extend_from_slice(&value);
        }
        (_, Some(Model::String(_))) => {}
        (_, held) => {
            *next_id += 1;
            let id = (*next_id, 0);
            Effect::StreamAdd { key: &key, id, fields: &value }.encode_into(&mut record);
            match held {
                Some(Model::Stream(entries)) => entries.push((id, value)),
                _ => drop(model.insert(key, Model::Stream(vec![(id, value)]))),
            }
        }
    }
    record
}

fn check(view: &dyn View, model: &Keys, random: &mut Random) {
    for number in 0..40 {
        let key = format!("key:{number}").into_bytes();
        match (view.get(&key).unwrap(), model.get(&key)) {
            (None, None) => assert_eq!(view.about(&key).unwrap().0, None),
            (Some(Value::String(found)), Some(Model::String(held))) => {
                assert_eq!(&found[..], held);
                assert_eq!(view.about(&key).unwrap().0, Some(About::String(held.len())));
            }
            (Some(Value::Stream(meta)), Some(Model::Stream(entries))) => {
                assert_eq!(view.about(&key).unwrap().0, Some(About::Stream(meta)));
                assert_eq!(meta.entries, entries.len() as u64);
                assert_eq!(meta.last_id, entries.last().unwrap().0);
                check_range(view, &key, entries, random);
            }
            (found, held) => panic!("{}: {found:?} instead of {held:?}", String::from_utf8_lossy(&key)),
        }
    }
    let mut scanned = Vec::new();
    let mut cursor = 0;
    loop {
        let (next, keys) = view.scan(cursor, 7).unwrap();
        scanned.extend(keys);
        cursor = next;
        if cursor == 0 {
            break;
        }
    }
    scanned.sort();
    scanned.dedup();
    assert_eq!(scanned, model.keys().cloned().collect::<Vec<_>>(), "SCAN gives every key");
}

/// Counts in steps, as a node does between two turns.
fn count(store: &mut Store, model: &Keys) {
    let mut steps = 0;
    let counted = loop {
        let counted = store.count_keys(3).unwrap();
        if counted.is_exact {
            break counted.keys;
        }
        steps += 1;
        assert!(steps < 1000, "every step counts some");
    };
    assert_eq!(counted, model.len() as u64);
}

fn check_range(view: &dyn View, key: &[u8], entries: &[(StreamId, Vec<u8>)], random: &mut Random) {
    let last = entries.last().unwrap().0.0;
    let (a, b) = (random.below(last + 2), random.below(last + 2));
    for (from, to) in [((0, 0), (u64::MAX, u64::MAX)), ((a.min(b), 0), (a.max(b), 0))] {
        for reverse in [false, true] {
            let limit = 1 + random.below(entries.len() as u64 + 2) as usize;
            let mut expected: Vec<_> = entries.iter().filter(|(id, _)| (from..=to).contains(id)).cloned().collect();
            if reverse {
                expected.reverse();
            }
            expected.truncate(limit);
            let mut found = Vec::new();
            view.stream_range(key, from, to, reverse, limit, &mut |id, fields| {
                found.push((id, fields.to_vec()));
                true
            })
            .unwrap();
            assert_eq!(found, expected, "{from:?}..={to:?} reverse {reverse} limit {limit}");
        }
    }
}

/// Waits for a checkpoint of everything.
fn checkpoint(store: &mut Store) {
    store.poll_checkpoint(Lsn::MAX, Instant::now()).unwrap();
    store.finish_checkpoint().unwrap();
    store.freeze();
    store.poll_checkpoint(Lsn::MAX, Instant::now()).unwrap();
    store.finish_checkpoint().unwrap();
}

#[test]
fn store_equals_a_model_through_checkpoints_and_restarts() {
    for seed in 1..=6 {
        let dir = temporary();
        let mut random = Random(seed * 0x9E37_79B9);
        let mut store = open(dir.path());
        let (mut log, mut model, mut next_id) = (TestLog::default(), Keys::new(), 0);
        for round in 0..60 {
            let records: Vec<_> =
                (0..1 + random.below(20)).map(|_| random_record(&mut random, &mut model, &mut next_id)).collect();
            log.seal(&records);
            log.replay(&mut store);
            match random.below(8) {
                0 => checkpoint(&mut store),
                1 if store.frozen.is_none() => store.freeze(),
                2 => {
                    store.rollback().unwrap();
                    log.replay(&mut store);
                }
                3 => {
                    drop(store);
                    store = open(dir.path());
                    log.replay(&mut store);
                }
                _ => store.poll_checkpoint(Lsn::MAX, Instant::now()).unwrap(),
            }
            assert_eq!(store.applied(), log.end, "seed {seed} round {round}");
            check(&store, &model, &mut random);
            if random.below(3) == 0 {
                count(&mut store, &model);
            }
        }
    }
}

#[test]
fn pending_changes_over_the_store_equal_the_model() {
    for seed in 1..=6 {
        let dir = temporary();
        let mut random = Random(seed * 0x85EB_CA6B);
        let mut store = open(dir.path());
        let mut pending = Pending::default();
        let (mut log, mut model, mut next_id) = (TestLog::default(), Keys::new(), 0);
        for _ in 0..60 {
            let start = log.end;
            let mut records = Vec::new();
            let mut at = start.advance(FRAME_HEADER_BYTES as u64);
            for _ in 0..1 + random.below(12) {
                let record = random_record(&mut random, &mut model, &mut next_id);
                at = at.advance(4 + record.len() as u64);
                pending.record(at, &record, &store).unwrap();
                records.push(record);
            }
            log.seal(&records);
            check(&pending.over(&store), &model, &mut random);
            if random.below(3) == 0 {
                log.replay(&mut store);
                // Between apply and forget both have the changes.
                check(&pending.over(&store), &model, &mut random);
                pending.forget(store.applied());
                assert!(pending.is_empty());
            }
            if random.below(6) == 0 {
                checkpoint(&mut store);
            }
            check(&pending.over(&store), &model, &mut random);
        }
    }
}

#[test]
fn a_checkpoint_waits_for_the_commit_lsn_unless_memory_runs_out() {
    let dir = temporary();
    let mut store = open(dir.path());
    let mut log = TestLog::default();
    let fill = |log: &mut TestLog, store: &mut Store, number: u64| {
        let (key, value) = (number.to_be_bytes(), vec![1; CHECKPOINT_BYTES_MIN]);
        let mut record = Vec::new();
        Effect::Put { key: &key, value: &value }.encode_into(&mut record);
        log.seal(&[record]);
        log.replay(store);
    };
    fill(&mut log, &mut store, 0);
    store.poll_checkpoint(Lsn::ZERO, Instant::now()).unwrap();
    assert!(store.frozen.as_ref().is_some_and(|frozen| !frozen.writing), "nothing beyond the commit LSN is written");
    for number in 1..=OVERLAY_CHECKPOINTS_MAX as u64 + 1 {
        fill(&mut log, &mut store, number);
    }
    assert!(store.overloaded());
    store.poll_checkpoint(Lsn::ZERO, Instant::now()).unwrap();
    store.finish_checkpoint().unwrap();
    assert!(store.durable_applied() > Lsn::ZERO, "memory is bounded even without confirmations");
}

/// One that fails for want of space would end the node.
#[test]
fn checkpoint_without_space_is_put_off_and_more_changes_refused() {
    let dir = temporary();
    let mut store = open(dir.path());
    let mut log = TestLog::default();
    let value = vec![1; CHECKPOINT_BYTES_MIN];
    let fill = |log: &mut TestLog, store: &mut Store, number: u64| {
        let mut record = Vec::new();
        Effect::Put { key: &number.to_be_bytes(), value: &value }.encode_into(&mut record);
        log.seal(&[record]);
        log.replay(store);
    };
    fill(&mut log, &mut store, 0);
    store.set_free(store.space_wanted() - 1);
    for number in 1..=OVERLAY_CHECKPOINTS_MAX as u64 + 1 {
        store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("put off");
        assert!(store.frozen.is_none() && store.lacks_space().is_some_and(|text| text.contains("bytes")));
        fill(&mut log, &mut store, number);
    }
    store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("put off");
    assert!(store.overloaded(), "whoever applies waits as well");
    store.set_free(store.space_wanted());
    store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("begun");
    store.finish_checkpoint().expect("a checkpoint");
    assert_eq!((store.durable_applied(), store.lacks_space(), store.space_wanted()), (log.end, None, 0));
    // What is appended to is written anew.
    log.seal(&[append("\0\0\0\0\0\0\0\0", b"x")]);
    log.replay(&mut store);
    assert!(store.space_wanted() > CHECKPOINT_SPARE_BYTES + CHECKPOINT_BYTES_MIN as u64);
    // The end of a node is not held up, its log has everything.
    store.set_free(0);
    let durable = store.durable_applied();
    store.close(Lsn::MAX).expect("without a checkpoint");
    assert_eq!(open(dir.path()).durable_applied(), durable);
}

#[test]
fn export_equals_its_checkpoint_whatever_follows() {
    let (dir, other) = (temporary(), temporary());
    let mut random = Random(0xA24B_AED4);
    let mut store = open(dir.path());
    let (mut log, mut model, mut next_id) = (TestLog::default(), Keys::new(), 0);
    let mut write = |log: &mut TestLog, model: &mut Keys, store: &mut Store| {
        for _ in 0..30 {
            let records: Vec<_> = (0..20).map(|_| random_record(&mut random, model, &mut next_id)).collect();
            log.seal(&records);
        }
        log.replay(store);
        checkpoint(store);
    };
    write(&mut log, &mut model, &mut store);
    let (then, held) = (log.end, model.clone());
    let export = store.export().expect("a state");
    assert_eq!(export.applied(), then);
    write(&mut log, &mut model, &mut store);
    let mut told = 0;
    let path = other.path().join(STORE_FILE);
    // What a copy that was cut short left is no obstacle.
    std::fs::write(&path, "half a copy").expect("written");
    export
        .write(&path, |bytes| {
            told += bytes;
            true
        })
        .expect("written");
    assert!(told > 0);
    let mut random = Random(7);
    let copy = open(other.path());
    assert_eq!((copy.applied(), copy.durable_applied()), (then, then));
    check(&copy, &held, &mut random);
    check(&store, &model, &mut random);
    let stopped = store.export().expect("a state").write(&other.path().join("stopped.redb"), |_| false);
    assert!(matches!(stopped, Err(export::ExportError::Stopped)));
}

/// A checkpoint that is due is not written before its log is committed.
fn assert_waits_for_the_commit_lsn(store: &mut Store, end: Lsn) {
    store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("it waits");
    store.finish_checkpoint().expect("nothing is written");
    assert_eq!(store.durable_applied(), Lsn::ZERO);
    store.poll_checkpoint(end, Instant::now()).expect("it is written");
    store.finish_checkpoint().expect("a checkpoint");
    assert_eq!(store.durable_applied(), end);
}

/// A store that has applied one small record and written none.
fn open_with_one_record(dir: &Path) -> (Store, TestLog) {
    let mut store = open(dir);
    let mut log = TestLog::default();
    let mut record = Vec::new();
    Effect::Put { key: b"k", value: b"v" }.encode_into(&mut record);
    log.seal(&[record]);
    log.replay(&mut store);
    (store, log)
}

#[test]
fn few_keys_written_again_and_again_still_get_a_checkpoint() {
    let dir = temporary();
    let limit = CHECKPOINT_BYTES_MIN as u64;
    let config = StoreConfig {
        checkpoint_bytes: 64 << 20,
        checkpoint_log_bytes: limit,
        checkpoint_interval: Duration::MAX,
        cache_bytes: 1 << 20,
    };
    let mut store = Store::open(dir.path(), config, Box::new(|| ())).expect("a store");
    let mut log = TestLog::default();
    while log.end <= Lsn(limit) {
        log.replay(&mut store);
        store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("nothing to do");
        assert!(store.frozen.is_none(), "the log is {} bytes long", log.end.0);
        let mut record = Vec::new();
        Effect::Put { key: b"key", value: &[7; 100_000] }.encode_into(&mut record);
        log.seal(&[record]);
    }
    log.replay(&mut store);
    assert_waits_for_the_commit_lsn(&mut store, log.end);
}

#[test]
fn requested_checkpoint_waits_for_the_commit_lsn() {
    for beyond in [false, true] {
        let dir = temporary();
        let (mut store, log) = open_with_one_record(dir.path());
        store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("nothing to do");
        store.finish_checkpoint().expect("nothing to do");
        assert_eq!(store.durable_applied(), Lsn::ZERO, "it is far too small for one");
        store.ask_for_checkpoint(log.end, beyond);
        store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("it is written, or waits");
        store.finish_checkpoint().expect("it is written, or waits");
        assert_eq!(store.durable_applied() == log.end, beyond);
        store.poll_checkpoint(log.end, Instant::now()).expect("it is written");
        store.finish_checkpoint().expect("it is written");
        assert_eq!(store.durable_applied(), log.end);
    }
}

#[test]
fn checkpoint_comes_after_its_interval_though_little_changed() {
    let dir = temporary();
    let interval = Duration::from_secs(300);
    let config = StoreConfig {
        checkpoint_bytes: 64 << 20,
        checkpoint_log_bytes: u64::MAX,
        checkpoint_interval: interval,
        cache_bytes: 1 << 20,
    };
    let mut store = Store::open(dir.path(), config, Box::new(|| ())).expect("a store");
    let begun = Instant::now();
    store.poll_checkpoint(Lsn::MAX, begun).expect("nothing to do");
    assert_eq!(store.next_timeout(begun), None, "nothing changed");
    let mut log = TestLog::default();
    let mut record = Vec::new();
    Effect::Put { key: b"k", value: b"v" }.encode_into(&mut record);
    log.seal(&[record]);
    log.replay(&mut store);
    store.poll_checkpoint(Lsn::MAX, begun).expect("nothing to do yet");
    assert_eq!(store.next_timeout(begun), Some(interval));
    store.poll_checkpoint(Lsn::MAX, begun + interval - Duration::from_millis(1)).expect("nothing to do yet");
    assert!(store.frozen.is_none());
    store.poll_checkpoint(Lsn::MAX, begun + interval).expect("it is written");
    store.finish_checkpoint().expect("a checkpoint");
    assert_eq!((store.durable_applied(), store.checkpoints()), (log.end, 1));
    store.poll_checkpoint(Lsn::MAX, begun + interval * 9).expect("nothing to do");
    assert!(store.frozen.is_none() && store.next_timeout(begun).is_none(), "nothing changed since");
}

#[test]
fn checkpoint_for_space_waits_for_the_commit_lsn() {
    let dir = temporary();
    let (mut store, log) = open_with_one_record(dir.path());
    store.ask_for_space_before(log.end);
    assert_waits_for_the_commit_lsn(&mut store, log.end);
}

#[test]
fn a_checkpoint_that_a_read_only_filesystem_took_does_not_count() {
    let dir = temporary();
    if let Err(error) = mounts::own() {
        println!("skipped: this user may not mount a filesystem ({error})");
        return;
    }
    let (mut store, log) = open_with_one_record(dir.path());
    // The database's own descriptor still takes writes, as ext4 does after a remount by force: only its path tells.
    mounts::make_read_only(dir.path()).expect("read-only now");
    store.ask_for_checkpoint(log.end, false);
    let refused = store
        .poll_checkpoint(log.end, Instant::now())
        .and_then(|()| store.finish_checkpoint())
        .expect_err("nothing is durable there");
    assert!(refused.to_string().contains("Read-only file system"), "{refused}");
    assert_eq!(store.durable_applied(), Lsn::ZERO, "the log before it is kept");
    mounts::make_writable(dir.path()).expect("writable again");
}

#[test]
fn checkpoint_remembers_the_frame_that_it_ends_with() {
    let (dir, mut log) = (temporary(), TestLog::default());
    let mut record = Vec::new();
    Effect::Put { key: b"k", value: b"v" }.encode_into(&mut record);
    log.seal(&[record]);
    let mut store = open(dir.path());
    log.replay(&mut store);
    store.close(log.end).expect("a checkpoint");
    let (lsn, bytes) = log.frames.last().expect("a frame");
    let header = *Frame::read(bytes, *lsn).expect("a sealed frame").header();
    let Ok(Condition::Verified(position)) = examine(dir.path(), 1 << 20) else {
        panic!("a checkpoint was just written")
    };
    assert_eq!((position.applied, position.epoch, position.crc), (header.end(), header.epoch, header.crc));
}

#[test]
fn store_that_is_open_or_not_readable_is_not_taken_for_damaged() {
    let dir = tempfile::tempdir().expect("a directory");
    let held = StoreFile::open(dir.path(), 1 << 20).expect("a store");
    assert!(matches!(examine(dir.path(), 1 << 20), Err(reason) if reason.contains("another process")));
    drop(held);
    assert!(matches!(examine(dir.path(), 1 << 20), Ok(Condition::Verified(_))));
    let file = dir.path().join(STORE_FILE);
    let kept = dir.path().join("kept");
    std::fs::rename(&file, &kept).expect("moved");
    std::os::unix::fs::symlink(&file, &file).expect("a link to itself");
    std::fs::symlink_metadata(&file).expect("it is there");
    assert!(matches!(examine(dir.path(), 1 << 20), Ok(Condition::Absent)), "what leads nowhere is no store");
    std::fs::remove_file(&file).expect("removed");
    std::fs::create_dir(&file).expect("a directory in its place");
    assert!(examine(dir.path(), 1 << 20).is_err());
    std::fs::remove_dir(&file).expect("removed");
    std::fs::write(&file, vec![7; 1 << 16]).expect("garbage");
    assert!(matches!(examine(dir.path(), 1 << 20), Ok(Condition::Damaged(_))));
}

#[test]
fn key_changed_and_deleted_is_told_from_one_never_touched() {
    let dir = temporary();
    let mut store = open(dir.path());
    let (mut log, mut version) = (TestLog::default(), Lsn::ZERO);
    let mut change = |store: &mut Store, effect: Effect<'_>| {
        let mut record = Vec::new();
        effect.encode_into(&mut record);
        log.seal(&[record]);
        log.replay(store);
    };
    let of = |store: &Store, key: &[u8]| store.about(key).unwrap();
    assert_eq!(of(&store, b"k"), (None, version));
    change(&mut store, Effect::Put { key: b"k", value: b"1" });
    change(&mut store, Effect::Delete { key: b"k" });
    assert!(of(&store, b"k").1 > version, "it was there in between");
    version = of(&store, b"k").1;
    assert_eq!(of(&store, b"never").1, Lsn::ZERO);
    checkpoint(&mut store);
    assert!(of(&store, b"k").1 >= version, "a checkpoint forgets the deletion, but not that there was one");
    let forgotten = of(&store, b"k").1;
    change(&mut store, Effect::Put { key: b"other", value: b"1" });
    checkpoint(&mut store);
    assert_eq!(
        of(&store, b"k").1,
        forgotten,
        "checkpoints without deletions change nothing for keys that do not exist"
    );
    drop(store);
    let store = open(dir.path());
    assert_eq!(of(&store, b"k").1, store.applied(), "after a restart only the file's position is known");
}

/// Keys with these values in the file, and nothing in memory.
fn in_file(dir: &Path, values: &[(&str, &[u8])]) -> (Store, TestLog) {
    let (mut store, mut log) = (open(dir), TestLog::default());
    for (key, value) in values {
        let mut record = Vec::new();
        Effect::Put { key: key.as_bytes(), value }.encode_into(&mut record);
        log.seal(&[record]);
    }
    log.replay(&mut store);
    store.ask_for_checkpoint(log.end, true);
    store.poll_checkpoint(log.end, Instant::now()).expect("begun");
    store.finish_checkpoint().expect("a checkpoint");
    assert_eq!((store.durable_applied(), store.overlay_bytes()), (log.end, 0));
    (store, log)
}

fn append(key: &str, bytes: &[u8]) -> Vec<u8> {
    let mut record = Vec::new();
    Effect::Append { key: key.as_bytes(), bytes }.encode_into(&mut record);
    record
}

#[test]
fn append_costs_what_is_appended_and_not_the_value() {
    let dir = temporary();
    let large = vec![b'v'; 4 << 20];
    let keys: Vec<String> = (0..20).map(|key| format!("key{key}")).collect();
    let values: Vec<(&str, &[u8])> = keys.iter().map(|key| (&key[..], &large[..])).collect();
    let (mut store, mut log) = in_file(dir.path(), &values);
    let mut pending = Pending::default();
    for round in 0..3 {
        let record = keys.iter().flat_map(|key| append(key, b"xyz")).collect::<Vec<u8>>();
        let end = log.seal(std::slice::from_ref(&record));
        pending.record(end, &record, &store).expect("own record");
        log.replay(&mut store);
        assert!(pending.bytes() < 16 << 10, "{} bytes", pending.bytes());
        pending.forget(store.applied());
        assert!(store.overlay_bytes() < 16 << 10, "{} bytes", store.overlay_bytes());
        if round == 1 {
            // Over the frozen overlay as well.
            store.freeze();
        }
    }
    let whole = [&large[..], b"xyzxyzxyz"].concat();
    let check = |store: &Store| {
        for key in &keys {
            let (about, _) = store.about(key.as_bytes()).expect("read");
            assert_eq!(about, Some(About::String(whole.len())));
            assert_eq!(store.get(key.as_bytes()).expect("read"), Some(Value::String(whole.clone().into())));
        }
    };
    check(&store);
    store.poll_checkpoint(log.end, Instant::now()).expect("begun");
    store.finish_checkpoint().expect("a checkpoint");
    check(&store);
    store.close(log.end).expect("a checkpoint");
    check(&open(dir.path()));
}

#[test]
fn appends_that_the_store_has_already_are_not_there_twice() {
    let dir = temporary();
    let (mut store, mut log) = in_file(dir.path(), &[("k", b"0")]);
    let mut pending = Pending::default();
    let sealed: Vec<Lsn> = (1..=4)
        .map(|number| {
            let record = append("k", number.to_string().as_bytes());
            let end = log.seal(std::slice::from_ref(&record));
            pending.record(end, &record, &store).expect("own record");
            end
        })
        .collect();
    let mut expected = Vec::new();
    for end in sealed {
        let view = pending.over(&store);
        assert_eq!(view.get(b"k").expect("read"), Some(Value::String("01234".into())), "before {end}");
        assert_eq!(view.about(b"k").expect("read").0, Some(About::String(5)));
        let from = store.applied();
        let (lsn, bytes) = log.frames.iter().find(|frame| frame.0 >= from).expect("a frame");
        store.apply(&Frame::read(bytes, *lsn).expect("a sealed frame")).expect("it applies");
        pending.forget(store.applied());
        expected.push(store.get(b"k").expect("read"));
    }
    assert!(pending.is_empty() && pending.bytes() == 0);
    let texts = ["01", "012", "0123", "01234"].map(|text| Some(Value::String(text.into())));
    assert_eq!(expected, texts);
}
