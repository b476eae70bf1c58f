//! Questions and answers between members, over TCP: one connection each way, kept open, many questions under way on it at once.
//! Every wait is bounded. Knows messages, not what they mean; and where TLS is spoken, only how to ask for it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use walferry_cluster::control::{Answer, Ask, CONTROL_KIND, Packet, body_bytes, encode};
use walferry_cluster::error::MessageError;
use walferry_cluster::member::{Caller, MemberName, Proved};
use walferry_cluster::message::{ENVELOPE_BYTES, Message, Refuse, RefuseCode, identify, read_message};
use walferry_engine::told::Told;
use walferry_engine::world;
use walferry_tls::{Accepted, Gate, PeerLinks, Quota, Secured};

use crate::tls::{Tls, caller};

/// Questions on one connection that wait for their answers, at most.
const WAITING_MAX: usize = 256;
/// Connections of other nodes that are served at once; a further one is closed.
const CONNECTIONS_MAX: usize = 256;
/// How often a connection that has sent less than an envelope is looked at: at first, and in the end.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(1);
const LOOK_INTERVAL_MAX: Duration = Duration::from_millis(64);
/// A new connection has to say within this time what it is for, and a message that was begun has to end within it.
const FIRST_BYTES_TIME_MAX: Duration = Duration::from_secs(5);
/// Somebody who is refused has to read why within this time.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(1);
/// How long the handshakes of a connection that is open may take, of the secret and of TLS: five round trips of a long link.
const SECURE_TIME_MAX: Duration = Duration::from_secs(3);
/// Connections that came through the gate and wait to be looked at; beyond it they are closed.
const THROUGH_MAX: usize = 1024;

/// A connection on which nothing was asked for so long is closed; who has a question later connects again.
const IDLE_TIME_MAX: Duration = Duration::from_secs(60);
/// When all places are taken, one that has asked nothing for so long gives way to the next.
const IDLE_TIME_SURE: Duration = Duration::from_secs(2);

/// Of a refusal that comes in place of an answer, the bytes that are read.
const REFUSAL_BYTES_MAX: usize = 4096;

/// Why two nodes that reach each other cannot speak: one has TLS on its peer port, and the other does not, or believes another CA.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Misfit(String);

