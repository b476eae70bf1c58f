//! What commands know of a session and may change: who the client is, its place among those who have logged in, and what it chose.
//! `reads` decides what it may read; `mod.rs` executes its commands.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use walferry_cluster::level::CommitLevel;

use crate::clients::limits::{Place, Places};
use crate::session::command::spec::{Transaction, Watched};
use crate::session::id::SessionId;
use crate::session::outbox::Acknowledged;
use crate::session::reading::{Mode, Position};
use crate::session::resp::UNAUTHENTICATED_ARG_BYTES_MAX;
use crate::users::login::FailedLogins;
use crate::users::{Check, Grant, Judged, User, Users};

/// What a node gives each new session.
#[derive(Clone, Debug, Default)]
pub struct SessionSettings {
    /// Who may connect; shared by all sessions, and replaced as a whole.
    pub users: Rc<RefCell<Users>>,
    /// The places of those who have logged in; shared by all sessions.
    pub places: Rc<Places>,
    /// The level of a session that never said COMMITLEVEL.
    pub commit_level: Option<CommitLevel>,
    /// After this a commit that is durable here and unconfirmed elsewhere is answered `-UNCERTAIN`; none: it waits.
    pub commit_timeout: Option<Duration>,
    /// A read waits so long for a state that is good enough for it; zero: not at all.
    pub read_wait_timeout: Duration,
}

impl SessionSettings {
    pub(super) fn level(&self) -> CommitLevel {
        self.commit_level.unwrap_or(CommitLevel::Local)
    }
}

/// What commands know of the session and may change.
#[derive(Debug)]
pub struct Client {
    /// The connection's number.
    pub id: SessionId,
    /// At which address of this host it reached the node; none where it came by no network.
    pub reached_at: Option<IpAddr>,
    /// Where its connection comes from.
    pub comes_from: Option<IpAddr>,
    /// CLIENT SETNAME.
    pub name: Vec<u8>,
    /// Who it is; none until it has authenticated.
    pub user: Option<Rc<User>>,
    /// COMMITLEVEL.
    pub level: CommitLevel,
    /// COMMITTIMEOUT.
    pub commit_timeout: Option<Duration>,
    /// READ TIMEOUT.
    pub read_timeout: Duration,
    /// READ.
    pub mode: Mode,
    /// SESSION was used: no read is older than `seen`, on no node and after no failover.
    pub tracked: bool,
    /// The end of the session's last record. A failover may have taken it back: then the log has another record there, or none.
    pub last_commit: Position,
    /// The session has been told of changes up to here, or is about to be, or relies on them; `last_commit <= seen`.
    pub seen: Position,
    /// Of `seen`, what does not hang on a reply that is held until it is committed; `firm <= seen`.
    pub firm: Position,
    /// What COMMITINFO tells of.
    pub acknowledged: Option<Acknowledged>,
    /// Between MULTI and EXEC.
    pub transaction: Option<Transaction>,
    /// WATCH.
    pub watched: Watched,
    /// Wrong passwords since the last right one.
    pub failures: u32,
    /// Of them, those that `clients` has not counted yet.
    pub(super) failed_logins: FailedLogins,
    /// Its place among those who have logged in.
    pub(super) place: Option<Place>,
    pub(super) turned_away: bool,
    /// What the node gave it at its start.
    pub(super) settings: SessionSettings,
}

impl Client {
    pub(super) fn new(id: SessionId, reached_at: Option<IpAddr>, settings: SessionSettings) -> Client {
        let user = settings.users.borrow().at_start();
        let mut client = Client {
            id,
            reached_at,
            comes_from: None,
            name: Vec::new(),
            user,
            level: settings.level(),
            commit_timeout: settings.commit_timeout,
            read_timeout: settings.read_wait_timeout,
            mode: Mode::Any,
            tracked: false,
            last_commit: Position::default(),
            seen: Position::default(),
            firm: Position::default(),
            acknowledged: None,
            transaction: None,
            watched: Watched::new(),
            failures: 0,
            failed_logins: FailedLogins::default(),
            place: None,
            turned_away: false,
            settings,
        };
        client.take_place();
        client
    }

    /// The client says who it is. What cannot be right is counted as a failure; what has to be compared first is counted later.
    pub fn authenticate(&mut self, name: &[u8], password: &[u8]) -> Judged {
        // Longer ones are nobody's, and hashing them would take long.
        let fits = name.len().max(password.len()) <= UNAUTHENTICATED_ARG_BYTES_MAX;
        let judged = if fits { self.settings.users.borrow().authenticate(name, password) } else { Judged::Wrong };
        if let Judged::Wrong = judged {
            let users = Rc::clone(&self.settings.users);
            let named = std::str::from_utf8(name).ok().and_then(|name| users.borrow().get(name).cloned());
            self.failed(named.as_ref());
        }
        judged
    }

    /// The password was compared and is right: the user, unless the users are others by now.
    pub fn verified(&self, check: &Check) -> Option<Rc<User>> {
        self.settings.users.borrow().verified(check)
    }

    /// A login failed, of this user if there is one.
    pub fn failed(&mut self, user: Option<&Rc<User>>) {
        self.failures = self.failures.saturating_add(1);
        self.failed_logins.add(user);
    }

    /// The client is this user from now on, or is turned away: its place is kept for operators.
    pub fn log_in(&mut self, user: Rc<User>) {
        self.failures = 0;
        // A client that logs in anew has the place of before.
        self.place = None;
        self.user = Some(user);
        self.take_place();
    }

    /// Whoever has logged in, or need not, takes a place.
    pub(super) fn take_place(&mut self) {
        if let Some(user) = &self.user {
            self.place = self.settings.places.take(user.grant == Grant::All);
            self.user.take_if(|_| self.place.is_none());
            self.turned_away = self.place.is_none();
        }
    }

    /// The connection is to be closed: there is no place for its user.
    pub fn is_turned_away(&self) -> bool {
        self.turned_away
    }

    /// Everybody is `default` without a password: AUTH with one is likely to be a mistake.
    pub fn needs_no_password(&self) -> bool {
        self.settings.users.borrow().at_start().is_some()
    }

    /// The users' lines, as ACL LIST tells them.
    pub fn user_lines(&self) -> Vec<String> {
        self.settings.users.borrow().lines()
    }

    /// The level of a client that just connected.
    pub fn level_default(&self) -> CommitLevel {
        self.settings.level()
    }

    /// As a client that just connected.
    pub fn reset(&mut self) {
        self.place = None;
        *self = Client {
            comes_from: self.comes_from,
            failures: self.failures,
            failed_logins: std::mem::take(&mut self.failed_logins),
            ..Client::new(self.id, self.reached_at, self.settings.clone())
        };
    }
}
