//! One SEND_ZC on the ring: what it owns until the kernel needs it no more, and whether it is worth its while. The
//! kernel reads the frames from the log buffer until the notification comes, so the batch keeps them pinned.
//! Used by `link.rs`.

use walferry_engine::buffer::PinId;
use walferry_engine::log::Log;

use crate::batch::Batch;
use crate::transport::Transport;

/// Sends of one link that the kernel may still read from; beyond it frames are copied.
pub(crate) const ZERO_COPY_SENDS_MAX: usize = 32;
/// When the kernel reports this often in a row that it copied after all, the link stops asking: the bookkeeping costs,
/// and gains nothing (loopback, devices without scatter-gather).
const COPIED_REPORTS_MAX: u32 = 8;
/// In a notification's result: the kernel had to copy (IORING_NOTIF_USAGE_ZC_COPIED).
const USAGE_COPIED: u32 = 1 << 31;
/// Ask for that report (IORING_SEND_ZC_REPORT_USAGE).
pub(crate) const REPORT_USAGE: u16 = 1 << 3;

/// A send, from submission to notification. Boxed: the kernel has its address.
pub(crate) struct ZeroCopySend {
    header: libc::msghdr,
    pub(crate) batch: Batch,
    pin: Option<PinId>,
    /// Bytes that the socket took.
    bytes: u64,
    /// The send itself has completed; its notification may still come.
    sent: bool,
}

impl ZeroCopySend {
    pub(crate) fn new(mut batch: Batch, pin: Option<PinId>) -> Box<ZeroCopySend> {
        let header = batch.header();
        Box::new(ZeroCopySend { header, batch, pin, bytes: 0, sent: false })
    }

    /// For the entry; stays valid as long as the box.
    pub(crate) fn header(&self) -> *const libc::msghdr {
        &raw const self.header
    }
}

/// The zero-copy sends of a link.
#[derive(Default)]
pub(crate) struct ZeroCopy {
    sends: [Option<Box<ZeroCopySend>>; ZERO_COPY_SENDS_MAX],
    /// Reports in a row that the kernel copied.
    copied_reports: u32,
    /// The socket knows no SEND_ZC.
    missing: bool,
}

impl ZeroCopy {
    pub(crate) fn over(transport: Transport) -> ZeroCopy {
        ZeroCopy { missing: transport != Transport::Plain, ..ZeroCopy::default() }
    }

    /// A free place for a send, if zero copy is worth trying.
    pub(crate) fn place(&self) -> Option<usize> {
        let worthwhile = !self.missing && self.copied_reports < COPIED_REPORTS_MAX;
        worthwhile.then(|| self.sends.iter().position(Option::is_none)).flatten()
    }

    pub(crate) fn put(&mut self, place: usize, send: Box<ZeroCopySend>) -> &ZeroCopySend {
        self.sends[place].insert(send)
    }

    /// True while the socket works on a send: nothing else may be sent before it.
    pub(crate) fn is_sending(&self) -> bool {
        self.sends.iter().flatten().any(|send| !send.sent)
    }

    /// The send completed and the socket took `bytes`. Gives its batch, for accounting.
    pub(crate) fn sent(&mut self, place: usize, bytes: u64) -> &mut Batch {
        let send = self.sends[place].as_mut().expect("a completion that nobody waits for");
        assert!(!send.sent, "a send completed twice");
        (send.sent, send.bytes) = (true, bytes);
        &mut send.batch
    }

    /// The kernel needs the send no more: its bytes, and whether they were copied. `usage` is the notification's
    /// result; none comes for a send that failed.
    pub(crate) fn finish(&mut self, place: usize, usage: Option<i32>, log: &mut Log) -> (u64, bool) {
        let send = self.sends[place].take().expect("a notification that nobody waits for");
        if let Some(pin) = send.pin {
            log.unpin(pin);
        }
        let copied = usage.is_none_or(|usage| usage as u32 & USAGE_COPIED != 0);
        if usage.is_some() {
            self.copied_reports = if copied { self.copied_reports + 1 } else { 0 };
        }
        (send.bytes, copied)
    }

    /// The pin of a send is the one that keeps the log from going on.
    pub(crate) fn holds(&self, pin: PinId) -> bool {
        self.sends.iter().flatten().any(|send| send.pin == Some(pin))
    }

    /// The socket was reset and the log must go on: the pins are given back although the kernel may still look at the
    /// memory. What it reads there goes nowhere.
    pub(crate) fn unpin_all(&mut self, log: &mut Log) {
        for send in self.sends.iter_mut().flatten() {
            if let Some(pin) = send.pin.take() {
                log.unpin(pin);
            }
        }
    }

    /// The sends in flight, never to be freed: their completions will find nobody.
    pub(crate) fn leak(&mut self) {
        self.sends.iter_mut().filter_map(Option::take).for_each(std::mem::forget);
    }
}
