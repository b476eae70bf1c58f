//! The built-in scripts against PostgreSQL: prepared statements, a transaction's statements pipelined as they are to a
//! node, `synchronous_commit` from the commit level. A thread runs its clients as tasks of one single-threaded runtime.
//!
//! An open loop's schedule is kept to the millisecond, which is what the runtime's timer tells apart.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Error, NoTls, Statement};

use super::driver::{Event, INTERVAL};
use super::expr::Random;
use super::schedule::Schedule;
use super::script::{ACCOUNTS_PER_SCALE, TELLERS_PER_SCALE};
use super::session::Workload;
use super::stats::Stats;
use super::target::Target;
use crate::failure::Failure;

/// All connections must stand within this time at the start.
const CONNECT_S_MAX: u64 = 10;
/// How long the last transactions may take after the end of the run.
const DRAIN_S_MAX: u64 = 5;
/// Between two attempts to open a lost connection.
const RECONNECT_MS: u64 = 100;
/// How often a thread looks whether the run is over.
const LOOK_MS: u64 = 50;
/// Levels, and what `synchronous_commit` calls them.
const LEVELS: [(&str, &str); 6] = [
    ("off", "off"),
    ("local", "local"),
    ("remote_write", "remote_write"),
    ("remote_flush", "on"),
    ("on", "on"),
    ("remote_apply", "remote_apply"),
];

const CREATE: &str = "
DROP TABLE IF EXISTS load_account, load_teller, load_branch, load_history;
CREATE TABLE load_account (id bigint, balance bigint NOT NULL);
CREATE TABLE load_teller (id bigint, balance bigint NOT NULL);
CREATE TABLE load_branch (id bigint, balance bigint NOT NULL);
CREATE TABLE load_history (tid bigint, bid bigint, aid bigint, delta bigint, at timestamptz DEFAULT now());";
const INDEX: &str = "
ALTER TABLE load_account ADD PRIMARY KEY (id);
ALTER TABLE load_teller ADD PRIMARY KEY (id);
ALTER TABLE load_branch ADD PRIMARY KEY (id);
VACUUM ANALYZE load_account, load_teller, load_branch, load_history;";
const CREATE_APPEND: &str = "CREATE TABLE IF NOT EXISTS load_append (client bigint, data text)";

const ADD_ACCOUNT: &str = "UPDATE load_account SET balance = balance + $1 WHERE id = $2";
const ADD_TELLER: &str = "UPDATE load_teller SET balance = balance + $1 WHERE id = $2";
const ADD_BRANCH: &str = "UPDATE load_branch SET balance = balance + $1 WHERE id = $2";
const ADD_HISTORY: &str = "INSERT INTO load_history (tid, bid, aid, delta) VALUES ($1, $2, $3, $4)";
const APPEND: &str = "INSERT INTO load_append (client, data) VALUES ($1, $2)";
const SELECT: &str = "SELECT balance FROM load_account WHERE id = $1";

/// The built-in scripts that have a form in SQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sql {
    /// Account, teller, branch and history in one transaction.
    TpcbLike,
    /// Account and history in one transaction.
    SimpleUpdate,
    /// One row.
    Append,
    /// One account.
    SelectOnly,
}

impl Sql {
    /// The script of this name.
    pub fn named(name: &str) -> Option<Sql> {
        match name {
            "tpcb-like" => Some(Sql::TpcbLike),
            "simple-update" => Some(Sql::SimpleUpdate),
            "append" => Some(Sql::Append),
            "select-only" => Some(Sql::SelectOnly),
            _ => None,
        }
    }

    fn statements(self) -> &'static [&'static str] {
        match self {
            Sql::TpcbLike => &[ADD_ACCOUNT, ADD_TELLER, ADD_BRANCH, ADD_HISTORY],
            Sql::SimpleUpdate => &[ADD_ACCOUNT, ADD_HISTORY],
            Sql::Append => &[APPEND],
            Sql::SelectOnly => &[SELECT],
        }
    }
}

/// PostgreSQL's error in one line: the server's own words where it has said something.
fn text_of(error: &Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} {}", db.code().code(), db.message()),
        None => {
            let source = std::error::Error::source(error).map_or(String::new(), |source| format!(": {source}"));
            format!("{error}{source}")
        }
    }
}

