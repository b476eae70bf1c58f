//! The server on the node's own ring, in the way of a node's reactor: multishot accept and receive, provided buffers, the log's
//! write on the same ring, and one system call for each turn.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};

use hashbrown::HashMap;
use io_uring::{cqueue, opcode, types};
use walferry_engine::ring::{Completion, Owner, RING_ENTRIES_MAX, Ring, Token};

use crate::batch::{Batch, Log};
use crate::recv_buffers::{RECV_BUFFER_BYTES, RECV_GROUP, RecvBuffers};
use crate::session::{CONNECTIONS_MAX, RECEIVE_BYTES_MAX, Session};

const _: () = assert!(RECV_BUFFER_BYTES == RECEIVE_BYTES_MAX);
const ACCEPT: Token = Token::new(Owner::Accept, 0);
const WRITE: Token = Token::new(Owner::Log, 0);

struct Connection {
    socket: TcpStream,
    session: Session,
    /// Bytes that the kernel sends now; empty when no send is in flight.
    sending: Vec<u8>,
    /// A multishot receive is armed.
    receiving: bool,
    closing: bool,
}

/// Fields drop in this order: the ring closes before the memory that it writes to is freed.
struct Server {
    ring: Ring,
    buffers: RecvBuffers,
    listener: TcpListener,
    file: Option<File>,
    log: Log,
    /// The batch that is written now.
    writing: Option<Batch>,
    connections: HashMap<u64, Connection>,
    next_id: u64,
    /// Connections to look at, at the end of this turn.
    touched: Vec<u64>,
}

fn receive_token(id: u64) -> Token {
    Token::new(Owner::Client, id << 1)
}

fn send_token(id: u64) -> Token {
    Token::new(Owner::Client, id << 1 | 1)
}

/// Serves until the process ends; each request is durable before it is answered if there is a `file`.
pub fn serve(listener: TcpListener, file: Option<File>) -> io::Result<Infallible> {
    let ring = Ring::new(RING_ENTRIES_MAX).map_err(io::Error::other)?;
    let buffers = RecvBuffers::register(&ring)?;
    let (connections, touched) = (HashMap::new(), Vec::new());
    let log = Log::default();
    let mut server = Server { ring, buffers, listener, file, log, writing: None, connections, next_id: 0, touched };
    server.accept();
    let mut completions: Vec<Completion> = Vec::new();
    loop {
        server.ring.submit_and_wait(None)?;
        server.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            match (completion.token.owner(), completion.token.id()) {
                (Owner::Accept, _) => server.accepted(&completion)?,
                (Owner::Log, _) => server.durable(&completion)?,
                (_, id) if id & 1 == 0 => server.received(id >> 1, &completion),
                (_, id) => server.sent(id >> 1, &completion),
            }
        }
        server.end_turn();
    }
}

impl Server {
    fn accept(&mut self) {
        let entry = opcode::AcceptMulti::new(types::Fd(self.listener.as_raw_fd())).flags(libc::SOCK_CLOEXEC);
        // SAFETY: names no memory; the listener lives as long as the ring.
        unsafe { self.ring.push(entry.build().user_data(ACCEPT.into())) };
    }

    fn accepted(&mut self, completion: &Completion) -> io::Result<()> {
        if !cqueue::more(completion.flags) {
            self.accept();
        }
        let descriptor = completion.outcome()?;
        // SAFETY: a successful accept hands over a descriptor that nobody else owns.
        let socket = unsafe { TcpStream::from_raw_fd(descriptor as i32) };
        if self.connections.len() == CONNECTIONS_MAX {
            return Ok(());
        }
        socket.set_nodelay(true)?;
        let (session, sending) = (Session::default(), Vec::new());
        let connection = Connection { socket, session, sending, receiving: false, closing: false };
        self.connections.insert(self.next_id, connection);
        self.touched.push(self.next_id);
        self.next_id += 1;
        Ok(())
    }

    fn received(&mut self, id: u64, completion: &Completion) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.receiving = cqueue::more(completion.flags);
        match (cqueue::buffer_select(completion.flags), completion.outcome()) {
            (Some(buffer), Ok(bytes)) => {
                let batch = self.file.as_ref().map(|_| self.log.open());
                let bytes = self.buffers.bytes(buffer, bytes as usize);
                connection.closing |= bytes.is_empty() || connection.session.receive(id, bytes, batch).is_err();
                self.buffers.give_back(buffer);
            }
            // All buffers are in use: the receive is armed again at the end of the turn.
            (None, Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            _ => connection.closing = true,
        }
        self.touched.push(id);
    }

    fn sent(&mut self, id: u64, completion: &Completion) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match completion.outcome() {
            Ok(bytes) => drop(connection.sending.drain(..bytes as usize)),
            Err(_) => {
                connection.sending.clear();
                connection.closing = true;
            }
        }
        if !connection.sending.is_empty() {
            connection.sending.append(&mut connection.session.output);
            self.send(id);
        } else {
            self.touched.push(id);
        }
    }

    fn durable(&mut self, completion: &Completion) -> io::Result<()> {
        let batch = self.writing.take().expect("a write is in flight");
        if completion.outcome()? as usize != batch.written_bytes().len() {
            return Err(io::Error::other("the log was written in part"));
        }
        for part in &batch.parts {
            if let Some(connection) = self.connections.get_mut(&part.id) {
                connection.session.committed(part.requests, part.bytes);
                self.touched.push(part.id);
            }
        }
        self.log.written(batch);
        Ok(())
    }

    fn send(&mut self, id: u64) {
        let connection = &self.connections[&id];
        let (bytes, socket) = (&connection.sending, types::Fd(connection.socket.as_raw_fd()));
        let entry = opcode::Send::new(socket, bytes.as_ptr(), bytes.len() as u32).flags(libc::MSG_NOSIGNAL);
        // SAFETY: the bytes are not touched, and the connection not removed, until the send has completed.
        unsafe { self.ring.push(entry.build().user_data(send_token(id).into())) };
    }

    /// Queues the next durable write, sends and receives; the next wait submits all of them.
    fn end_turn(&mut self) {
        if let Some(file) = &self.file
            && let Some((batch, position)) = self.log.next_write()
        {
            let bytes = batch.written_bytes();
            let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), bytes.len() as u32);
            // SAFETY: the batch is kept in `writing` until the write has completed.
            unsafe { self.ring.push(entry.offset(position).build().user_data(WRITE.into())) };
            self.writing = Some(batch);
        }
        for id in std::mem::take(&mut self.touched) {
            self.go_on(id);
        }
    }

    fn go_on(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.closing {
            if !connection.receiving && connection.sending.is_empty() {
                self.connections.remove(&id);
            } else {
                // Ends what is in flight; an error means that the client has ended it.
                let _ = connection.socket.shutdown(Shutdown::Both);
            }
            return;
        }
        if !connection.receiving {
            connection.receiving = true;
            let entry = opcode::RecvMulti::new(types::Fd(connection.socket.as_raw_fd()), RECV_GROUP);
            // SAFETY: names no memory but the buffer group, which outlives the ring.
            unsafe { self.ring.push(entry.build().user_data(receive_token(id).into())) };
        }
        if connection.sending.is_empty() && !connection.session.output.is_empty() {
            std::mem::swap(&mut connection.sending, &mut connection.session.output);
            self.send(id);
        }
    }
}
