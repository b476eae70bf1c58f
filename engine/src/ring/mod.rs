//! The one io_uring of a node: the log, the sockets, the waker and the timers all complete here. The thread that
//! makes the ring is the only one that may use it. It moves entries in and completions out, and knows neither files
//! nor sockets: whoever pushes an entry owns its buffer and its descriptor until the completion is dispatched.

#[cfg(feature = "simulation")]
pub mod simulated;

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::{IoUring, squeue, types};

/// Completion queue entries for each submission queue entry: multishot receives and zero-copy notifications
/// complete more than once.
const COMPLETIONS_PER_ENTRY: u32 = 4;
/// The most submission entries that a ring is made with.
pub const RING_ENTRIES_MAX: u32 = 4096;
/// Bits of a token that carry the owner's own number.
const TOKEN_ID_BITS: u32 = 56;

/// The part of a node that a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Owner {
    /// Writes and flushes of the log.
    Log = 1,
    /// Client connections.
    Client = 2,
    /// Connections between nodes.
    Peer = 3,
    /// The eventfd by which other threads wake the ring.
    Wake = 4,
    /// Listening sockets.
    Accept = 6,
}

/// Names an operation on the ring: its owner, and the owner's own number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    /// The token of operation `id` of `owner`; `id` has at most 56 bits.
    pub const fn new(owner: Owner, id: u64) -> Token {
        assert!(id >> TOKEN_ID_BITS == 0);
        Token((owner as u64) << TOKEN_ID_BITS | id)
    }

    /// Whose operation this is.
    ///
    /// # Panics
    /// When the number did not come from [`Token::new`].
    pub fn owner(self) -> Owner {
        match self.0 >> TOKEN_ID_BITS {
            1 => Owner::Log,
            2 => Owner::Client,
            3 => Owner::Peer,
            4 => Owner::Wake,
            6 => Owner::Accept,
            other => panic!("a completion names owner {other}, which nobody is"),
        }
    }

    /// The owner's number for the operation.
    pub const fn id(self) -> u64 {
        self.0 & ((1 << TOKEN_ID_BITS) - 1)
    }
}

/// For an entry's `user_data`.
impl From<Token> for u64 {
    fn from(token: Token) -> u64 {
        token.0
    }
}

/// What became of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Which operation.
    pub token: Token,
    /// Bytes or a descriptor, or a negated errno.
    pub result: i32,
    /// The kernel's flags, for `io_uring::cqueue::{more, notif, buffer_select}`.
    pub flags: u32,
}

impl Completion {
    /// The result with a negated errno turned into an error.
    pub fn outcome(&self) -> io::Result<u32> {
        u32::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel was built without it, or is too old.
    #[error("this kernel has no io_uring: walferry needs Linux 5.19 or newer, built with CONFIG_IO_URING")]
    Missing,
    /// `kernel.io_uring_disabled` or a seccomp filter forbids it.
    #[error("io_uring is forbidden here (kernel.io_uring_disabled = {setting}): {remedy}")]
    Forbidden {
        /// What the sysctl says now.
        setting: String,
        /// Which setting to change.
        remedy: &'static str,
    },
    /// The locked-memory limit is too small.
    #[error(
        "no memory for an io_uring of {entries} entries: raise RLIMIT_MEMLOCK (`ulimit -l`, LimitMEMLOCK= in the unit)"
    )]
    Memory {
        /// How large it should have been.
        entries: u32,
    },
    /// The kernel has io_uring, but without what the ring relies on.
    #[error("this kernel's io_uring lacks {0}: walferry needs Linux 5.19 or newer")]
    Feature(&'static str),
    /// Anything else.
    #[error("cannot set up io_uring: {0}")]
    Other(#[source] io::Error),
}

impl RingError {
    fn new(error: io::Error, entries: u32) -> RingError {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => RingError::Missing,
            Some(libc::EPERM | libc::EACCES) => {
                let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                    .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
                let remedy = match setting.as_str() {
                    "1" => "set kernel.io_uring_disabled = 0, or put walferry's group into kernel.io_uring_group",
                    "2" => "set kernel.io_uring_disabled = 0 (sysctl -w kernel.io_uring_disabled=0)",
                    _ => "a seccomp filter or container policy blocks io_uring_setup; allow it",
                };
                RingError::Forbidden { setting, remedy }
            }
            Some(libc::ENOMEM) => RingError::Memory { entries },
            _ => RingError::Other(error),
        }
    }
}

