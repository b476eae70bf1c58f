//! What a session tells of itself, for CLIENT LIST.

use walferry_cluster::level::CommitLevel;

/// What a session tells of itself, for CLIENT LIST.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// CLIENT SETNAME.
    pub name: &'a [u8],
    /// Who it is authenticated as; empty: nobody.
    pub user: &'a str,
    /// The last command that it was admitted to.
    pub last_command: &'static str,
    /// It waits for something other than a commit.
    pub blocked: bool,
    /// Commands since MULTI, in a transaction.
    pub queued: Option<usize>,
    /// Received and not executed, or queued for EXEC.
    pub input_bytes: usize,
    /// Replies that are not yet handed to the socket.
    pub output_bytes: usize,
    /// Of them, those that are held.
    pub held_replies: usize,
    /// HELLO 3.
    pub resp3: bool,
    /// COMMITLEVEL.
    pub level: CommitLevel,
}
