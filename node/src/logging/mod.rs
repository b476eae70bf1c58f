//! Where the node's log lines go: to journald when systemd started it with its journal as stderr, else to stderr. Started once by
//! `start` and `witness`; everything else only uses `tracing`. Whoever logs never waits for a reader (`queue`).

mod journal;
mod queue;

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use self::queue::{LINE_BYTES_MAX, Queue};

/// The end of the process waits so long for a reader to take the last lines.
const LAST_LINES_TIME_MAX: Duration = Duration::from_secs(2);

/// Where lines go, once logging has started.
struct Output {
    queue: Arc<Queue>,
    encode: fn(Level, &str) -> Vec<u8>,
}

static OUTPUT: OnceLock<Output> = OnceLock::new();

/// Why logging does not start.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `log_filter` is not a filter.
    #[error(
        "log_filter = {filter:?}: {source}; choose error, warn, info, debug or trace, or per module `info,walferry_engine=debug`"
    )]
    Filter {
        /// The configured value.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The thread that writes log lines cannot be started.
    #[error("cannot start logging: {0}")]
    Thread(#[from] io::Error),
    /// Logging has been started before.
    #[error("cannot start logging: {0}")]
    Started(#[from] tracing_subscriber::util::TryInitError),
}

/// Starts logging what `filter` lets through.
pub fn start(filter: &str) -> Result<(), LoggingError> {
    // The engine of the register tells of each of its votes; what matters of them the node says itself.
    let quiet = if filter.contains("openraft") { String::new() } else { ",openraft=off".to_owned() };
    let parsed = EnvFilter::builder()
        .parse(format!("{filter}{quiet}"))
        .map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })?;
    let journal = if stderr_is_the_journal() { journal::writer(Path::new(journal::SOCKET)).ok() } else { None };
    let encode = if journal.is_some() { journal::encode } else { encode_line };
    let note = if journal.is_some() { journal_note } else { line_note };
    let (to_journal, write) = (journal.is_some(), journal.unwrap_or_else(|| Box::new(write_to_stderr)));
    let queue = Queue::start(note, write)?;
    let registry = tracing_subscriber::registry().with(parsed);
    let started = if to_journal {
        registry.with(journal::Journal { queue: Arc::clone(&queue) }).try_init()
    } else {
        let colors = io::stderr().is_terminal();
        let lines = Lines(Arc::clone(&queue));
        registry.with(tracing_subscriber::fmt::layer().with_writer(lines).with_ansi(colors)).try_init()
    };
    started?;
    // Logging starts once a process.
    let _ = OUTPUT.set(Output { queue, encode });
    Ok(())
}

/// Puts the last words of the process behind its log; false when it has none and stderr is free.
pub fn tell_last(text: &str) -> bool {
    let Some(output) = OUTPUT.get() else { return false };
    output.queue.put((output.encode)(Level::ERROR, text));
    true
}

/// Waits for a reader to take what was logged, for a bounded time.
pub fn finish() {
    if let Some(output) = OUTPUT.get() {
        output.queue.flush(LAST_LINES_TIME_MAX);
    }
}

/// Lines that were lost, since nobody read the log or it could not be written.
pub fn lost_lines() -> u64 {
    OUTPUT.get().map_or(0, |output| output.queue.lost())
}

fn encode_line(_: Level, text: &str) -> Vec<u8> {
    format!("{text}\n").into_bytes()
}

fn note(lost: u64) -> String {
    format!(
        "{lost} lines of this log are missing here: whoever reads it was too slow, and the node does not wait for that"
    )
}

fn line_note(lost: u64) -> Vec<u8> {
    encode_line(Level::WARN, &format!("walferry: {}", note(lost)))
}

fn journal_note(lost: u64) -> Vec<u8> {
    journal::encode(Level::WARN, &note(lost))
}

/// Whether systemd connected stderr to its journal: `JOURNAL_STREAM` then names stderr's device and inode. The variable alone is
/// inherited by children whose stderr goes elsewhere.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Some((device, inode)) = stream.split_once(':') else { return false };
    let Ok(stderr) = nix::sys::stat::fstat(io::stderr().as_fd()) else { return false };
    (device.parse(), inode.parse()) == (Ok(stderr.st_dev), Ok(stderr.st_ino))
}

/// Not by way of the library's lock: a panic's message must not wait for a line that nobody takes.
fn write_to_stderr(mut line: &[u8]) -> io::Result<()> {
    let stderr = io::stderr();
    while !line.is_empty() {
        match nix::unistd::write(&stderr, line) {
            Ok(written) => line = &line[written..],
            Err(Errno::EINTR) => {}
            // Somebody else who has this pipe or terminal made it so.
            Err(Errno::EAGAIN) => {
                poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Makes a line of each event that is written at once, as the formatter of `tracing` does.
struct Lines(Arc<Queue>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Queue;

    fn make_writer(&'a self) -> &'a Queue {
        &self.0
    }
}

impl io::Write for &Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut kept = line[..line.len().min(LINE_BYTES_MAX)].to_vec();
        if kept.len() < line.len() {
            kept.extend_from_slice(b"...\n");
        }
        self.put(kept);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