/// The ring. Not `Send`: the kernel knows the thread that made it as its single issuer.
pub struct Ring {
    uring: IoUring,
    /// Where entries go instead of the kernel.
    #[cfg(feature = "simulation")]
    simulated: Option<simulated::Queues>,
    /// Completions taken out early to free places in the kernel's queue; handed out before newer ones.
    reaped: VecDeque<Completion>,
    one_thread: PhantomData<*const ()>,
}

impl Ring {
    /// A ring of `entries` submission entries (rounded up to a power of two by the kernel) for the calling thread.
    pub fn new(entries: u32) -> Result<Ring, RingError> {
        let entries = entries.clamp(8, RING_ENTRIES_MAX);
        let uring = match Ring::build(entries, true) {
            // SINGLE_ISSUER | DEFER_TASKRUN came with Linux 6.1; before it, COOP_TASKRUN is the next best.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ring::build(entries, false),
            built => built,
        }
        .map_err(|error| RingError::new(error, entries))?;
        if !uring.params().is_feature_nodrop() {
            return Err(RingError::Feature("IORING_FEAT_NODROP"));
        }
        if !uring.params().is_feature_ext_arg() {
            return Err(RingError::Feature("IORING_FEAT_EXT_ARG"));
        }
        Ok(Ring {
            uring,
            #[cfg(feature = "simulation")]
            simulated: None,
            reaped: VecDeque::new(),
            one_thread: PhantomData,
        })
    }