impl Misfit {
    fn of(error: &io::Error) -> Option<&Misfit> {
        error.get_ref()?.downcast_ref()
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

async fn read_packet<T: DeserializeOwned>(stream: &mut OwnedReadHalf, idle_max: Duration) -> io::Result<Packet<T>> {
    let mut envelope = [0; ENVELOPE_BYTES];
    // The next message may be long in coming; one that was begun may not.
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, "it asked nothing for a long time");
    tokio::time::timeout(idle_max, stream.read_exact(&mut envelope[..1])).await.map_err(silent)??;
    let rest = async {
        stream.read_exact(&mut envelope[1..]).await?;
        let Some(bytes) = body_bytes(&envelope) else { return Err(not_a_packet(envelope, stream).await) };
        // Memory comes with what is received, not with what is announced.
        let mut body = Vec::new();
        if stream.take(bytes as u64).read_to_end(&mut body).await? < bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_slice(&body).map_err(io::Error::from)
    };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it sent half a message");
    tokio::time::timeout(FIRST_BYTES_TIME_MAX, rest).await.map_err(late)?
}

/// Something else than a message between members came: the refusal of a gate, perhaps.
async fn not_a_packet(envelope: [u8; ENVELOPE_BYTES], stream: &mut OwnedReadHalf) -> io::Error {
    let mut bytes = envelope.to_vec();
    // The rest may be cut off, and then it is no message.
    let _ = stream.take((REFUSAL_BYTES_MAX - ENVELOPE_BYTES) as u64).read_to_end(&mut bytes).await;
    match read_message(&mut bytes.as_slice()) {
        Ok(Message::Refuse(refuse)) => io::Error::other(Misfit(format!("it refuses this node: {}", refuse.text))),
        _ => invalid("not a message between members"),
    }
}

/// Writes whole messages in the order of their arrival, until the connection or its owner is gone.
async fn write_all(mut stream: tokio::net::tcp::OwnedWriteHalf, mut outbox: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = outbox.recv().await {
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;

/// A connection on which this member asks.
#[derive(Clone)]
struct Line {
    outbox: mpsc::Sender<Vec<u8>>,
    waiting: Waiting,
    heard: Arc<Mutex<Instant>>,
    /// Why the other side wants none of it, once it has said so.
    misfit: Arc<Mutex<Option<String>>>,
    /// Who the other side proved to be.
    proved: Option<Proved>,
}

impl Line {
    async fn open(address: &str, links: &Arc<PeerLinks>) -> io::Result<Line> {
        let (stream, proved) = match links.is_plain() {
            true => (TcpStream::connect(address).await?, None),
            false => connect_secured(address, Arc::clone(links)).await?,
        };
        // A local socket, behind which TLS is spoken, knows no such option; the one behind it has it.
        let _ = stream.set_nodelay(true);
        let (mut reading, writing) = stream.into_split();
        let (outbox, inbox) = mpsc::channel(WAITING_MAX);
        let waiting = Waiting::default();
        let heard = Arc::new(Mutex::new(world::now()));
        let misfit = Arc::<Mutex<Option<String>>>::default();
        let (answered, heard_now, refused) = (Arc::clone(&waiting), Arc::clone(&heard), Arc::clone(&misfit));
        tokio::spawn(async move {
            let writer = tokio::spawn(write_all(writing, inbox));
            let ended = loop {
                let packet = match read_packet::<Answer>(&mut reading, Duration::MAX).await {
                    Ok(packet) => packet,
                    Err(error) => break error,
                };
                *heard_now.lock().expect("nobody panics with it") = world::now();
                let asked = answered.lock().expect("nobody panics with it").remove(&packet.number);
                if let Some(asked) = asked {
                    // Who asked may have given up.
                    let _ = asked.send(packet.body);
                }
            };
            *refused.lock().expect("nobody panics with it") = Misfit::of(&ended).map(ToString::to_string);
            // Whoever waits learns that nothing comes any more.
            answered.lock().expect("nobody panics with it").clear();
            writer.abort();
        });
        Ok(Line { outbox, waiting, heard, misfit, proved })
    }
}

/// Connects and does what a link to a peer begins with, on a thread that may wait for it.
async fn connect_secured(address: &str, links: Arc<PeerLinks>) -> io::Result<(TcpStream, Option<Proved>)> {
    let stream = TcpStream::connect(address).await?.into_std()?;
    stream.set_nodelay(true)?;
    let address = address.to_owned();
    let secured = tokio::task::spawn_blocking(move || links.secure(stream, &address, SECURE_TIME_MAX));
    let Secured { stream, names, .. } = secured.await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    let proved = names.map(|names| Proved::of(names.iter().map(String::as_str)));
    Ok((TcpStream::from_std(stream)?, proved))
}

/// The way to one other member.
pub(super) struct Peer {
    address: String,
    number: AtomicU64,
    line: tokio::sync::Mutex<Option<Line>>,
    links: Arc<PeerLinks>,
    /// Why the two could not speak last; said when it changes.
    refusal: Mutex<String>,
}

impl Peer {
    pub(super) fn new(address: &str, links: Arc<PeerLinks>) -> Peer {
        Peer {
            address: address.to_owned(),
            number: AtomicU64::new(0),
            line: tokio::sync::Mutex::new(None),
            links,
            refusal: Mutex::default(),
        }
    }

    /// Why an answer did not come, if it is that the two cannot speak.
    pub(super) fn misfit_of(error: &io::Error) -> Option<String> {
        Misfit::of(error).map(ToString::to_string)
    }

    /// Asks, and waits for the answer at most so long. `whom` is who has to answer, where that is known.
    pub(super) async fn ask(&self, whom: Option<&MemberName>, ask: &Ask, timeout: Duration) -> io::Result<Answer> {
        match tokio::time::timeout(timeout, self.ask_once(whom, ask)).await {
            Ok(answer) => answer,
            Err(_) => {
                self.hang_up_if_silent(timeout);
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} does not answer", self.address)))
            }
        }
    }

    async fn ask_once(&self, whom: Option<&MemberName>, ask: &Ask) -> io::Result<Answer> {
        let line = self.line().await?;
        if let (Some(whom), Some(proved)) = (whom, &line.proved)
            && proved.check(whom).is_err()
        {
            let error = io::Error::other(Misfit(format!("{proved} is at {}, where {whom} should be", self.address)));
            self.tell_refusal(Some(&error));
            return Err(error);
        }
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        // Forgotten with this future, be it answered or given up.
        let _forget = Forget { waiting: &line.waiting, number };
        {
            let mut waiting = line.waiting.lock().expect("nobody panics with it");
            if waiting.len() >= WAITING_MAX {
                let text = format!("{} has {WAITING_MAX} questions to answer", self.address);
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
            }
            waiting.insert(number, sender);
        }
        let closed = || match line.misfit.lock().expect("nobody panics with it").take() {
            Some(text) => io::Error::other(Misfit(text)),
            None => io::Error::new(io::ErrorKind::ConnectionReset, format!("{} closed the connection", self.address)),
        };
        let sent = line.outbox.send(encode(&Packet { number, body: ask })).await;
        let answer = if sent.is_err() { Err(closed()) } else { answer.await.map_err(|_| closed()) };
        self.tell_refusal(answer.as_ref().err());
        if answer.is_err() {
            *self.line.lock().await = None;
        }
        answer
    }

    async fn line(&self) -> io::Result<Line> {
        let mut line = self.line.lock().await;
        if let Some(line) = line.as_ref().filter(|line| !line.outbox.is_closed()) {
            return Ok(line.clone());
        }
        let opened = Line::open(&self.address, &self.links).await;
        let opened = opened.map_err(|error| match error.kind() {
            // What a handshake says of the other side.
            io::ErrorKind::Other if !self.links.is_plain() => io::Error::other(Misfit(error.to_string())),
            _ => error,
        });
        if opened.is_err() {
            self.tell_refusal(opened.as_ref().err());
        }
        let opened = opened?;
        *line = Some(opened.clone());
        Ok(opened)
    }

    /// A member that is not there is nothing new; one that is there and speaks otherwise has to be looked at by somebody.
    fn tell_refusal(&self, error: Option<&io::Error>) {
        let said = match error {
            Some(error) => match Misfit::of(error) {
                Some(misfit) => Some(misfit),
                // It may be down for a moment, and says the same when it is back.
                None => return,
            },
            None => None,
        };
        let text = said.map(ToString::to_string).unwrap_or_default();
        let mut refusal = self.refusal.lock().expect("nobody panics with it");
        if *refusal != text {
            if !text.is_empty() {
                tracing::warn!(address = %self.address, "a member cannot be asked: {text}");
            }
            *refusal = text;
        }
    }

    /// A connection on which nothing comes is given up: over a network that was cut and is whole again, a new one is there
    /// long before the old one has sent its bytes once more.
    fn hang_up_if_silent(&self, timeout: Duration) {
        if let Ok(mut line) = self.line.try_lock() {
            line.take_if(|line| world::now() - *line.heard.lock().expect("nobody panics with it") >= timeout);
        }
    }
}

struct Forget<'a> {
    waiting: &'a Waiting,
    number: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.waiting.lock().expect("nobody panics with it").remove(&self.number);
    }
}