fn set_level(level: &str) -> Result<String, String> {
    let known = LEVELS.iter().find(|(name, _)| *name == level);
    let (_, word) = known
        .ok_or_else(|| format!("--level {level}: choose off, local, remote_write, remote_flush or remote_apply"))?;
    Ok(format!("SET synchronous_commit = {word}"))
}

async fn open(config: &Config, level: Option<&str>) -> Result<Client, Error> {
    let mut config = config.clone();
    config.connect_timeout(Duration::from_secs(CONNECT_S_MAX)).application_name("walferry load");
    let (client, connection) = config.connect(NoTls).await?;
    // It ends when the client is dropped; an error reaches the client's own calls.
    tokio::task::spawn_local(connection);
    if let Some(Ok(set)) = level.map(set_level) {
        client.batch_execute(&set).await?;
    }
    Ok(client)
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::failed)?;
    Ok(tokio::task::LocalSet::new().block_on(&runtime, work))
}

/// What a run needs to know of the server.
pub struct Facts {
    /// Name and version.
    pub server: String,
    /// The scale of the tables, if there are any.
    pub scale: Option<i64>,
}

/// Looks at the server; creates the table of `append`. A remote level without standbys to wait for is an error.
pub fn prepare(config: &Config, level: Option<&str>) -> Result<Facts, Failure> {
    if let Some(level) = level {
        set_level(level).map_err(Failure::Usage)?;
    }
    block_on(async {
        let client = open(config, level).await?;
        let show = async |what: &str| client.query_one(&format!("SHOW {what}"), &[]).await?.try_get::<_, String>(0);
        let server = format!("postgresql {}", show("server_version").await?.split(' ').next().unwrap_or_default());
        let standbys = show("synchronous_standby_names").await?;
        client.batch_execute(CREATE_APPEND).await?;
        let has_tables = "SELECT to_regclass('load_branch') IS NOT NULL";
        let scale = match client.query_one(has_tables, &[]).await?.try_get(0)? {
            true => Some(client.query_one("SELECT count(*) FROM load_branch", &[]).await?.try_get::<_, i64>(0)?),
            false => None,
        };
        Ok::<_, Error>((Facts { server, scale: scale.filter(|scale| *scale > 0) }, standbys))
    })?
    .map_err(|error| {
        Failure::failed(format_args!("{}: {}", Target::Postgres(Box::new(config.clone())), text_of(&error)))
    })
    .and_then(|(facts, standbys)| match level {
        Some(level) if !matches!(level, "off" | "local") && standbys.is_empty() => Err(Failure::failed(format_args!(
            "--level {level}: the server waits for no standby; set synchronous_standby_names, such as 'ANY 1 (*)'"
        ))),
        _ => Ok(facts),
    })
}

/// Creates and fills the tables.
pub fn init(config: &Config, scale: i64) -> Result<Duration, Failure> {
    let began = Instant::now();
    let done = block_on(async {
        let client = open(config, Some("local")).await?;
        client.batch_execute(CREATE).await?;
        for (table, rows) in [("account", ACCOUNTS_PER_SCALE), ("teller", TELLERS_PER_SCALE), ("branch", 1)] {
            let rows = rows * scale;
            let fill = format!("INSERT INTO load_{table} SELECT id, 0 FROM generate_series(1, {rows}) AS id");
            client.batch_execute(&fill).await?;
        }
        for statement in INDEX.split_inclusive(';') {
            client.batch_execute(statement).await?;
        }
        Ok::<_, Error>(())
    })?;
    done.map_err(|error| Failure::failed(text_of(&error)))?;
    Ok(began.elapsed())
}

/// What a thread is to do.
pub struct Plan {
    /// Number of the thread.
    pub thread: usize,
    /// The server.
    pub config: Config,
    /// The scripts, as the workload numbers them.
    pub scripts: Vec<Sql>,
    /// The thread's clients by number.
    pub clients: Vec<usize>,
    /// Transactions of each; none is without end.
    pub transactions: Option<u64>,
    /// Transactions a second of this thread, for an open-loop run.
    pub rate: Option<(f64, Random)>,
    /// How long to run.
    pub duration: Option<Duration>,
    /// The commit level.
    pub level: Option<String>,
    /// Scale of the tables.
    pub scale: i64,
    /// Seed of the run.
    pub seed: u64,
    /// Weights, payload and empty statistics.
    pub workload: Arc<Workload>,
    /// Set by Ctrl-C.
    pub stop: &'static AtomicBool,
}

