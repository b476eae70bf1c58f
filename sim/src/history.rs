//! Histories of registers, checked for linearizability: every read and write looks as if it happened at one moment between its call
//! and its return, whatever failovers lay between.
//!
//! No value is written twice, so that no order has to be searched for (Gibbons and Korach, "Testing Shared Memories", 1997). The
//! calls that write or read one value make its zone, between the first return and the last call among them. Where the return comes
//! first, the register holds the value all through the zone: two such zones do not overlap. Where the call comes first, all of these
//! calls may happen at one moment of the zone, which is not one at which the register holds another value.

use std::collections::BTreeMap;

/// A call that waits for its return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    key: String,
    number: usize,
}

/// Counts calls and returns.
type Moment = u64;

#[derive(Clone, Copy, Debug)]
struct Operation {
    is_write: bool,
    /// What it writes or has read; nothing where it never happened, or nobody knows.
    value: Option<u64>,
    called: Moment,
    returned: Option<Moment>,
}

/// All calls on all keys.
#[derive(Default)]
pub struct Registers {
    operations: BTreeMap<String, Vec<Operation>>,
    now: Moment,
}

/// The calls on one value.
#[derive(Clone, Copy, Debug)]
struct Zone {
    value: u64,
    /// When its write was called.
    written: Moment,
    first_return: Moment,
    last_call: Moment,
}

impl Zone {
    fn is_held_throughout(&self) -> bool {
        self.first_return < self.last_call
    }
}

impl Registers {
    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    fn invoke(&mut self, key: &str, is_write: bool, value: Option<u64>) -> Call {
        let called = self.tick();
        let all = self.operations.entry(key.to_owned()).or_default();
        all.push(Operation { is_write, value, called, returned: None });
        Call { key: key.to_owned(), number: all.len() - 1 }
    }

    /// Each value is written once, and none is 0.
    pub fn invoke_write(&mut self, key: &str, value: u64) -> Call {
        self.invoke(key, true, Some(value))
    }

    pub fn invoke_read(&mut self, key: &str) -> Call {
        self.invoke(key, false, None)
    }

    fn operation(&mut self, call: &Call) -> &mut Operation {
        &mut self.operations.get_mut(&call.key).expect("it was invoked")[call.number]
    }

    pub fn wrote(&mut self, call: Call) {
        let now = self.tick();
        self.operation(&call).returned = Some(now);
    }

    /// `None` stands for a key that does not exist.
    pub fn read(&mut self, call: Call, value: Option<u64>) {
        let now = self.tick();
        let operation = self.operation(&call);
        (operation.value, operation.returned) = (Some(value.unwrap_or(0)), Some(now));
    }

    /// Nothing was done.
    pub fn refused(&mut self, call: Call) {
        self.operation(&call).value = None;
    }

    /// The key whose history has no order, if there is one, and how many calls were checked.
    pub fn check(&self) -> Result<usize, String> {
        let mut checked = 0;
        for (key, operations) in &self.operations {
            let calls_on = |value| -> Vec<_> { operations.iter().filter(|one| one.value == Some(value)).collect() };
            let zones = zones(operations).map_err(|value| {
                format!("{key} was read as {value} before anybody wrote that: {:?}", calls_on(value))
            })?;
            if let Some((one, other)) = conflict(zones) {
                return Err(format!(
                    "the history of {key} is not linearizable: {:?} and {:?}",
                    calls_on(one),
                    calls_on(other)
                ));
            }
            checked += operations.iter().filter(|operation| operation.returned.is_some()).count();
        }
        Ok(checked)
    }
}

