//! One client's state between receives: the incomplete request, what is in a batch, and the replies that are not yet sent.
//! Knows neither sockets nor disks; each of the three servers has one for each connection.

use crate::batch::Batch;
use crate::protocol::{Malformed, REPLY, request_bytes};

/// Connections that a server accepts; it closes further ones at once.
pub const CONNECTIONS_MAX: usize = 1024;
/// The most that one receive delivers.
pub const RECEIVE_BYTES_MAX: usize = 16 << 10;
/// Bytes of a connection that wait for something: requests for the disk, replies for the client. A connection with more is closed.
pub const WAITING_BYTES_MAX: usize = 32 << 10;

/// What is known of a client.
#[derive(Default)]
pub struct Session {
    incomplete: Vec<u8>,
    in_batch_bytes: usize,
    /// Replies to send.
    pub output: Vec<u8>,
}

impl Session {
    /// Takes received bytes. Complete requests go into `batch`, or are answered now if there is none.
    pub fn receive(&mut self, id: u64, bytes: &[u8], batch: Option<&mut Batch>) -> Result<(), Malformed> {
        if self.incomplete.len() + self.in_batch_bytes + self.output.len() + bytes.len() > WAITING_BYTES_MAX {
            return Err(Malformed);
        }
        if self.incomplete.is_empty() {
            let end = self.execute(id, bytes, batch)?;
            self.incomplete.extend_from_slice(&bytes[end..]);
            return Ok(());
        }
        let mut input = std::mem::take(&mut self.incomplete);
        input.extend_from_slice(bytes);
        let end = self.execute(id, &input, batch)?;
        input.drain(..end);
        self.incomplete = input;
        Ok(())
    }

    /// Executes the complete requests of `input`; returns where they end.
    fn execute(&mut self, id: u64, input: &[u8], batch: Option<&mut Batch>) -> Result<usize, Malformed> {
        let (mut end, mut requests) = (0, 0);
        while end < input.len() {
            let Some(bytes) = request_bytes(&input[end..])? else { break };
            end += bytes;
            requests += 1;
        }
        match batch {
            Some(batch) if requests > 0 => {
                batch.add(id, requests, &input[..end]);
                self.in_batch_bytes += end;
            }
            Some(_) => {}
            None => self.reply(requests),
        }
        Ok(end)
    }

    /// A batch with `requests` of this client, `bytes` long, is durable: they are answered.
    pub fn committed(&mut self, requests: u32, bytes: usize) {
        self.in_batch_bytes -= bytes;
        self.reply(requests);
    }

    fn reply(&mut self, requests: u32) {
        for _ in 0..requests {
            self.output.extend_from_slice(REPLY);
        }
    }
}
