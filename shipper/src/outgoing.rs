//! The write side of a link: what waits for the socket, what the socket has taken, and which way the bytes go. Driver;
//! `sender.rs` decides what comes next. `link.rs` owns it.
//!
//! Frames go by `sendmsg` from the ring thread at once: the bytes are on their way before the loop turns. Only when the
//! socket is full does the ring wait for it. Batches of `zero_copy_bytes_min` and more go by SEND_ZC on the ring.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, types};
use walferry_cluster::message::{ENVELOPE_BYTES, LinkHeartbeat, Message, frame_envelope};
use walferry_engine::buffer::PinId;
use walferry_engine::log::Log;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::ring::{Completion, Ring};
use walferry_engine::waker::Waker;

use crate::batch::{Batch, PartialFrame, Piece};
use crate::catchup::{Catchup, CatchupError, Job, Report, Shared};
use crate::link::{LinkError, LinkNo, Op};
use crate::sender::{Next, Sender, View};
use crate::status::SentBytes;
use crate::traces::Traces;
use crate::transport::Transport;
use crate::zero_copy::{REPORT_USAGE, ZeroCopy, ZeroCopySend};

/// What every link of a shipper is given.
pub(crate) struct Common {
    pub(crate) zero_copy_bytes_min: usize,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) epoch: Epoch,
    /// Nobody else led when this was last looked at, which was after all that has been received.
    pub(crate) leads_alone: bool,
    /// What heartbeats count from.
    pub(crate) origin: Instant,
    pub(crate) reports: mpsc::Sender<Report>,
    pub(crate) waker: Waker,
}

impl Common {
    /// The time in heartbeats; never 0.
    pub(crate) fn clock_us(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.origin).as_micros() as u64 + 1
    }
}

/// The turn of the loop in which something is sent.
pub(crate) struct Turn<'a> {
    pub(crate) log: &'a mut Log,
    pub(crate) ring: &'a mut Ring,
    pub(crate) common: &'a Common,
    pub(crate) view: View,
    pub(crate) traces: &'a Traces,
    pub(crate) now: Instant,
}

/// The write side of a link.
pub(crate) struct Outgoing {
    link: LinkNo,
    /// `None` until the replica was welcomed.
    sender: Option<Sender>,
    /// Messages that wait for the socket.
    control: Vec<u8>,
    /// The frame that ends at the sender's position, while a part of it waits for the socket; pinned.
    partial: Option<(PartialFrame, PinId)>,
    /// The socket is full; the ring tells when it is not.
    polling: bool,
    /// Kept for its allocations.
    batch: Batch,
    zero_copy: ZeroCopy,
    /// Where the SEND_ZC that the socket works on ends in the log.
    offered: Lsn,
    catchup: Option<Catchup>,
    /// The last message waits in `control`, or with the catch-up thread.
    ending: bool,
    /// The connection is gone; what the socket has taken no longer matters.
    closed: bool,
    /// The stamp of the newest acknowledgement; 0 for none.
    stamp_us: u64,
    bytes: SentBytes,
    /// Operations that the ring has not completed for good.
    in_flight: usize,
}

impl Outgoing {
    pub(crate) fn new(link: LinkNo, transport: Transport) -> Outgoing {
        Outgoing {
            link,
            sender: None,
            control: Vec::new(),
            partial: None,
            polling: false,
            batch: Batch::default(),
            zero_copy: ZeroCopy::over(transport),
            offered: Lsn::ZERO,
            catchup: None,
            ending: false,
            closed: false,
            stamp_us: 0,
            bytes: SentBytes::default(),
            in_flight: 0,
        }
    }

    /// The first message, after which the log is streamed from `start`.
    pub(crate) fn begin(&mut self, welcome: &Message, start: Lsn, interval: Duration, now: Instant) {
        welcome.encode(&mut self.control);
        self.sender = Some(Sender::new(start, interval, now));
    }

    /// An acknowledgement came with this stamp.
    pub(crate) fn handle_stamp(&mut self, stamp_us: u64) {
        self.stamp_us = self.stamp_us.max(stamp_us);
    }

