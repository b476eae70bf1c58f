//! What the kernel and the disk do for a simulated node: the operations that its ring asks for. Sockets are real ones that are
//! never waited for; writes of the log take simulated time, and what of them a crash leaves behind is random.
//!
//! A write that has not completed may be on the disk in any part, in sectors, in any order. So may one that has completed but
//! was not flushed, where a flush is a step of its own. Whatever was durable stays, but for faults that are injected.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use walferry_engine::ring::Token;
use walferry_engine::ring::simulated::{Queues, Submission};

const OP_FSYNC: u8 = 3;
const OP_POLL_ADD: u8 = 6;
const OP_WRITE_FIXED: u8 = 5;
const OP_WRITE: u8 = 23;
const OP_SEND: u8 = 26;
const OP_RECEIVE: u8 = 27;
const OP_SEND_ZERO_COPY: u8 = 48;
/// `IORING_CQE_F_MORE`, `IORING_CQE_F_NOTIF`.
const MORE: u32 = 1 << 1;
const NOTIFICATION: u32 = 1 << 3;

/// An operation of the disk by number.
pub type DiskOpNo = u64;

/// A socket, whatever descriptors it has: its inode.
pub type SocketNo = u64;

/// How the disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    pub write_us: u64,
    pub spread_us: u64,
    /// Everything takes so many times as long.
    pub slowness: u64,
    /// No operation of the disk completes before this time.
    pub stalled_until: u64,
    /// The next write or flush fails.
    pub broken: bool,
    /// A crash tears writes into pieces of this size.
    pub sector_bytes: usize,
}

struct Write {
    inode: Rc<Inode>,
    offset: u64,
    bytes: Vec<u8>,
}

impl Write {
    /// What is there now.
    fn before(&self) -> Vec<u8> {
        let mut old = vec![0; self.bytes.len()];
        // What cannot be read is zeros, as in a new file.
        let _ = self.inode.file.read_at(&mut old, self.offset);
        old
    }

    /// Puts these bytes of it where they belong.
    fn put(&self, from: usize, bytes: &[u8]) {
        let written = self.inode.file.write_all_at(bytes, self.offset + from as u64);
        written.expect("the simulator's own disk takes what its nodes write");
    }
}

/// A file with operations under way or unflushed bytes. As in the kernel, it stays although the node may have closed it.
struct Inode {
    number: u64,
    file: File,
}

/// An operation on a socket that waits. As in the kernel, it holds the socket although the node may have closed it, and given its number
/// to another one.
struct SocketOp {
    submission: Submission,
    socket: OwnedFd,
    number: SocketNo,
}

enum DiskOp {
    Write(Submission, Write, Option<Submission>),
    Flush(Submission, Rc<Inode>),
}

/// One node's kernel.
pub struct Kernel {
    queues: Queues,
    disk_ops: BTreeMap<DiskOpNo, DiskOp>,
    last_op: DiskOpNo,
    /// Completed and not flushed, with what was there before.
    volatile: Vec<Write>,
    /// Those of `disk_ops` and `volatile`.
    files: Vec<Rc<Inode>>,
    sockets: Vec<SocketOp>,
    /// Something was sent since the simulator asked last.
    sent: Cell<bool>,
    pub disk: Disk,
    rng: fastrand::Rng,
}

pub fn socket_no(socket: &OwnedFd) -> SocketNo {
    nix::sys::stat::fstat(socket).expect("an open socket").st_ino
}

fn would_block() -> bool {
    io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
}