/// What the clients of a thread share.
struct Shared {
    plan: Plan,
    stats: RefCell<Box<Stats>>,
    schedule: RefCell<Option<Schedule>>,
    start: Cell<Instant>,
    busy: Cell<u64>,
}

/// Runs a thread to its end. `start` brings the moment at which all threads begin.
pub fn run(plan: Plan, start: &Receiver<Instant>, events: &SyncSender<Event>) {
    if let Err(text) = block_on(drive(plan, start, events)).map_err(|error| error.to_string()).and_then(|done| done) {
        // The receiver is gone only when the run was given up; then nobody wants to know.
        let _ = events.send(Event::Failed(text));
    }
}

async fn drive(mut plan: Plan, start: &Receiver<Instant>, events: &SyncSender<Event>) -> Result<(), String> {
    let mut connections = Vec::new();
    for _ in &plan.clients {
        let connection = Connection::open(&plan).await;
        connections.push(
            connection
                .map_err(|error| format!("cannot open {} connections: {}", plan.clients.len(), text_of(&error)))?,
        );
    }
    let gone = |_| "the run was given up".to_owned();
    events.send(Event::Connected).map_err(gone)?;
    let start = start.recv().map_err(|_| "the run was given up".to_owned())?;
    let schedule = plan.rate.take().map(|(rate, random)| Schedule::new(rate, start, random));
    let stats = RefCell::new(Box::new(plan.workload.empty_stats()));
    let shared =
        Rc::new(Shared { plan, stats, schedule: RefCell::new(schedule), start: Cell::new(start), busy: Cell::new(0) });
    let clients = shared.plan.clients.clone();
    let mut tasks = tokio::task::JoinSet::new();
    for (client, connection) in clients.into_iter().zip(connections) {
        tasks.spawn_local(run_client(Rc::clone(&shared), client, connection));
    }
    let end = shared.plan.duration.map(|duration| start + duration);
    let (mut next_interval, mut drain_until) = (start + INTERVAL, None);
    while !tasks.is_empty() {
        let pause = Duration::from_millis(LOOK_MS).min(next_interval.saturating_duration_since(Instant::now()));
        let _ = tokio::time::timeout(pause, tasks.join_next()).await;
        let now = Instant::now();
        if now >= next_interval {
            let full = shared.stats.replace(Box::new(shared.plan.workload.empty_stats()));
            events.send(Event::Interval(shared.plan.thread, full)).map_err(gone)?;
            next_interval += INTERVAL;
        }
        if end.is_some_and(|end| now >= end) || shared.plan.stop.load(Ordering::Relaxed) {
            let until = *drain_until.get_or_insert(now + Duration::from_secs(DRAIN_S_MAX));
            if now >= until {
                break;
            }
        }
    }
    let (thread, unfinished) = (shared.plan.thread, shared.busy.get());
    let rest = shared.stats.replace(Box::new(shared.plan.workload.empty_stats()));
    events.send(Event::Interval(thread, rest)).map_err(gone)?;
    events.send(Event::Finished { thread, unfinished }).map_err(gone)
}

struct Connection {
    client: Client,
    /// By script, in the order of its statements.
    statements: Vec<Vec<Statement>>,
}

impl Connection {
    async fn open(plan: &Plan) -> Result<Connection, Error> {
        let client = open(&plan.config, plan.level.as_deref()).await?;
        let mut statements = Vec::new();
        for script in &plan.scripts {
            let mut prepared = Vec::new();
            for text in script.statements() {
                prepared.push(client.prepare(text).await?);
            }
            statements.push(prepared);
        }
        Ok(Connection { client, statements })
    }

