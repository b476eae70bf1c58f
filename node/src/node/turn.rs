//! What every turn of the loop does with the node and its sessions: the part that the reactor and the simulator share.

use walferry_engine::ring::Ring;

use crate::error::DaemonError;
use crate::node::Node;
use crate::session::Session;
use crate::session::host::SessionId;

/// The sessions of a node, wherever their bytes come from.
pub trait Sessions {
    /// Calls `act` for every open session. A session that has something to send afterwards needs a `wake`.
    fn for_each(&mut self, act: impl FnMut(&mut Session));
    /// Something that the session waits for may have come: releases its replies and lets it go on with its input.
    fn wake(&mut self, id: SessionId, node: &mut Node);
}

/// The node does what is due, and sessions that it released, or that are `ready` for another reason, go on.
pub fn run(
    node: &mut Node,
    ring: &mut Ring,
    sessions: &mut impl Sessions,
    ready: &mut Vec<SessionId>,
) -> Result<(), DaemonError> {
    node.poll(ring, ready)?;
    if let Some(reason) = node.take_abandoned() {
        // At once: no reply of this leadership may be taken for one of the next.
        sessions.for_each(|session| {
            session.abandon(&reason);
            ready.push(session.id());
        });
    }
    if !ready.is_empty() {
        ready.drain(..).for_each(|session| sessions.wake(session, node));
        // What the woken sessions wrote goes out with this turn, not with the next.
        node.submit(ring);
    }
    Ok(())
}
