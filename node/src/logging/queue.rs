//! Lines on their way to whoever reads the log. Bounded: whoever logs never waits, and a line that does not fit is lost and counted.
//! A thread of its own writes them, in order, and is the only one that waits for the reader. Knows nothing of what a line says.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow};

/// All lines that wait together.
pub const QUEUE_BYTES_MAX: usize = 256 << 10;
/// One line; what a longer one has beyond this is cut off.
pub const LINE_BYTES_MAX: usize = 32 << 10;
const _: () = assert!(2 * LINE_BYTES_MAX <= QUEUE_BYTES_MAX);

/// Writes a line out; may take as long as it likes.
pub type Write = Box<dyn FnMut(&[u8]) -> io::Result<()> + Send>;

/// What waits, and what became of the rest.
#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    /// Of `lines`; `bytes <= QUEUE_BYTES_MAX`, but for a note that is alone.
    bytes: usize,
    /// Lost since the log was told how many were.
    untold: u64,
    /// The thread writes a line right now.
    writing: bool,
}

/// The lines; shared by whoever logs and the thread that writes.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    lost: AtomicU64,
    /// The line that tells how many were lost.
    note: fn(u64) -> Vec<u8>,
}

impl Queue {
    /// Starts the thread.
    pub fn start(note: fn(u64) -> Vec<u8>, write: Write) -> io::Result<Arc<Queue>> {
        let queue = Arc::new(Queue { state: Mutex::default(), changed: Condvar::new(), lost: AtomicU64::new(0), note });
        let here = Arc::clone(&queue);
        // Signals are for the threads that ask for them: whoever blocks them later does so for its own threads only.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = std::thread::Builder::new().name("log-output".to_owned()).spawn(move || here.run(write));
        before.thread_set_mask()?;
        started.map(|_| queue)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line, or counts it as lost. Never waits for the reader.
    pub fn put(&self, line: Vec<u8>) {
        let mut state = self.state();
        let note_bytes = if state.untold > 0 { (self.note)(state.untold).len() } else { 0 };
        if state.bytes + note_bytes + line.len() > QUEUE_BYTES_MAX {
            state.untold += 1;
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.add_note(&mut state);
        state.bytes += line.len();
        state.lines.push_back(line);
        drop(state);
        self.changed.notify_all();
    }

    /// Tells in its place how many lines are missing.
    fn add_note(&self, state: &mut State) {
        if state.untold > 0 {
            let note = (self.note)(std::mem::take(&mut state.untold));
            state.bytes += note.len();
            state.lines.push_back(note);
        }
    }

    /// Lines that nobody will read.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until everything is written, so long at most; true when it is.
    pub fn flush(&self, time_max: Duration) -> bool {
        let waits = |state: &mut State| state.writing || state.untold > 0 || !state.lines.is_empty();
        let waited = self.changed.wait_timeout_while(self.state(), time_max, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn run(&self, mut write: Write) {
        loop {
            let line = self.next();
            if write(&line).is_err() {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            self.state().writing = false;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if state.lines.is_empty() {
                self.add_note(&mut state);
            }
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.writing = true;
                return line;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A reader that takes a line for each permit that it is given.
    fn slow_reader() -> (Arc<Queue>, Sender<()>, Receiver<String>) {
        let ((permit, permits), (written, lines)) = (channel(), channel());
        let write = move |line: &[u8]| {
            let _ = permits.recv();
            let _ = written.send(String::from_utf8_lossy(line).into_owned());
            Ok(())
        };
        let queue = Queue::start(|lost| format!("{lost} lost").into_bytes(), Box::new(write)).expect("a thread");
        (queue, permit, lines)
    }

    #[test]
    fn lines_beyond_the_bound_are_lost_counted_and_told() {
        let (queue, permit, lines) = slow_reader();
        const LINES: usize = 1000;
        queue.put(b"first".to_vec());
        while !queue.state().writing {
            std::thread::yield_now();
        }
        for number in 0..LINES {
            queue.put(format!("{number:>1024}").into_bytes());
            assert!(queue.state().bytes <= QUEUE_BYTES_MAX);
        }
        let kept = QUEUE_BYTES_MAX / 1024;
        let lost = LINES - kept;
        assert_eq!(queue.lost(), lost as u64);
        drop(permit);
        assert!(queue.flush(Duration::from_secs(60)));
        queue.put(b"after".to_vec());
        assert!(queue.flush(Duration::from_secs(60)));
        let read: Vec<String> = lines.try_iter().map(|line| line.trim_start().to_owned()).collect();
        let mut expected = vec!["first".to_owned()];
        expected.extend((0..kept).map(|number| number.to_string()));
        expected.extend([format!("{lost} lost"), "after".to_owned()]);
        assert_eq!(read, expected, "in order, and a line says what is missing where it is missing");
    }

    #[test]
    fn flush_waits_for_a_reader_that_reads_and_for_no_other() {
        let (queue, permit, lines) = slow_reader();
        queue.put(b"one".to_vec());
        queue.put(b"two".to_vec());
        assert!(!queue.flush(Duration::from_millis(20)));
        permit.send(()).expect("the thread runs");
        permit.send(()).expect("the thread runs");
        assert!(queue.flush(Duration::from_secs(60)));
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(queue.lost(), 0);
    }

    #[test]
    fn line_that_cannot_be_written_is_counted() {
        let queue =
            Queue::start(|_| Vec::new(), Box::new(|_| Err(io::ErrorKind::BrokenPipe.into()))).expect("a thread");
        queue.put(b"one".to_vec());
        assert!(queue.flush(Duration::from_secs(60)));
        assert_eq!(queue.lost(), 1);
    }
}
