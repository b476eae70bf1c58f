//! Turning a peer away in one message. Used by the shipper when it has no place for another link, and by a node that
//! does not lead, which has no shipper.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use walferry_cluster::message::{Message, Refuse, RefuseCode};

/// How much of what the peer has said is taken from the socket, so that closing it does not cut our answer off.
const DISCARD_BYTES_MAX: usize = 128 << 10;

/// Answers a peer that this node does not lead, and closes. `text` says what the node is.
pub fn not_leading(socket: OwnedFd, text: &str) {
    let text = format!("this node does not lead: {text}");
    turn_away(&socket, &Refuse { code: RefuseCode::NotLeader, text });
}

/// Says why, and that nothing follows; never waits. The answer fits into any socket's buffer.
pub(crate) fn turn_away(socket: &impl AsFd, refuse: &Refuse) {
    let mut bytes = Vec::new();
    Message::Refuse(refuse.clone()).encode(&mut bytes);
    let fd = socket.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    // A peer that is gone needs no answer.
    let _ = send(fd, &bytes, flags);
    let _ = shutdown(fd, Shutdown::Write);
    let mut discarded = vec![0; DISCARD_BYTES_MAX];
    let _ = recv(fd, &mut discarded, MsgFlags::MSG_DONTWAIT);
}