/// Answers questions.
pub(super) trait Answering: Send + Sync + 'static {
    /// The answer, when it is there; other questions are answered meanwhile.
    fn answer(self: Arc<Self>, caller: Caller, ask: Ask) -> impl Future<Output = Answer> + Send;
    /// A connection that carries the log, not questions.
    fn log_connection(&self, socket: OwnedFd, caller: Caller);
}

/// Where other nodes connect.
pub(super) enum Door {
    /// Plainly.
    Plain(TcpListener),
    /// Through a gate, where each proves who it is.
    Gate {
        /// Ends with the door.
        _gate: Gate,
        through: tokio::sync::Mutex<mpsc::Receiver<Accepted>>,
    },
}

impl Door {
    pub(super) fn open(listener: std::net::TcpListener, tls: &Tls) -> io::Result<Door> {
        let (outbox, through) = mpsc::channel(THROUGH_MAX);
        let told = Mutex::new(Told::default());
        let deliver = move |accepted: Accepted| {
            let address = accepted.address;
            let lost = outbox.try_send(accepted).is_err();
            if lost && told.lock().expect("nobody panics with it").tell("full", world::now()).is_some() {
                tracing::warn!(%address, "a peer's connection is closed: {THROUGH_MAX} wait already");
            }
        };
        if tls.guards_peers() {
            let gate = tls.gate_for_peers(listener, Box::new(deliver))?;
            return Ok(Door::Gate { _gate: gate, through: tokio::sync::Mutex::new(through) });
        }
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Door::Plain)
    }

    async fn accept(&self) -> io::Result<(TcpStream, Caller)> {
        match self {
            Door::Plain(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((stream, Caller::unproved(address)))
            }
            Door::Gate { through, .. } => {
                let accepted = through.lock().await.recv().await;
                let accepted = accepted.ok_or_else(|| io::Error::other("the gate for peers has ended"))?;
                let caller = caller(&accepted);
                let stream = std::net::TcpStream::from(accepted.socket);
                stream.set_nonblocking(true)?;
                Ok((TcpStream::from_std(stream)?, caller))
            }
        }
    }
}

/// A connection that is served.
struct Open {
    task: AbortHandle,
    /// When it was accepted, or asked last.
    heard: Arc<Mutex<Instant>>,
}

/// Closes the connection that has asked nothing for the longest time, if that is long enough: members ask all the time.
fn close_idle(open: &mut Vec<Open>, now: Instant) {
    let heard = |one: &Open| *one.heard.lock().expect("nobody panics with it");
    let oldest = (0..open.len()).min_by_key(|one| heard(&open[*one]));
    if let Some(oldest) = oldest.filter(|one| now.saturating_duration_since(heard(&open[*one])) >= IDLE_TIME_SURE) {
        open.swap_remove(oldest).task.abort();
    }
}