    fn build(entries: u32, deferred: bool) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_submit_all().setup_cqsize(entries * COMPLETIONS_PER_ENTRY);
        if deferred {
            builder.setup_single_issuer().setup_defer_taskrun();
        } else {
            builder.setup_coop_taskrun();
        }
        builder.build(entries)
    }

    /// Queues `entry`; it reaches the kernel with the next submit, or at once when the queue is full.
    ///
    /// # Safety
    /// Buffers and descriptors that the entry names live until its last completion is dispatched.
    pub unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise.
        unsafe { self.push_chain(&[entry]) }
    }

    /// Queues entries that are linked to each other: they must reach the kernel in one submission.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    pub unsafe fn push_chain(&mut self, entries: &[squeue::Entry]) {
        #[cfg(feature = "simulation")]
        if let Some(queues) = &self.simulated {
            return queues.push(entries);
        }
        assert!(entries.len() <= self.uring.params().sq_entries() as usize);
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.uring.submission().push_multiple(entries) }.is_ok() {
                return;
            }
            if let Err(error) = self.submit() {
                panic!("io_uring refuses submissions: {error}");
            }
        }
    }

    /// Hands every queued entry to the kernel without waiting.
    pub fn submit(&mut self) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        if self.simulated.is_some() {
            return Ok(());
        }
        let result = self.uring.submit();
        self.take_result(result)
    }

    /// Hands every queued entry to the kernel and waits for at least one completion, at most `timeout`.
    /// A timeout or a signal is no error: there are just no completions.
    pub fn submit_and_wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        assert!(self.simulated.is_none(), "a simulated node is never waited for");
        if !self.reaped.is_empty() {
            return self.submit();
        }
        let result = match timeout {
            None => self.uring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timespec);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        self.take_result(result)
    }

    fn take_result(&mut self, result: io::Result<usize>) -> io::Result<()> {
        let Err(error) = result else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR) => Ok(()),
            // The completion queue overflowed, or the kernel has no memory for a request: completions free some.
            Some(libc::EBUSY | libc::EAGAIN) => {
                self.reap();
                Ok(())
            }
            _ => Err(error),
        }
    }

    fn reap(&mut self) {
        let reaped = &mut self.reaped;
        reaped.extend(self.uring.completion().map(|entry| Completion {
            token: Token(entry.user_data()),
            result: entry.result(),
            flags: entry.flags(),
        }));
    }

    /// Appends to `out` what has completed, in order.
    pub fn completions(&mut self, out: &mut Vec<Completion>) {
        #[cfg(feature = "simulation")]
        if let Some(queues) = &self.simulated {
            return queues.take_completions(out);
        }
        out.extend(self.reaped.drain(..));
        out.extend(self.uring.completion().map(|entry| Completion {
            token: Token(entry.user_data()),
            result: entry.result(),
            flags: entry.flags(),
        }));
    }

    /// Registers fixed buffers; entries name them by index. Saves pinning their pages for every operation.
    ///
    /// # Safety
    /// The memory lives until [`Ring::unregister_buffers`] or the end of the ring.
    pub unsafe fn register_buffers(&mut self, buffers: &[libc::iovec]) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        if self.simulated.is_some() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.uring.submitter().register_buffers(buffers) }
    }

    /// Gives the fixed buffers back; none of them may be in use by an operation.
    pub fn unregister_buffers(&mut self) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        if self.simulated.is_some() {
            return Ok(());
        }
        self.uring.submitter().unregister_buffers()
    }

    /// Makes a table of `count` fixed file slots, all empty.
    pub fn register_files_sparse(&mut self, count: u32) -> io::Result<()> {
        self.uring.submitter().register_files_sparse(count)
    }

    /// Puts descriptors (or -1 for none) into the fixed file slots from `slot` on.
    pub fn register_files_update(&mut self, slot: u32, files: &[RawFd]) -> io::Result<()> {
        self.uring.submitter().register_files_update(slot, files).map(|_| ())
    }

    /// The ring's own interface, for rare registrations that have no method here (provided-buffer rings, say).
    pub fn submitter(&self) -> io_uring::Submitter<'_> {
        self.uring.submitter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::opcode;

    #[test]
    fn a_token_keeps_owner_and_id() {
        for owner in [Owner::Log, Owner::Client, Owner::Peer, Owner::Wake, Owner::Accept] {
            for id in [0, 1, (1 << TOKEN_ID_BITS) - 1] {
                let token = Token::new(owner, id);
                assert_eq!((token.owner(), token.id()), (owner, id));
            }
        }
    }

    #[test]
    fn more_entries_than_the_queue_holds_all_complete() {
        let mut ring = Ring::new(8).expect("io_uring");
        let count = 8 * COMPLETIONS_PER_ENTRY as u64 * 3;
        for id in 0..count {
            let entry = opcode::Nop::new().build().user_data(Token::new(Owner::Wake, id).into());
            // SAFETY: a no-op names no memory.
            unsafe { ring.push(entry) };
        }
        let mut seen = Vec::new();
        while seen.len() < count as usize {
            ring.submit_and_wait(Some(Duration::from_secs(5))).expect("wait");
            ring.completions(&mut seen);
        }
        let mut ids: Vec<u64> = seen.iter().map(|c| c.token.id()).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..count).collect::<Vec<_>>());
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let mut ring = Ring::new(8).expect("io_uring");
        ring.submit_and_wait(Some(Duration::from_millis(5))).expect("a timeout is no error");
        let mut seen = Vec::new();
        ring.completions(&mut seen);
        assert!(seen.is_empty());
    }

    #[test]
    fn a_forbidden_ring_names_the_setting() {
        let text = RingError::new(io::Error::from_raw_os_error(libc::EPERM), 8).to_string();
        assert!(text.contains("kernel.io_uring_disabled"), "{text}");
        assert!(!text.contains('\n'));
    }
}
