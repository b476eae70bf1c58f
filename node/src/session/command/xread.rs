//! XREAD as a session executes it: it may wait for entries.

use crate::session::client::Client;
use crate::session::host::Host;
use crate::session::parked::Parked;
use crate::session::reply::Reply;
use crate::session::resp::Args;

use crate::session::command::error::answer;
use crate::session::command::spec::Outcome;

use crate::session::command::stream::ReadRequest;

/// XREAD: waits if BLOCK says so.
pub fn xread(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let (view, hold) = client.read(host);
    let request = match ReadRequest::parse(&view, args, reply) {
        Ok(Some(request)) => request,
        Ok(None) => return Outcome::DONE,
        Err(error) => {
            answer(Err(error), 0, reply);
            return Outcome::Done(hold);
        }
    };
    match (request.read(&view, reply), request.block) {
        (Ok(true), _) => Outcome::Done(hold),
        (Ok(false), None) => {
            reply.null_array();
            Outcome::Done(hold)
        }
        (Ok(false), Some(timeout)) => Outcome::Park(Parked::for_streams(request, timeout, host)),
        (Err(error), _) => {
            answer(Err(error), 0, reply);
            Outcome::Done(hold)
        }
    }
}
