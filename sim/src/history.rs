//! Histories of registers, checked for linearizability by stateright's tester: every read and write looks as if it happened at
//! one moment between its call and its return, whatever failovers lay between.

use std::collections::{BTreeMap, BTreeSet};

use stateright::semantics::register::{Register, RegisterOp, RegisterRet};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester};

/// Of a key's history so much is checked: the search for an order takes longer than linear time.
const EVENTS_MAX: usize = 240;

/// A call that waits for its return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    key: String,
    number: usize,
}

#[derive(Clone, Debug)]
enum Event {
    Invoke(usize, RegisterOp<u64>),
    Return(usize, RegisterRet<u64>),
    /// It never happened.
    Forget(usize),
}

/// All calls on all keys.
#[derive(Default)]
pub struct Registers {
    events: BTreeMap<String, Vec<Event>>,
    calls: BTreeMap<String, usize>,
}

impl Registers {
    fn invoke(&mut self, key: &str, op: RegisterOp<u64>) -> Call {
        let number = self.calls.entry(key.to_owned()).or_default();
        *number += 1;
        self.events.entry(key.to_owned()).or_default().push(Event::Invoke(*number, op));
        Call { key: key.to_owned(), number: *number }
    }

    pub fn invoke_write(&mut self, key: &str, value: u64) -> Call {
        self.invoke(key, RegisterOp::Write(value))
    }

    pub fn invoke_read(&mut self, key: &str) -> Call {
        self.invoke(key, RegisterOp::Read)
    }

    fn push(&mut self, call: Call, event: Event) {
        self.events.get_mut(&call.key).expect("it was invoked").push(event);
    }

    pub fn wrote(&mut self, call: Call) {
        let event = Event::Return(call.number, RegisterRet::WriteOk);
        self.push(call, event);
    }

    /// 0 stands for a key that does not exist.
    pub fn read(&mut self, call: Call, value: Option<u64>) {
        let event = Event::Return(call.number, RegisterRet::ReadOk(value.unwrap_or(0)));
        self.push(call, event);
    }

    /// Nothing was done.
    pub fn refused(&mut self, call: Call) {
        let event = Event::Forget(call.number);
        self.push(call, event);
    }

    /// The key whose history has no order, if there is one, and how many calls were checked.
    pub fn check(&self) -> Result<usize, String> {
        let mut checked = 0;
        for (key, events) in &self.events {
            let events = closed(events);
            let mut tester = LinearizabilityTester::new(Register(0));
            for event in events.iter().take(EVENTS_MAX) {
                match event {
                    Event::Invoke(call, op) => tester.on_invoke(*call, op.clone()).map(drop),
                    Event::Return(call, ret) => {
                        checked += 1;
                        tester.on_return(*call, ret.clone()).map(drop)
                    }
                    Event::Forget(_) => Ok(()),
                }
                .map_err(|error| format!("{key}: {error}"))?;
            }
            if !tester.is_consistent() {
                return Err(format!("the history of {key} is not linearizable: {events:?}"));
            }
        }
        Ok(checked)
    }
}

/// The same history without calls that nobody knows to have returned. A read without a return says nothing. A write without one
/// whose value nobody read can be left out; one whose value was read happened before that read returned, so it can return then.
fn closed(events: &[Event]) -> Vec<Event> {
    let mut value_of = BTreeMap::new();
    let mut ended = BTreeSet::new();
    for event in events {
        match event {
            Event::Invoke(call, RegisterOp::Write(value)) => drop(value_of.insert(*call, *value)),
            Event::Invoke(..) => {}
            Event::Return(call, _) | Event::Forget(call) => drop(ended.insert(*call)),
        }
    }
    let forgotten: BTreeSet<usize> =
        events.iter().filter_map(|event| if let Event::Forget(call) = event { Some(*call) } else { None }).collect();
    let mut open: BTreeMap<u64, usize> =
        value_of.iter().filter(|(call, _)| !ended.contains(*call)).map(|(call, value)| (*value, *call)).collect();
    let read: BTreeSet<u64> = events
        .iter()
        .filter_map(|event| if let Event::Return(_, RegisterRet::ReadOk(value)) = event { Some(*value) } else { None })
        .collect();
    let mut closed = Vec::new();
    for event in events {
        match event {
            Event::Forget(_) => {}
            Event::Invoke(call, op) => {
                let unread = value_of.get(call).is_none_or(|value| !read.contains(value));
                if !forgotten.contains(call) && (ended.contains(call) || !unread) {
                    closed.push(Event::Invoke(*call, op.clone()));
                }
            }
            Event::Return(call, ret) => {
                closed.push(Event::Return(*call, ret.clone()));
                if let RegisterRet::ReadOk(value) = ret
                    && let Some(write) = open.remove(value)
                {
                    closed.push(Event::Return(write, RegisterRet::WriteOk));
                }
            }
        }
    }
    closed
}