    async fn transaction(&self, script: usize, kind: Sql, drawn: &Drawn) -> Result<(), Error> {
        let client = &self.client;
        let Drawn { aid, tid, bid, delta, client_id, ref payload } = *drawn;
        let run = async |index: usize, values: Vec<Option<i64>>| {
            let values: Vec<&(dyn ToSql + Sync)> = values.iter().map(|value| value as _).collect();
            client.execute(&self.statements[script][index], &values).await
        };
        // Each is sent at its first poll; `biased` polls in this order, so all of them travel together and in order.
        match kind {
            Sql::TpcbLike => tokio::try_join!(
                biased;
                client.batch_execute("BEGIN"),
                run(0, vec![Some(delta), Some(aid)]),
                run(1, vec![Some(delta), Some(tid)]),
                run(2, vec![Some(delta), Some(bid)]),
                run(3, vec![Some(tid), Some(bid), Some(aid), Some(delta)]),
                client.batch_execute("COMMIT"),
            )
            .map(drop),
            Sql::SimpleUpdate => tokio::try_join!(
                biased;
                client.batch_execute("BEGIN"),
                run(0, vec![Some(delta), Some(aid)]),
                run(1, vec![None, None, Some(aid), Some(delta)]),
                client.batch_execute("COMMIT"),
            )
            .map(drop),
            Sql::Append => client.execute(&self.statements[script][0], &[&client_id, payload]).await.map(drop),
            Sql::SelectOnly => run(0, vec![Some(aid)]).await.map(drop),
        }
    }
}

struct Drawn {
    aid: i64,
    tid: i64,
    bid: i64,
    delta: i64,
    client_id: i64,
    payload: String,
}

impl Shared {
    fn is_over(&self) -> bool {
        let end = self.plan.duration.map(|duration| self.start.get() + duration);
        end.is_some_and(|end| Instant::now() >= end) || self.plan.stop.load(Ordering::Relaxed)
    }

    /// When this client's next transaction is due; none when the run is over.
    async fn next(&self) -> Option<Instant> {
        let due = self.schedule.borrow_mut().as_mut().map(Schedule::take);
        if let Some(due) = due {
            while Instant::now() < due && !self.is_over() {
                let look = Instant::now() + Duration::from_millis(LOOK_MS);
                tokio::time::sleep_until(due.min(look).into()).await;
            }
        }
        if self.is_over() {
            return None;
        }
        let now = Instant::now();
        if let Some(due) = due {
            self.stats.borrow_mut().lag.record(now.saturating_duration_since(due));
        }
        Some(due.unwrap_or(now))
    }

    fn draw(&self, client: usize, random: &mut Random) -> Drawn {
        let scale = self.plan.scale;
        Drawn {
            aid: random.random_range(1..=scale * ACCOUNTS_PER_SCALE),
            tid: random.random_range(1..=scale * TELLERS_PER_SCALE),
            bid: random.random_range(1..=scale),
            delta: random.random_range(-5000..=5000),
            client_id: client as i64,
            payload: String::from_utf8_lossy(self.plan.workload.payload.draw(random)).into_owned(),
        }
    }
}

async fn run_client(shared: Rc<Shared>, client: usize, mut connection: Connection) {
    let plan = &shared.plan;
    let mut random = Random::seed_from_u64(plan.seed.wrapping_add(client as u64));
    let mut left = plan.transactions;
    while left != Some(0) {
        let Some(scheduled) = shared.next().await else { return };
        left = left.map(|left| left - 1);
        let script = plan.workload.choose(&mut random);
        let drawn = shared.draw(client, &mut random);
        shared.busy.set(shared.busy.get() + 1);
        let done = connection.transaction(script, plan.scripts[script], &drawn).await;
        shared.busy.set(shared.busy.get() - 1);
        match done {
            Ok(()) => shared.stats.borrow_mut().succeeded(script, scheduled.elapsed()),
            Err(error) => {
                shared.stats.borrow_mut().failed(script, &text_of(&error));
                if connection.client.is_closed() {
                    let Some(opened) = reopen(&shared).await else { return };
                    connection = opened;
                } else {
                    // Ends a transaction that a failed statement left open; without one it is a warning.
                    let _ = connection.client.batch_execute("ROLLBACK").await;
                }
            }
        }
    }
}

async fn reopen(shared: &Shared) -> Option<Connection> {
    while !shared.is_over() {
        tokio::time::sleep(Duration::from_millis(RECONNECT_MS)).await;
        if let Ok(connection) = Connection::open(&shared.plan).await {
            shared.stats.borrow_mut().reconnects += 1;
            return Some(connection);
        }
    }
    None
}