/// The zone of each value; or a value that was read and not written, or not yet.
fn zones(operations: &[Operation]) -> Result<Vec<Zone>, u64> {
    // At first a key does not exist.
    let mut zones = BTreeMap::from([(0, Zone { value: 0, written: 0, first_return: 0, last_call: 0 })]);
    let returned = |operation: &Operation| operation.returned.unwrap_or(Moment::MAX);
    let with_value = || operations.iter().filter_map(|operation| Some((operation.value?, operation)));
    for (value, write) in with_value().filter(|(_, operation)| operation.is_write) {
        let zone = Zone { value, written: write.called, first_return: returned(write), last_call: write.called };
        assert!(zones.insert(value, zone).is_none(), "{value} is written twice");
    }
    for (value, read) in with_value().filter(|(_, operation)| !operation.is_write) {
        let zone = zones.get_mut(&value).ok_or(value)?;
        zone.first_return = zone.first_return.min(returned(read));
        zone.last_call = zone.last_call.max(read.called);
    }
    let early = zones.values().find(|zone| zone.first_return < zone.written);
    early.map_or_else(|| Ok(zones.values().copied().collect()), |zone| Err(zone.value))
}

/// Two values that the register would have to hold at the same time.
fn conflict(zones: Vec<Zone>) -> Option<(u64, u64)> {
    let (mut held, brief): (Vec<Zone>, Vec<Zone>) = zones.into_iter().partition(Zone::is_held_throughout);
    held.sort_unstable_by_key(|zone| zone.first_return);
    let overlap = held.windows(2).find(|two| two[1].first_return < two[0].last_call);
    if let Some(two) = overlap {
        return Some((two[0].value, two[1].value));
    }
    brief.iter().find_map(|zone| {
        let before = held.partition_point(|other| other.first_return < zone.last_call);
        let around = held[..before].last().filter(|other| zone.first_return < other.last_call)?;
        Some((zone.value, around.value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_of_an_overwritten_value_is_found() {
        let mut registers = Registers::default();
        let (first, second) = (registers.invoke_write("k", 1), registers.invoke_write("k", 2));
        registers.wrote(first);
        registers.wrote(second);
        for value in [2, 2] {
            let read = registers.invoke_read("k");
            registers.read(read, Some(value));
        }
        assert_eq!(registers.check(), Ok(4));
        let read = registers.invoke_read("k");
        registers.read(read, Some(1));
        assert!(registers.check().is_err(), "1 before and after 2");
    }

    #[test]
    fn read_of_a_refused_write_is_found() {
        let mut registers = Registers::default();
        let (lost, refused) = (registers.invoke_write("k", 1), registers.invoke_write("k", 2));
        registers.refused(refused);
        let read = registers.invoke_read("k");
        registers.read(read, Some(1));
        assert_eq!(registers.check(), Ok(1), "{lost:?} may have happened");
        let read = registers.invoke_read("k");
        registers.read(read, Some(2));
        assert!(registers.check().is_err());
    }

    /// Whether the operations that are left have an order, now that the register holds `value`.
    fn has_an_order(left: &[Operation], value: u64) -> bool {
        let first_return = left.iter().filter_map(|operation| operation.returned).min();
        first_return.is_none_or(|until| {
            left.iter().enumerate().filter(|(_, operation)| operation.called < until).any(|(index, operation)| {
                let rest = [&left[..index], &left[index + 1..]].concat();
                match operation.value {
                    Some(written) if operation.is_write => has_an_order(&rest, written),
                    read => read == Some(value) && has_an_order(&rest, value),
                }
            })
        })
    }

    #[test]
    fn zones_find_what_a_search_for_an_order_finds() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut outcomes = [0, 0];
        for _ in 0..4000 {
            let mut registers = Registers::default();
            let (mut open, mut written) = (Vec::new(), 0);
            for _ in 0..12 {
                if !open.is_empty() && rng.bool() {
                    match open.swap_remove(rng.usize(0..open.len())) {
                        (call, true) => registers.wrote(call),
                        (call, false) => registers.read(call, Some(rng.u64(0..=written))),
                    }
                } else if rng.bool() {
                    written += 1;
                    open.push((registers.invoke_write("k", written), true));
                } else {
                    open.push((registers.invoke_read("k"), false));
                }
            }
            let known: Vec<Operation> =
                registers.operations["k"].iter().filter(|operation| operation.value.is_some()).copied().collect();
            let holds = has_an_order(&known, 0);
            assert_eq!(registers.check().is_ok(), holds, "{known:?}");
            outcomes[usize::from(holds)] += 1;
        }
        assert!(outcomes.iter().all(|count| *count > 500), "{outcomes:?}");
    }
}
