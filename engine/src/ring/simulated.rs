//! A ring whose kernel is a simulator: what is pushed waits in a queue that the simulator reads, and completes when and how it
//! says. The entries are the ones that the kernel would get, so the code that makes them and takes their completions is the
//! code that runs in production.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use io_uring::squeue;

use super::{Completion, Ring, RingError, Token};

/// Entries of the real ring that a simulated one is built around and never uses.
const UNUSED_ENTRIES: u32 = 8;
/// `IOSQE_IO_LINK`: the next entry begins when this one has succeeded.
const LINK: u8 = 1 << 2;

/// An entry as the kernel reads it (`struct io_uring_sqe`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct RawEntry {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    offset: u64,
    address: u64,
    bytes: u32,
    op_flags: u32,
    user_data: u64,
    rest: [u64; 3],
}

const _: () = assert!(size_of::<RawEntry>() == 64 && size_of::<squeue::Entry>() == 64);

/// An operation that a node asks for.
#[derive(Clone, Copy, Debug)]
pub struct Submission {
    /// `IORING_OP_...`.
    pub opcode: u8,
    /// The descriptor.
    pub fd: i32,
    /// Where in the file.
    pub offset: u64,
    /// The memory, or the message header.
    pub address: u64,
    /// How much of it.
    pub bytes: u32,
    /// `RWF_...`, `MSG_...` or poll events.
    pub op_flags: u32,
    /// The next submission waits for this one and is cancelled if it fails.
    pub linked: bool,
    /// For the completion.
    pub token: Token,
}

#[derive(Default)]
struct Inner {
    submitted: VecDeque<Submission>,
    completed: VecDeque<Completion>,
}

/// Both queues of a simulated ring, shared with the simulator.
#[derive(Clone, Default)]
pub struct Queues(Rc<RefCell<Inner>>);

impl Queues {
    pub(super) fn push(&self, entries: &[squeue::Entry]) {
        for entry in entries {
            // SAFETY: the crate's entry is the kernel's structure and nothing else (its size is checked above), plain
            // numbers for which every value is one.
            let raw: RawEntry = unsafe { std::mem::transmute_copy(entry) };
            let submission = Submission {
                opcode: raw.opcode,
                fd: raw.fd,
                offset: raw.offset,
                address: raw.address,
                bytes: raw.bytes,
                op_flags: raw.op_flags,
                linked: raw.flags & LINK != 0,
                token: Token(raw.user_data),
            };
            self.0.borrow_mut().submitted.push_back(submission);
        }
    }

    pub(super) fn take_completions(&self, out: &mut Vec<Completion>) {
        out.extend(self.0.borrow_mut().completed.drain(..));
    }

    /// The next operation that was asked for.
    pub fn next(&self) -> Option<Submission> {
        self.0.borrow_mut().submitted.pop_front()
    }

    /// An operation ended.
    pub fn complete(&self, token: Token, result: i32, flags: u32) {
        self.0.borrow_mut().completed.push_back(Completion { token, result, flags });
    }

    /// True when nothing waits to be taken by the node.
    pub fn is_quiet(&self) -> bool {
        self.0.borrow().completed.is_empty()
    }
}

impl Ring {
    /// A ring without a kernel, and its queues for the simulator.
    pub fn simulated() -> Result<(Ring, Queues), RingError> {
        let mut ring = Ring::new(UNUSED_ENTRIES)?;
        let queues = Queues::default();
        ring.simulated = Some(queues.clone());
        Ok((ring, queues))
    }
}