fn outcome(result: isize) -> i32 {
    if result < 0 { -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { result as i32 }
}

impl Kernel {
    pub fn new(queues: Queues, disk: Disk, seed: u64) -> Kernel {
        let rng = fastrand::Rng::with_seed(seed);
        Kernel {
            queues,
            disk_ops: BTreeMap::new(),
            last_op: 0,
            volatile: Vec::new(),
            files: Vec::new(),
            sockets: Vec::new(),
            sent: Cell::new(false),
            disk,
            rng,
        }
    }

    /// True when the node has completions to take.
    pub fn has_news(&self) -> bool {
        !self.queues.is_quiet()
    }

    /// True when the node sent something since this was asked last.
    pub fn take_sent(&self) -> bool {
        self.sent.take()
    }

    /// True when a crash now could leave a part of a write behind.
    pub fn can_tear(&self) -> bool {
        let in_flight = self.disk_ops.values().filter_map(|op| match op {
            DiskOp::Write(_, write, _) => Some(write),
            DiskOp::Flush(..) => None,
        });
        in_flight.chain(&self.volatile).any(|write| write.bytes.len() > self.disk.sector_bytes)
    }

    fn inode(&mut self, fd: RawFd) -> Rc<Inode> {
        // SAFETY: the node has it open as long as it submits operations on it.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let number = nix::sys::stat::fstat(fd).expect("an open file").st_ino;
        if let Some(inode) = self.files.iter().find(|inode| inode.number == number) {
            return Rc::clone(inode);
        }
        self.files.retain(|inode| Rc::strong_count(inode) > 1);
        let file = File::from(fd.try_clone_to_owned().expect("a descriptor is left"));
        let inode = Rc::new(Inode { number, file });
        self.files.push(Rc::clone(&inode));
        inode
    }

    fn disk_time(&mut self, now_us: u64) -> u64 {
        let Disk { write_us, spread_us, slowness, stalled_until, .. } = self.disk;
        (now_us.max(stalled_until)) + (write_us + self.rng.u64(0..=spread_us)) * slowness
    }

    /// Takes what the node has asked for. Operations of the disk, and when each is done.
    pub fn take_submissions(&mut self, now_us: u64) -> Vec<(u64, DiskOpNo)> {
        let mut begun = Vec::new();
        while let Some(submission) = self.queues.next() {
            let op = match submission.opcode {
                OP_WRITE | OP_WRITE_FIXED => {
                    let address = submission.address as *const u8;
                    // SAFETY: the node keeps the memory until the operation has completed.
                    let bytes = unsafe { std::slice::from_raw_parts(address, submission.bytes as usize) }.to_vec();
                    let write = Write { inode: self.inode(submission.fd), offset: submission.offset, bytes };
                    let flush = if submission.linked { self.queues.next() } else { None };
                    DiskOp::Write(submission, write, flush)
                }
                OP_FSYNC => DiskOp::Flush(submission, self.inode(submission.fd)),
                // Those that wait already go on when something arrives, or makes space.
                _ => {
                    if !self.try_socket(&submission, submission.fd) {
                        // SAFETY: the node has it open: it had nothing for this operation just now.
                        let socket = unsafe { BorrowedFd::borrow_raw(submission.fd) };
                        let socket = socket.try_clone_to_owned().expect("a descriptor is left");
                        let number = socket_no(&socket);
                        self.sockets.push(SocketOp { submission, socket, number });
                    }
                    continue;
                }
            };
            let at = self.disk_time(now_us);
            self.last_op += 1;
            self.disk_ops.insert(self.last_op, op);
            begun.push((at, self.last_op));
        }
        begun
    }

    /// Lets every operation on a socket end that can. Those that receive can where something has `arrived`, and are taken out of it.
    pub fn progress_sockets(&mut self, arrived: &mut BTreeSet<SocketNo>) {
        let mut sockets = std::mem::take(&mut self.sockets);
        sockets.retain(|SocketOp { submission, socket, number }| {
            let may_end = submission.opcode != OP_RECEIVE || arrived.remove(number);
            !(may_end && self.try_socket(submission, socket.as_raw_fd()))
        });
        self.sockets = sockets;
    }

    fn try_socket(&self, submission: &Submission, fd: RawFd) -> bool {
        let Submission { address, bytes, op_flags, token, .. } = *submission;
        let flags = op_flags as i32 | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: memory and descriptors of an operation are the node's to keep until it has completed.
        let result = unsafe {
            match submission.opcode {
                OP_RECEIVE => libc::recv(fd, address as *mut _, bytes as usize, libc::MSG_DONTWAIT),
                OP_SEND => libc::send(fd, address as *const _, bytes as usize, flags),
                OP_SEND_ZERO_COPY => libc::sendmsg(fd, address as *const _, flags),
                OP_POLL_ADD => {
                    let mut poll = libc::pollfd { fd, events: op_flags as i16, revents: 0 };
                    if libc::poll(&mut poll, 1, 0) == 0 {
                        return false;
                    }
                    poll.revents as isize
                }
                other => panic!("a node asks for operation {other}, which is not simulated"),
            }
        };
        if result < 0 && would_block() {
            return false;
        }
        let result = outcome(result);
        self.sent.set(self.sent.get() || [OP_SEND, OP_SEND_ZERO_COPY].contains(&submission.opcode));
        if submission.opcode == OP_SEND_ZERO_COPY {
            self.queues.complete(token, result, MORE);
            self.queues.complete(token, 0, NOTIFICATION);
        } else {
            self.queues.complete(token, result, 0);
        }
        true
    }

    /// An operation of the disk is done; when the next one of its chain will be.
    pub fn finish_disk_op(&mut self, number: DiskOpNo, now_us: u64) -> Option<(u64, DiskOpNo)> {
        if now_us < self.disk.stalled_until {
            // It stalled while this was under way.
            return self.disk_ops.contains_key(&number).then_some((self.disk.stalled_until, number));
        }
        let op = self.disk_ops.remove(&number)?;
        if std::mem::take(&mut self.disk.broken) {
            self.fail(op);
            return None;
        }
        match op {
            DiskOp::Write(submission, write, flush) => {
                let inode = Rc::clone(&write.inode);
                if submission.op_flags & libc::RWF_DSYNC as u32 == 0 {
                    self.volatile.push(Write { bytes: write.before(), inode: Rc::clone(&inode), ..write });
                }
                write.put(0, &write.bytes);
                self.queues.complete(submission.token, submission.bytes as i32, 0);
                let flush = flush?;
                let at = self.disk_time(now_us);
                self.last_op += 1;
                self.disk_ops.insert(self.last_op, DiskOp::Flush(flush, inode));
                Some((at, self.last_op))
            }
            DiskOp::Flush(submission, inode) => {
                // Writes of this file that had completed. Those of others wait for their own.
                self.volatile.retain(|write| !Rc::ptr_eq(&write.inode, &inode));
                self.queues.complete(submission.token, 0, 0);
                None
            }
        }
    }

    fn fail(&mut self, op: DiskOp) {
        match op {
            DiskOp::Write(submission, write, flush) => {
                // Whether anything of it reached the disk, nobody knows.
                self.tear(&write);
                self.queues.complete(submission.token, -libc::EIO, 0);
                if let Some(flush) = flush {
                    self.queues.complete(flush.token, -libc::ECANCELED, 0);
                }
            }
            DiskOp::Flush(submission, inode) => {
                // As Linux does: the pages are clean from now on, whatever of them the disk has.
                let lost: Vec<Write> = self.volatile.extract_if(.., |write| Rc::ptr_eq(&write.inode, &inode)).collect();
                lost.iter().rev().for_each(|write| self.tear(write));
                self.queues.complete(submission.token, -libc::EIO, 0);
            }
        }
    }

    /// Puts some sectors of these bytes where they belong.
    fn tear(&mut self, write: &Write) {
        let share = self.rng.u8(0..=4);
        for (index, sector) in write.bytes.chunks(self.disk.sector_bytes).enumerate() {
            if self.rng.u8(0..4) < share {
                write.put(index * self.disk.sector_bytes, sector);
            }
        }
    }

    /// The power goes: of what was not durable some is there and some is not. Everything in flight ends with an error, so that
    /// the node may be dropped.
    pub fn crash(&mut self) -> Vec<Token> {
        // The newest first: what is taken back was there before the older ones.
        for write in std::mem::take(&mut self.volatile).into_iter().rev() {
            self.tear(&write);
        }
        let ops = std::mem::take(&mut self.disk_ops);
        let mut tokens = Vec::new();
        for op in ops.into_values() {
            match op {
                DiskOp::Write(submission, write, flush) => {
                    self.tear(&write);
                    tokens.push(submission.token);
                    tokens.extend(flush.map(|flush| flush.token));
                }
                DiskOp::Flush(submission, _) => tokens.push(submission.token),
            }
        }
        while let Some(submission) = self.queues.next() {
            tokens.push(submission.token);
        }
        tokens.iter().for_each(|token| self.queues.complete(*token, -libc::ECANCELED, 0));
        self.sockets.clear();
        tokens
    }
}