/// Accepts what other nodes connect for. Its connections end with it.
pub(super) async fn serve(door: Arc<Door>, answering: Arc<impl Answering>) {
    let mut connections = tokio::task::JoinSet::new();
    let mut open: Vec<Open> = Vec::new();
    let quota = Arc::new(Mutex::new(Quota::new(world::now())));
    let mut told = Told::default();
    loop {
        let accepted = door.accept().await;
        while connections.try_join_next().is_some() {}
        open.retain(|one| !one.task.is_finished());
        if open.len() >= CONNECTIONS_MAX {
            close_idle(&mut open, world::now());
        }
        match accepted {
            Ok((_, Caller { address, .. })) if open.len() >= CONNECTIONS_MAX => {
                if told.tell("full", world::now()).is_some() {
                    tracing::warn!(%address, "a peer's connection is closed: {CONNECTIONS_MAX} are open, which is the bound");
                }
            }
            Ok((stream, caller)) => {
                let address = caller.address;
                let (answering, quota) = (Arc::clone(&answering), Arc::clone(&quota));
                let heard = Arc::new(Mutex::new(world::now()));
                let heard_of = Arc::clone(&heard);
                let task = connections.spawn(async move {
                    let Err(error) = serve_one(stream, caller, heard_of, answering).await else { return };
                    let is_unidentified = error.get_ref().is_some_and(|inner| inner.is::<MessageError>());
                    if is_unidentified && quota.lock().expect("nobody panics with it").take(world::now()) {
                        tracing::warn!(%address, "a peer is not answered: {error}");
                    } else {
                        tracing::debug!(%address, "a connection of a peer ended: {error}");
                    }
                });
                open.push(Open { task, heard });
            }
            Err(error) => {
                if told.tell(&error.to_string(), world::now()).is_some() {
                    tracing::warn!(%error, "a peer's connection could not be accepted");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Tells somebody who speaks TLS or proves a secret that this port does not; what it has sent is read, so that the answer is not
/// lost with it.
async fn refuse(mut stream: TcpStream, why: &MessageError) {
    let mut answer = Vec::new();
    Message::Refuse(Refuse { code: RefuseCode::Protocol, text: why.to_string() }).encode(&mut answer);
    let part = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await?;
        stream.take(REFUSAL_BYTES_MAX as u64).read_to_end(&mut Vec::new()).await
    };
    // It may have hung up.
    let _ = tokio::time::timeout(REFUSAL_TIME_MAX, part).await;
}

async fn serve_one(
    stream: TcpStream,
    caller: Caller,
    heard: Arc<Mutex<Instant>>,
    answering: Arc<impl Answering>,
) -> io::Result<()> {
    let mut first = [0; ENVELOPE_BYTES];
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, "it said nothing");
    let look = async {
        let mut interval = LOOK_INTERVAL_MIN;
        loop {
            match stream.peek(&mut first).await? {
                ENVELOPE_BYTES.. => return io::Result::Ok(()),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                // Fewer bytes than an envelope are rare and do not stay so.
                _ => tokio::time::sleep(interval).await,
            }
            interval = (interval * 2).min(LOOK_INTERVAL_MAX);
        }
    };
    tokio::time::timeout(FIRST_BYTES_TIME_MAX, look).await.map_err(silent)??;
    if let Some(why) = identify(&first) {
        refuse(stream, &why).await;
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    if first[4] != CONTROL_KIND {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        answering.log_connection(stream.into(), caller);
        return Ok(());
    }
    // As above.
    let _ = stream.set_nodelay(true);
    let (mut reading, writing) = stream.into_split();
    let (outbox, inbox) = mpsc::channel(WAITING_MAX);
    let writer = tokio::spawn(write_all(writing, inbox));
    // Whoever asks and takes no answers is read no further.
    let permits = Arc::new(Semaphore::new(WAITING_MAX));
    let outcome = loop {
        let permit = Arc::clone(&permits).acquire_owned().await.expect("nobody closes it");
        match read_packet::<Ask>(&mut reading, IDLE_TIME_MAX).await {
            Ok(Packet { number, body }) => {
                *heard.lock().expect("nobody panics with it") = world::now();
                let (answering, outbox, caller) = (Arc::clone(&answering), outbox.clone(), caller.clone());
                tokio::spawn(async move {
                    let body = answering.answer(caller, body).await;
                    // The other side may have hung up.
                    let _ = outbox.send(encode(&Packet { number, body })).await;
                    drop(permit);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    writer.abort();
    outcome
}