    /// What heartbeats return: the replica's state is that fresh once it has what the log holds now.
    fn confirmed_stamp_us(&self, common: &Common) -> u64 {
        if common.leads_alone { self.stamp_us } else { 0 }
    }

    /// True while segment files feed the replica.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.catchup.is_some()
    }

    /// True when nothing of this is known to the kernel or a thread any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.catchup.is_none()
    }

    /// What the replica may acknowledge: everything that was handed to the socket, or is being handed to it.
    pub(crate) fn sent(&self) -> Lsn {
        let hot = self.sender.map_or(Lsn::ZERO, |sender| sender.position());
        let cold = self.catchup.as_ref().map_or(Lsn::ZERO, |catchup| catchup.shared.sent());
        hot.max(cold).max(self.offered)
    }

    /// Bytes sent, by their way.
    pub(crate) fn bytes(&self) -> SentBytes {
        let running = self.catchup.as_ref().map_or(SentBytes::default(), |catchup| catchup.shared.bytes());
        self.bytes.plus(running)
    }

    /// When there is something to send although nothing happens. While the socket takes nothing, that it does again is what
    /// happens next: a time that has passed would only keep the loop turning.
    pub(crate) fn due(&self, committed: Lsn) -> Option<Instant> {
        if self.polling || self.zero_copy.is_sending() {
            return None;
        }
        self.sender.filter(|sender| !sender.is_catching_up()).map(|sender| sender.due(committed))
    }

    /// Sends what there is, until there is nothing or the socket is full.
    pub(crate) fn pump(&mut self, socket: &Arc<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), LinkError> {
        if let Some(catchup) = &self.catchup {
            catchup.shared.publish(&turn.view, self.confirmed_stamp_us(turn.common));
            return Ok(());
        }
        while !self.polling && !self.zero_copy.is_sending() {
            let next = match &mut self.sender {
                Some(sender) if !self.ending => sender.next(&turn.view, self.partial.is_some(), turn.now),
                _ => Next::Nothing,
            };
            let mut until = Lsn::ZERO;
            match next {
                Next::CatchUp => return self.catch_up(socket, turn),
                Next::Nothing if self.control.is_empty() && self.partial.is_none() => return Ok(()),
                Next::Nothing => {}
                Next::Send { heartbeat, frames } => {
                    if heartbeat && self.control.is_empty() {
                        self.put_heartbeat(turn);
                    }
                    if frames {
                        until = turn.view.sealed;
                    }
                }
            }
            let (rest, control) = (self.partial.map(|(frame, _)| frame), std::mem::take(&mut self.control));
            let position = self.sender.map_or(Lsn::ZERO, |sender| sender.position());
            self.batch.gather(turn.log, rest, control, position, until, turn.traces);
            if self.batch.bytes() >= turn.common.zero_copy_bytes_min
                && let Some(place) = self.zero_copy.place()
            {
                self.send_zero_copy(place, socket, turn);
                return Ok(());
            }
            self.send_copy(socket, turn)?;
        }
        Ok(())
    }

    fn put_heartbeat(&mut self, turn: &Turn<'_>) {
        let View { sealed: end, flushed, committed, .. } = turn.view;
        let (sent_at_us, epoch) = (turn.common.clock_us(turn.now), turn.common.epoch);
        let stamp_us = self.confirmed_stamp_us(turn.common);
        Message::LinkHeartbeat(LinkHeartbeat { end, flushed, committed, sent_at_us, epoch, stamp_us })
            .encode(&mut self.control);
        let sender = self.sender.as_mut().expect("only the welcomed are sent heartbeats");
        sender.heartbeat_sent(flushed, committed, turn.now);
    }

    fn send_copy(&mut self, socket: &OwnedFd, turn: &mut Turn<'_>) -> io::Result<()> {
        let header = self.batch.header();
        // SAFETY: the header points to the batch's vectors, those to memory that stays as it is during the call.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        let sent = match usize::try_from(sent) {
            Ok(sent) => sent,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => 0,
                error if error.kind() == io::ErrorKind::Interrupted => 0,
                error => return Err(error),
            },
        };
        self.bytes.copy += sent as u64;
        let batch = std::mem::take(&mut self.batch);
        self.account(&batch.pieces, &batch.control, sent, turn.log);
        if sent < batch.bytes() {
            self.polling = true;
            self.in_flight += 1;
            let poll = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), libc::POLLOUT as u32).build();
            // SAFETY: a poll names no memory, and the kernel holds the file while it lasts.
            unsafe { turn.ring.push(poll.user_data(Op::Writable.token(self.link))) };
        }
        self.batch = batch;
        Ok(())
    }

    fn send_zero_copy(&mut self, place: usize, socket: &OwnedFd, turn: &mut Turn<'_>) {
        let batch = std::mem::take(&mut self.batch);
        let pin = batch.oldest().map(|lsn| turn.log.pin(lsn));
        self.offered = batch.end().unwrap_or(self.offered);
        let send = self.zero_copy.put(place, ZeroCopySend::new(batch, pin));
        let entry = opcode::SendMsgZc::new(types::Fd(socket.as_raw_fd()), send.header())
            .ioprio(REPORT_USAGE)
            .flags(libc::MSG_NOSIGNAL as u32)
            .build();
        self.in_flight += 1;
        // SAFETY: the box lives until the notification, its frames are pinned until then; the socket is closed only
        // after entries have reached the kernel.
        unsafe { turn.ring.push(entry.user_data(Op::Send(place).token(self.link))) };
    }

    /// Moves on by what the socket has taken of a batch.
    fn account(&mut self, pieces: &[Piece], control: &[u8], mut sent: usize, log: &mut Log) {
        for piece in pieces {
            let total = match piece {
                Piece::Rest(frame) | Piece::Frame { frame, .. } => frame.left_bytes(),
                Piece::Control => control.len(),
            };
            let taken = sent.min(total);
            sent -= taken;
            match *piece {
                Piece::Control => drop(self.control.splice(0..0, control[taken..].iter().copied())),
                Piece::Rest(frame) => {
                    let (_, pin) = self.partial.expect("the rest of something");
                    let sent_bytes = frame.sent_bytes + taken;
                    self.partial = (taken < total).then_some((PartialFrame { sent_bytes, ..frame }, pin));
                    if taken == total {
                        log.unpin(pin);
                    }
                }
                Piece::Frame { frame, end, flushed, committed } if taken > 0 => {
                    let sender = self.sender.as_mut().expect("only the welcomed are sent frames");
                    sender.frame_sent(end, (flushed, committed));
                    if taken < total {
                        let part = PartialFrame { sent_bytes: taken, ..frame };
                        self.partial = Some((part, log.pin(frame.lsn)));
                    }
                }
                Piece::Frame { .. } => {}
            }
        }
        assert_eq!(sent, 0, "the socket took more than it was given");
    }

    /// The socket can take more.
    pub(crate) fn handle_writable(&mut self) {
        self.in_flight -= 1;
        self.polling = false;
    }

    /// A SEND_ZC or its notification completed.
    pub(crate) fn handle_send(&mut self, place: usize, completion: &Completion, log: &mut Log) -> io::Result<()> {
        if cqueue::notif(completion.flags) {
            self.in_flight -= 1;
            self.finish_zero_copy(place, Some(completion.result), log);
            return Ok(());
        }
        let outcome = completion.outcome();
        let bytes = *outcome.as_ref().unwrap_or(&0) as usize;
        let batch = self.zero_copy.sent(place, bytes as u64);
        // The kernel reads the control bytes until the notification: they stay where they are.
        let (pieces, control) = (std::mem::take(&mut batch.pieces), batch.control.clone());
        if !self.closed {
            self.account(&pieces, &control, bytes, log);
        }
        self.offered = Lsn::ZERO;
        if !cqueue::more(completion.flags) {
            self.in_flight -= 1;
            self.finish_zero_copy(place, None, log);
        }
        match outcome {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    fn finish_zero_copy(&mut self, place: usize, usage: Option<i32>, log: &mut Log) {
        match self.zero_copy.finish(place, usage, log) {
            (bytes, true) => self.bytes.copy += bytes,
            (bytes, false) => self.bytes.zero_copy += bytes,
        }
    }

    /// Gives the socket to a thread that feeds the replica from segment files.
    fn catch_up(&mut self, socket: &Arc<OwnedFd>, turn: &mut Turn<'_>) -> Result<(), LinkError> {
        let sender = self.sender.as_mut().expect("only the welcomed are sent anything");
        sender.catch_up_began();
        let (mut envelope_rest, mut frame_rest) = (Vec::new(), None);
        if let Some((frame, pin)) = self.partial.take() {
            turn.log.unpin(pin);
            let of_envelope = frame.sent_bytes.min(ENVELOPE_BYTES);
            envelope_rest.extend_from_slice(&frame_envelope(frame.wire_bytes, frame.traced)[of_envelope..]);
            let of_frame = (frame.sent_bytes - of_envelope) as u64;
            frame_rest = Some((frame.lsn.advance(of_frame), frame.wire_bytes as u64 - of_frame));
        }
        let job = Job {
            link: self.link,
            socket: Arc::clone(socket),
            envelope_rest,
            frame_rest,
            messages: std::mem::take(&mut self.control),
            from: sender.position(),
            log_dir: turn.log.log_dir().to_owned(),
            segment_bytes: turn.log.config().segment_bytes,
            epoch: turn.common.epoch,
            origin: turn.common.origin,
            shared: Arc::new(Shared::default()),
            reports: turn.common.reports.clone(),
            waker: turn.common.waker.clone(),
        };
        self.catchup = Some(Catchup::start(job, &turn.view, self.confirmed_stamp_us(turn.common))?);
        Ok(())
    }

    /// The catch-up thread is done; the position from which memory goes on.
    pub(crate) fn caught_up(&mut self, outcome: Result<Lsn, CatchupError>, now: Instant) -> Result<Lsn, CatchupError> {
        if let Some(catchup) = self.catchup.take() {
            self.bytes = self.bytes.plus(catchup.shared.bytes());
            catchup.join();
        }
        let position = outcome?;
        let sender = self.sender.as_mut().expect("only the welcomed catch up");
        sender.catch_up_ended(position, now);
        Ok(position)
    }

    /// The last message on this connection: it goes after what the socket has begun to take, and nothing follows it.
    pub(crate) fn send_last(&mut self, last_message: Vec<u8>) {
        self.ending = true;
        match &self.catchup {
            Some(catchup) => catchup.shared.stop(last_message),
            None => self.control.extend_from_slice(&last_message),
        }
    }

    /// The last message is on its way, and nothing else is left to send.
    pub(crate) fn has_ended(&self) -> bool {
        let pending = self.partial.is_some() || !self.control.is_empty() || self.zero_copy.is_sending();
        self.ending && !pending && self.catchup.is_none()
    }

    /// Gives up what the log buffer keeps for this link, if `pin` is part of it: the rest of a frame can come from
    /// the file. False when the connection has to go for that.
    pub(crate) fn give_way(&mut self, socket: &Arc<OwnedFd>, turn: &mut Turn<'_>) -> Result<bool, LinkError> {
        let position = self.sender.map_or(Lsn::ZERO, |sender| sender.position());
        let stuck = self.ending || position > turn.view.flushed || self.zero_copy.is_sending();
        if self.partial.is_none() || stuck {
            return Ok(false);
        }
        self.catch_up(socket, turn).map(|()| true)
    }

    /// True when the pin is one of this link's.
    pub(crate) fn holds(&self, pin: PinId) -> bool {
        self.partial.is_some_and(|(_, own)| own == pin) || self.zero_copy.holds(pin)
    }

    /// The connection is gone: gives every pin back, and stops the catch-up thread, whose report will find nobody.
    pub(crate) fn close(&mut self, log: &mut Log) {
        self.closed = true;
        if let Some((_, pin)) = self.partial.take() {
            log.unpin(pin);
        }
        self.zero_copy.unpin_all(log);
        if let Some(catchup) = self.catchup.take() {
            catchup.shared.stop(Vec::new());
            self.bytes = self.bytes.plus(catchup.shared.bytes());
        }
    }

    /// Never frees what the kernel may still read: its completions will find nobody.
    pub(crate) fn leak(&mut self) {
        self.zero_copy.leak();
    }
}
