//! The server on tokio-uring: a task for each connection, and one that writes batches, all on one thread and one ring. Its
//! operations complete once each and own their buffers: there is no multishot receive and there are no provided buffers.

use std::cell::RefCell;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;

use hashbrown::HashMap;
use tokio::sync::{Notify, oneshot};
use tokio_uring::buf::IoBuf;
use tokio_uring::net::TcpStream;

use crate::batch::{Batch, Log};
use crate::session::{CONNECTIONS_MAX, RECEIVE_BYTES_MAX, Session};

/// Operations that the ring takes in one submission: one for each connection, and the disk's.
const ENTRIES: u32 = 2048;

const _: () = assert!(CONNECTIONS_MAX < ENTRIES as usize);

/// What the tasks share.
struct Shared {
    log: RefCell<Log>,
    /// Connections that wait until the batch with their requests is durable.
    waiting: RefCell<HashMap<u64, oneshot::Sender<()>>>,
    /// Requests were added to the open batch.
    added: Notify,
    durable: bool,
}

// SAFETY: the pages of a batch stay where they are while the batch is moved, and are initialised as far as this says.
unsafe impl IoBuf for Batch {
    fn stable_ptr(&self) -> *const u8 {
        self.written_bytes().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.written_bytes().len()
    }

    fn bytes_total(&self) -> usize {
        self.written_bytes().len()
    }
}

/// Serves until the process ends; each request is durable before it is answered if there is a `file`.
pub fn serve(listener: TcpListener, file: Option<File>) -> io::Result<Infallible> {
    tokio_uring::builder().entries(ENTRIES).start(async move {
        let shared = Rc::new(Shared {
            log: RefCell::default(),
            waiting: RefCell::default(),
            added: Notify::new(),
            durable: file.is_some(),
        });
        if let Some(file) = file {
            tokio_uring::spawn(write_batches(Rc::clone(&shared), tokio_uring::fs::File::from_std(file)));
        }
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        let connections = Rc::new(());
        for id in 0.. {
            let (socket, _) = listener.accept().await?;
            let counted = Rc::clone(&connections);
            // One count is the loop's own.
            if Rc::strong_count(&counted) > CONNECTIONS_MAX + 1 {
                continue;
            }
            socket.set_nodelay(true)?;
            let shared = Rc::clone(&shared);
            tokio_uring::spawn(async move {
                // An error ends this connection only.
                let _ = converse(id, &socket, &shared).await;
                drop(counted);
            });
        }
        unreachable!("a u64 does not run out")
    })
}

async fn converse(id: u64, socket: &TcpStream, shared: &Shared) -> io::Result<()> {
    let mut session = Session::default();
    let mut memory = Vec::with_capacity(RECEIVE_BYTES_MAX);
    loop {
        let (received, filled) = socket.read(memory).await;
        memory = filled;
        let bytes = received?;
        if bytes == 0 {
            return Ok(());
        }
        if shared.durable {
            commit(id, &mut session, &memory[..bytes], shared).await?;
        } else {
            session.receive(id, &memory[..bytes], None).map_err(io::Error::other)?;
        }
        if !session.output.is_empty() {
            let (sent, mut output) = socket.write_all(std::mem::take(&mut session.output)).await;
            sent?;
            output.clear();
            session.output = output;
        }
    }
}

/// Puts the requests in `bytes` into the open batch and waits until it is durable.
async fn commit(id: u64, session: &mut Session, bytes: &[u8], shared: &Shared) -> io::Result<()> {
    let (requests, in_batch) = {
        let mut log = shared.log.borrow_mut();
        let parts = log.open().parts.len();
        session.receive(id, bytes, Some(log.open())).map_err(io::Error::other)?;
        // A connection adds one part for each receive.
        let Some(part) = log.open().parts.get(parts) else { return Ok(()) };
        (part.requests, part.bytes)
    };
    let (sender, durable) = oneshot::channel();
    shared.waiting.borrow_mut().insert(id, sender);
    shared.added.notify_one();
    durable.await.map_err(io::Error::other)?;
    session.committed(requests, in_batch);
    Ok(())
}

/// Writes one batch after the other. The process ends when a write fails: no request may be answered any more.
async fn write_batches(shared: Rc<Shared>, file: tokio_uring::fs::File) {
    loop {
        let sealed = shared.log.borrow_mut().next_write();
        let Some((batch, position)) = sealed else {
            shared.added.notified().await;
            continue;
        };
        let wanted = batch.written_bytes().len();
        let (written, batch) = file.write_at(batch, position).submit().await;
        if !written.as_ref().is_ok_and(|bytes| *bytes == wanted) {
            eprintln!("the log could not be written: {written:?}");
            std::process::exit(1);
        }
        for part in &batch.parts {
            if let Some(sender) = shared.waiting.borrow_mut().remove(&part.id) {
                // A connection that has ended does not wait.
                let _ = sender.send(());
            }
        }
        shared.log.borrow_mut().written(batch);
    }
}
