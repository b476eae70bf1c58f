//! The server on epoll: readiness, then `read` and `write`. A file is always ready for epoll, so a thread does the durable
//! writes and an eventfd tells the loop that one is done.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use hashbrown::HashMap;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::batch::{Batch, Log};
use crate::session::{CONNECTIONS_MAX, RECEIVE_BYTES_MAX, Session};

const LISTENER: u64 = 0;
const DISK: u64 = 1;
const FIRST_CONNECTION: u64 = 2;
const EVENTS_MAX: usize = 256;

struct Connection {
    socket: TcpStream,
    session: Session,
    /// Replies did not fit into the socket's buffer; epoll tells when they do.
    blocked: bool,
}

/// The thread that writes batches. Its queues hold one batch, since one write is in flight at most.
struct Disk {
    sealed: SyncSender<(Batch, u64)>,
    durable: Receiver<io::Result<Batch>>,
    done: Arc<EventFd>,
}

impl Disk {
    fn start(file: File) -> io::Result<Disk> {
        let done = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (sealed, batches) = sync_channel::<(Batch, u64)>(1);
        let (results, durable) = sync_channel(1);
        let notify = Arc::clone(&done);
        thread::Builder::new().name("disk".to_owned()).spawn(move || {
            for (batch, position) in batches {
                let written = file.write_all_at(batch.written_bytes(), position);
                if results.send(written.map(|()| batch)).is_err() || notify.write(1).is_err() {
                    return;
                }
            }
        })?;
        Ok(Disk { sealed, durable, done })
    }
}

struct Server {
    epoll: Epoll,
    listener: TcpListener,
    disk: Option<Disk>,
    log: Log,
    connections: HashMap<u64, Connection>,
    next_id: u64,
    /// Connections with replies of this turn.
    answered: Vec<u64>,
}

/// Serves until the process ends; each request is durable before it is answered if there is a `file`.
pub fn serve(listener: TcpListener, file: Option<File>) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let disk = file.map(Disk::start).transpose()?;
    if let Some(disk) = &disk {
        epoll.add(&disk.done, EpollEvent::new(EpollFlags::EPOLLIN, DISK))?;
    }
    let log = Log::default();
    let (connections, answered) = (HashMap::new(), Vec::new());
    let mut server = Server { epoll, listener, disk, log, connections, next_id: FIRST_CONNECTION, answered };
    let mut events = [EpollEvent::empty(); EVENTS_MAX];
    let mut memory = vec![0; RECEIVE_BYTES_MAX];
    loop {
        let count = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => 0,
            waited => waited?,
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => server.accept()?,
                DISK => server.durable()?,
                id => server.ready(id, event.events(), &mut memory),
            }
        }
        server.end_turn()?;
    }
}

impl Server {
    fn accept(&mut self) -> io::Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            if self.connections.len() == CONNECTIONS_MAX {
                continue;
            }
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.next_id))?;
            let connection = Connection { socket, session: Session::default(), blocked: false };
            self.connections.insert(self.next_id, connection);
            self.next_id += 1;
        }
    }

    fn ready(&mut self, id: u64, events: EpollFlags, memory: &mut [u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if events.contains(EpollFlags::EPOLLOUT) {
            self.answered.push(id);
        }
        if !events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            return;
        }
        let batch = self.disk.as_ref().map(|_| self.log.open());
        let open = match connection.socket.read(memory) {
            Ok(0) => false,
            Ok(bytes) => connection.session.receive(id, &memory[..bytes], batch).is_ok(),
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        };
        if !open {
            // Closing the socket takes it out of epoll, too.
            self.connections.remove(&id);
        } else if !connection.session.output.is_empty() {
            self.answered.push(id);
        }
    }

    fn durable(&mut self) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        disk.done.read()?;
        let batch = disk.durable.recv().map_err(|_| io::Error::other("the disk thread ended"))??;
        for part in &batch.parts {
            if let Some(connection) = self.connections.get_mut(&part.id) {
                connection.session.committed(part.requests, part.bytes);
                self.answered.push(part.id);
            }
        }
        self.log.written(batch);
        Ok(())
    }

    /// Starts the next durable write and sends the replies.
    fn end_turn(&mut self) -> io::Result<()> {
        if let Some(disk) = &self.disk
            && let Some(write) = self.log.next_write()
        {
            disk.sealed.send(write).map_err(|_| io::Error::other("the disk thread ended"))?;
        }
        for id in self.answered.drain(..) {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if connection.session.output.is_empty() {
                continue;
            }
            let sent = match connection.socket.write(&connection.session.output) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Ok(sent) => sent,
                Err(_) => {
                    self.connections.remove(&id);
                    continue;
                }
            };
            connection.session.output.drain(..sent);
            let blocked = !connection.session.output.is_empty();
            if blocked != std::mem::replace(&mut connection.blocked, blocked) {
                let wanted = if blocked { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
                self.epoll.modify(&connection.socket, &mut EpollEvent::new(wanted, id))?;
            }
        }
        Ok(())
    }
}
