//! journald's own protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): an event as one datagram of fields. `tracing-journald` has
//! the same fields, but sends on the thread that logs, which then waits for journald. A field is its name, a line feed, the length
//! of its value as a little-endian u64, the value, a line feed.

use std::fmt::{self, Write};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::logging::queue::{LINE_BYTES_MAX, Queue, Write as WriteLine};

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// What `journalctl -t` finds.
const IDENTIFIER: &str = "walferry";
/// Fields of an event beside its message have this before their name.
const PREFIX: &str = "F_";
/// Of an event with more than a line may have, the value that would be beyond it is cut, and what follows left out.
const FIELD_BYTES_SPARE: usize = 512;

/// Sends datagrams to `socket`; fails where nobody listens.
pub fn writer(socket: &'static Path) -> io::Result<WriteLine> {
    let datagrams = UnixDatagram::unbound()?;
    // journald takes no notice of an empty one.
    datagrams.send_to(&[], socket)?;
    Ok(Box::new(move |line| datagrams.send_to(line, socket).map(|_| ())))
}

/// An event without fields.
pub fn encode(level: Level, text: &str) -> Vec<u8> {
    let mut fields = Fields::of(level);
    fields.put("MESSAGE", text.as_bytes());
    fields.bytes
}

/// Encodes events into a queue.
pub struct Journal {
    pub queue: Arc<Queue>,
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        let mut fields = Fields::of(*meta.level());
        fields.put("TARGET", meta.target().as_bytes());
        if let Some(file) = meta.file() {
            fields.put("CODE_FILE", file.as_bytes());
        }
        if let Some(line) = meta.line() {
            fields.put("CODE_LINE", line.to_string().as_bytes());
        }
        event.record(&mut fields);
        self.queue.put(fields.bytes);
    }
}

struct Fields {
    bytes: Vec<u8>,
    /// Of a value that is not text.
    text: String,
}

impl Fields {
    fn of(level: Level) -> Fields {
        let mut fields = Fields { bytes: Vec::with_capacity(256), text: String::new() };
        let priority = match level {
            Level::ERROR => b"3",
            Level::WARN => b"4",
            Level::INFO => b"5",
            Level::DEBUG => b"6",
            Level::TRACE => b"7",
        };
        fields.put("PRIORITY", priority);
        fields.put("SYSLOG_IDENTIFIER", IDENTIFIER.as_bytes());
        fields
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        let left = LINE_BYTES_MAX.saturating_sub(self.bytes.len() + FIELD_BYTES_SPARE);
        if left == 0 {
            return;
        }
        let value = &value[..value.len().min(left)];
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(b'\n');
        self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.push(b'\n');
    }

    fn record(&mut self, field: &Field, value: &[u8]) {
        if field.name() == "message" {
            return self.put("MESSAGE", value);
        }
        // journald takes capitals, digits and underscores.
        let plain = |letter: char| if letter == '.' { '_' } else { letter.to_ascii_uppercase() };
        let kept = |letter: &char| *letter == '_' || letter.is_ascii_alphanumeric();
        let name: String = PREFIX.chars().chain(field.name().chars().map(plain).filter(kept)).collect();
        self.put(&name, value);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record(field, value.as_bytes());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        // Writing into a String cannot fail; a value that cannot be shown is shown as far as it goes.
        let _ = write!(text, "{value:?}");
        self.record(field, text.as_bytes());
        self.text = text;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The fields of a datagram, as journald reads them.
    fn decode(mut bytes: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while !bytes.is_empty() {
            let name = bytes.iter().position(|byte| *byte == b'\n').expect("a name ends");
            let length = u64::from_le_bytes(bytes[name + 1..name + 9].try_into().expect("8 bytes")) as usize;
            let value = &bytes[name + 9..name + 9 + length];
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            fields.insert(text(&bytes[..name]), text(value));
            assert_eq!(bytes[name + 9 + length], b'\n');
            bytes = &bytes[name + 10 + length..];
        }
        fields
    }

    #[test]
    fn event_is_a_datagram_with_journalds_fields() {
        let dir = tempfile::tempdir().expect("a directory");
        let path: &'static Path = Box::leak(dir.path().join("socket").into_boxed_path());
        assert!(writer(path).is_err(), "nobody listens");
        let journald = UnixDatagram::bind(path).expect("a socket");
        let queue = Queue::start(|_| Vec::new(), writer(path).expect("somebody listens")).expect("a thread");
        let journal = Journal { queue: Arc::clone(&queue) };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            tracing::warn!(lsn = "0/10", slot.name = ?"b", "two\nlines {}", "x".repeat(3));
            tracing::error!(more = 1, "{}", "y".repeat(2 * LINE_BYTES_MAX));
        });
        assert!(queue.flush(Duration::from_secs(60)));
        let mut buffer = vec![0; 2 * LINE_BYTES_MAX];
        let mut next = || {
            let length = journald.recv(&mut buffer).expect("a datagram");
            decode(&buffer[..length])
        };
        assert!(next().is_empty(), "the question whether somebody listens");
        let event = next();
        let expected = [
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "walferry"),
            ("TARGET", module_path!()),
            ("MESSAGE", "two\nlines xxx"),
            ("F_LSN", "0/10"),
            ("F_SLOT_NAME", "\"b\""),
        ];
        for (name, value) in expected {
            assert_eq!(event.get(name).map(String::as_str), Some(value), "{name} of {event:?}");
        }
        let cut = next();
        assert!(cut["MESSAGE"].len() > LINE_BYTES_MAX / 2 && cut["PRIORITY"] == "3", "cut, not lost");
    }
}
