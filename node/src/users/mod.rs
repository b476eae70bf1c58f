//! Who may connect as a client, and what each may do: the users' file, in the words of redis-server's ACL file as far as this node
//! has a use for them. A core: text in, users out; reads no clock and opens no socket. `session` asks it what a command needs.
//!
//! ```text
//! # one user a line: user NAME RULE...
//! user default on >password ~* +@all
//! user reader on #<sha256 in hexadecimal> ~* +@read -@write
//! user app on $argon2id$v=19$m=19456,t=2,p=1$<salt>$<hash> ~* +@all -@admin
//! ```
//!
//! | rule | means |
//! |---|---|
//! | `on`, `off` | may log in, or may not (the default) |
//! | `>password`, `#sha256` | a password, as it is or as its SHA-256; several are possible |
//! | `$argon2id$...` | a password as a salted hash that takes long to compute; `walferry passwd` makes the line |
//! | `nopass` | any password will do; as `default` no AUTH is needed |
//! | `~*`, `&*` | every key and channel: there is no other choice, it may be left out |
//! | `+@all` | the full role: an operator's |
//! | `+@all -@admin`, `+@read +@write` | the role of programs: reads and writes, and nothing that concerns the node or other clients |
//! | `+@read` | the read-only role: reads, and what concerns the connection; `-@write`, `-@admin`, `-@dangerous` say it again |
//!
//! Everything else is refused: a rule that means less than it says is worse than none. Of passwords only hashes are kept.

pub mod login;
pub mod login_queue;
pub mod salted;

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::users::salted::SaltedHash;
use rand::RngExt;
use sha2::{Digest, Sha256};
use walferry_tls::{Outsiders, PrivateFileError, open_private};

/// The user of a client that has not said otherwise.
pub const DEFAULT_USER: &str = "default";
/// Users at most.
pub const USERS_MAX: usize = 128;
/// Passwords of one user at most.
pub const PASSWORDS_MAX: usize = 8;
/// A user's name is at most this long.
pub const USER_NAME_BYTES_MAX: usize = 64;
/// A larger file is refused.
const USERS_FILE_BYTES_MAX: u64 = 64 << 10;
/// A file of systemd's credentials is named by this and its name.
const CREDENTIAL_PREFIX: &str = "credential:";
/// Where systemd says that they are.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// Verified passwords that are remembered; beyond it all are verified anew.
const VERIFIED_MAX: usize = 4096;

type PasswordHash = [u8; 32];

/// How a password is known.
#[derive(Clone, PartialEq, Eq)]
enum Password {
    /// Compared at once.
    Sha256(PasswordHash),
    /// Compared by another thread.
    Salted(SaltedHash),
}

/// What a user may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grant {
    /// Nothing.
    #[default]
    Nothing,
    /// Reads, and what concerns its own connection.
    Read,
    /// Writes too, but nothing that concerns the node or other clients.
    Write,
    /// Everything: an operator.
    All,
}

/// What a name and a password come to.
pub enum Judged {
    /// Name and password are right.
    Right(Rc<User>),
    /// Name or password is wrong.
    Wrong,
    /// It takes a thread that has time for it.
    Check(Check),
}

/// A password that has to be compared with salted hashes, any of them.
pub struct Check {
    /// Whose they are; none: it is only made to look like a user.
    pub user: Option<Rc<User>>,
    /// The hashes.
    pub hashes: Vec<SaltedHash>,
    /// Names the user and the password in the memory of verified ones.
    remembered_as: PasswordHash,
}

/// Users and passwords that were found right, so that whoever connects again does not wait. It holds no password: entries are
/// digests under a key that only this process has, and they go with the users that they were made from.
#[derive(Clone, Default)]
struct Verified {
    key: OnceCell<PasswordHash>,
    known: RefCell<HashSet<PasswordHash>>,
}

impl Verified {
    fn digest(&self, name: &str, password: &[u8]) -> PasswordHash {
        let key = self.key.get_or_init(|| rand::rng().random());
        let length = (name.len() as u64).to_le_bytes();
        Sha256::new().chain_update(key).chain_update(length).chain_update(name).chain_update(password).finalize().into()
    }

    fn remember(&self, digest: PasswordHash) {
        let mut known = self.known.borrow_mut();
        if known.len() >= VERIFIED_MAX {
            known.clear();
        }
        known.insert(digest);
    }
}

/// One user.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// What it says in AUTH.
    pub name: String,
    /// What it may do.
    pub grant: Grant,
    enabled: bool,
    any_password: bool,
    passwords: Vec<Password>,
}

/// Hashes of weak passwords are as good as the passwords: they are told to who asks with ACL LIST, and to no log.
impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "User {:?} ({:?})", self.name, self.grant)
    }
}

/// All users of a node.
#[derive(Clone)]
pub struct Users {
    users: BTreeMap<String, Rc<User>>,
    /// What a login that cannot be right is compared with, where others are compared with salted hashes: it takes as long.
    decoy: Option<SaltedHash>,
    verified: Verified,
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Users").field(&self.users).finish()
    }
}

impl PartialEq for Users {
    fn eq(&self, other: &Users) -> bool {
        self.users == other.users
    }
}

impl Eq for Users {}

/// Why a users' file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// It cannot be read, or anybody on the host can read the passwords.
    #[error("cannot read users_file {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said, or that its mode is too wide.
        source: PrivateFileError,
    },
    /// A line that is no user.
    #[error("users_file {file}, line {line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong; never a password.
        reason: String,
    },
}

impl Default for Users {
    fn default() -> Users {
        Users::open(None)
    }
}

fn hash(password: &[u8]) -> PasswordHash {
    Sha256::digest(password).into()
}

fn hex(hash: &PasswordHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Option<PasswordHash> {
    let mut hash = PasswordHash::default();
    if digits.len() != 2 * hash.len() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}

/// Compares without telling by its time how much is alike.
fn is_same(a: &PasswordHash, b: &PasswordHash) -> bool {
    a.iter().zip(b).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
}

impl User {
    fn new(name: &str) -> User {
        User {
            name: name.to_owned(),
            grant: Grant::Nothing,
            enabled: false,
            any_password: false,
            passwords: Vec::new(),
        }
    }

    /// Takes one rule; says what is wrong with it, without a password.
    fn take(&mut self, rule: &str) -> Result<(), String> {
        match rule {
            "on" => self.enabled = true,
            "off" => self.enabled = false,
            "nopass" => self.any_password = true,
            "~*" | "allkeys" | "&*" | "allchannels" => {}
            "+@all" | "allcommands" => self.grant = Grant::All,
            "+@read" => self.grant = self.grant.max(Grant::Read),
            "+@write" if self.grant >= Grant::Read => self.grant = self.grant.max(Grant::Write),
            "-@admin" => self.grant = self.grant.min(Grant::Write),
            "-@write" | "-@dangerous" if self.grant < Grant::Write => {}
            _ => return self.take_password(rule),
        }
        Ok(())
    }

    fn take_password(&mut self, rule: &str) -> Result<(), String> {
        let password = match (rule, rule.split_at_checked(1)) {
            (_, Some((">", password))) => Password::Sha256(hash(password.as_bytes())),
            (_, Some(("#", digits))) => Password::Sha256(
                unhex(digits).ok_or("after # come the 64 hexadecimal digits of the password's SHA-256")?,
            ),
            (_, Some(("$", _))) => Password::Salted(rule.parse()?),
            (_, Some(("<" | "!", _))) => return Err("passwords are only added: begin the file's line anew".to_owned()),
            // A password that lacks its > must not get into a log.
            (_, Some((sign, _))) if !"+-~&%@(".contains(sign) => {
                return Err("a word is no rule; a password begins with >".to_owned());
            }
            _ => {
                return Err(format!(
                    "the rule {rule:?} is not supported here: on, off, >password, #sha256, $argon2id$..., nopass, ~*, +@all, -@admin, \
                     +@read, +@write (after +@read), -@write (after +@read alone)"
                ));
            }
        };
        if self.passwords.len() >= PASSWORDS_MAX {
            return Err(format!("a user has at most {PASSWORDS_MAX} passwords"));
        }
        self.passwords.push(password);
        Ok(())
    }

    /// Whether the password is right, by what can be compared at once.
    fn is_right(&self, password: &PasswordHash) -> bool {
        // All of them are looked at, whichever is right.
        let found = self.passwords.iter().fold(false, |found, known| match known {
            Password::Sha256(known) => found | is_same(known, password),
            Password::Salted(_) => found,
        });
        self.enabled && (self.any_password || found)
    }

    fn salted(&self) -> impl Iterator<Item = &SaltedHash> {
        self.passwords.iter().filter_map(|password| match password {
            Password::Salted(hash) => Some(hash),
            Password::Sha256(_) => None,
        })
    }

    /// Its line in ACL LIST.
    fn rules(&self) -> String {
        let mut line = format!("user {} {}", self.name, if self.enabled { "on" } else { "off" });
        if self.any_password {
            line.push_str(" nopass");
        }
        for password in &self.passwords {
            match password {
                Password::Sha256(hash) => line.push_str(&format!(" #{}", hex(hash))),
                Password::Salted(hash) => line.push_str(&format!(" {hash}")),
            }
        }
        line.push_str(match self.grant {
            Grant::All => " ~* &* +@all",
            Grant::Write => " ~* &* -@all +@read +@write",
            Grant::Read => " ~* &* -@all +@read",
            Grant::Nothing => " -@all",
        });
        line
    }
}

impl Users {
    /// Everybody may do everything, or everybody with this password.
    pub fn open(password: Option<&str>) -> Users {
        let mut user = User { enabled: true, grant: Grant::All, ..User::new(DEFAULT_USER) };
        match password {
            Some(password) => user.passwords.push(Password::Sha256(hash(password.as_bytes()))),
            None => user.any_password = true,
        }
        Users::new(BTreeMap::from([(DEFAULT_USER.to_owned(), Rc::new(user))]))
    }

    fn new(users: BTreeMap<String, Rc<User>>) -> Users {
        let decoy = users.values().find_map(|user| user.salted().next()).map(SaltedHash::decoy);
        Users { users, decoy, verified: Verified::default() }
    }

    /// The users of a file that only its owner and its group can read.
    pub fn load(file: &Path) -> Result<Users, UsersError> {
        let path = resolve(file);
        let failed = |source| UsersError::Read { file: path.clone(), source };
        let opened = open_private(&path, Outsiders::Others).map_err(failed)?;
        let mut text = String::new();
        opened.take(USERS_FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| failed(error.into()))?;
        if text.len() as u64 > USERS_FILE_BYTES_MAX {
            return Err(failed(io::Error::from(io::ErrorKind::FileTooLarge).into()));
        }
        Users::parse(&text, &path.display().to_string())
    }

    /// The users that `text` names; `file` is for messages. Without a line for it nobody is `default`.
    pub fn parse(text: &str, file: &str) -> Result<Users, UsersError> {
        let mut users = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let wrong = |reason: String| UsersError::Line { file: file.to_owned(), line: index + 1, reason };
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                None => continue,
                Some(word) if word.starts_with('#') => continue,
                Some("user") => {}
                Some(_) => return Err(wrong("a line begins with `user` or #".to_owned())),
            }
            let name = words.next().ok_or_else(|| wrong("`user` is followed by a name".to_owned()))?;
            let fits = name.len() <= USER_NAME_BYTES_MAX && name.bytes().all(|byte| byte.is_ascii_graphic());
            if !fits || name.starts_with(['>', '#', '~', '+', '-', '&']) {
                return Err(wrong(format!("a name has at most {USER_NAME_BYTES_MAX} plain characters")));
            }
            if users.len() >= USERS_MAX {
                return Err(wrong(format!("a node has at most {USERS_MAX} users")));
            }
            let mut user = User::new(name);
            for rule in words {
                user.take(rule).map_err(wrong)?;
            }
            if users.insert(name.to_owned(), Rc::new(user)).is_some() {
                return Err(wrong(format!("the user {name} stands here twice")));
            }
        }
        Ok(Users::new(users))
    }

    /// Whom a client is at its start: `default`, if that needs no password.
    pub fn at_start(&self) -> Option<Rc<User>> {
        self.users.get(DEFAULT_USER).filter(|user| user.enabled && user.any_password).cloned()
    }

    /// Judges a name and a password. Takes as long for a user that there is not.
    pub fn authenticate(&self, name: &[u8], password: &[u8]) -> Judged {
        let given = hash(password);
        let name = std::str::from_utf8(name).unwrap_or_default();
        let known = self.users.get(name);
        if let Some(user) = known.filter(|user| user.is_right(&given)) {
            return Judged::Right(Rc::clone(user));
        }
        let Some(decoy) = &self.decoy else { return Judged::Wrong };
        let remembered_as = self.verified.digest(name, password);
        match known.filter(|user| user.enabled && user.salted().next().is_some()) {
            Some(user) if self.verified.known.borrow().contains(&remembered_as) => Judged::Right(Rc::clone(user)),
            Some(user) => {
                let hashes = user.salted().cloned().collect();
                Judged::Check(Check { user: Some(Rc::clone(user)), hashes, remembered_as })
            }
            None => Judged::Check(Check { user: None, hashes: vec![decoy.clone()], remembered_as }),
        }
    }

    /// The password of `check` was found right: the user, if there is one and it is still the same. It may be remembered.
    pub fn verified(&self, check: &Check) -> Option<Rc<User>> {
        let user = check.user.as_ref().filter(|user| self.users.get(&user.name) == Some(user))?;
        self.verified.remember(check.remembered_as);
        Some(Rc::clone(user))
    }

    /// The user of this name as it is now.
    pub fn get(&self, name: &str) -> Option<&Rc<User>> {
        self.users.get(name)
    }

    /// The lines of ACL LIST, passwords as hashes.
    pub fn lines(&self) -> Vec<String> {
        self.users.values().map(|user| user.rules()).collect()
    }
}

/// `credential:NAME` is a file that systemd gives to this service alone.
fn resolve(file: &Path) -> PathBuf {
    let name = file.to_str().and_then(|text| text.strip_prefix(CREDENTIAL_PREFIX));
    match (name, std::env::var_os(CREDENTIALS_VARIABLE)) {
        (Some(name), Some(directory)) => Path::new(&directory).join(name),
        _ => file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Users, String> {
        Users::parse(text, "users").map_err(|error| error.to_string())
    }

    #[test]
    fn users_log_in_with_each_of_their_passwords_only() {
        let sha256 = hex(&hash(b"two"));
        let users = parse(&format!(
            "# people\nuser default on >one #{sha256} ~* +@all\n\nuser reader on >three +@read -@write\nuser gone off >one\n"
        ));
        let users = users.expect("a right file");
        let grant = |name: &str, password: &str| match users.authenticate(name.as_bytes(), password.as_bytes()) {
            Judged::Right(user) => Some(user.grant),
            Judged::Wrong => None,
            Judged::Check(_) => panic!("no user has a salted hash"),
        };
        assert_eq!(grant("default", "one"), Some(Grant::All));
        assert_eq!(grant("default", "two"), Some(Grant::All));
        assert_eq!(grant("reader", "three"), Some(Grant::Read));
        for (name, password) in
            [("default", ""), ("default", "onex"), ("default", "three"), ("gone", "one"), ("nobody", "one")]
        {
            assert_eq!(grant(name, password), None, "{name} {password}");
        }
        assert_eq!(users.at_start(), None, "a password is asked for");
        assert_eq!(users.lines()[2], format!("user reader on #{} ~* &* -@all +@read", hex(&hash(b"three"))));
        let again = users.lines().join("\n").replace("-@all ", "");
        assert_eq!(parse(&again.replace(" -@all", "")), Ok(users), "what ACL LIST tells is a users' file");
    }

    #[test]
    fn salted_passwords_are_compared_elsewhere_and_remembered() {
        let salted = SaltedHash::with_costs(b"secret", 8, 1, 1);
        let text =
            format!("user app on {salted} +@all -@admin\nuser plain on >plain +@read\nuser gone off {salted} +@all\n");
        let users = parse(&text).expect("a right file");
        let check = |name: &str, password: &str| match users.authenticate(name.as_bytes(), password.as_bytes()) {
            Judged::Check(check) => check,
            Judged::Right(_) => panic!("{name} {password} is right at once"),
            Judged::Wrong => panic!("{name} {password} is told wrong at once, which tells who has a salted hash"),
        };
        // Whatever is wrong takes a comparison, and is wrong then.
        for (name, password) in [("nobody", "secret"), ("plain", "secret"), ("gone", "secret"), ("app", "plain")] {
            let check = check(name, password);
            assert_eq!(check.hashes.len(), 1);
            assert!(!check.hashes[0].is_right(password.as_bytes()), "{name} {password}");
        }
        assert!(matches!(users.authenticate(b"plain", b"plain"), Judged::Right(user) if user.grant == Grant::Read));
        let right = check("app", "secret");
        assert!(right.hashes[0].is_right(b"secret"));
        assert_eq!(users.verified(&right).map(|user| user.grant), Some(Grant::Write));
        assert!(matches!(users.authenticate(b"app", b"secret"), Judged::Right(user) if user.name == "app"));
        check("app", "secre");
        check("gone", "secret");
        // With the users goes what was remembered of them, and a comparison that they had begun says nothing about others.
        let others = parse("user app on >new +@all\n").expect("a right file");
        assert!(others.verified(&right).is_none());
        assert!(matches!(others.authenticate(b"app", b"secret"), Judged::Wrong));
    }

    #[test]
    fn role_of_programs_writes_and_is_no_operator() {
        for rules in ["+@all -@admin", "+@read +@write", "+@read +@write -@admin"] {
            let users = parse(&format!("user default on nopass {rules}")).expect("a right file");
            assert_eq!(users.at_start().map(|user| user.grant), Some(Grant::Write), "{rules}");
            assert!(users.lines()[0].ends_with("-@all +@read +@write"), "{:?}", users.lines());
        }
        // A rule that would mean less than it says is refused.
        for (rules, refused) in [
            ("+@write", "+@write"),
            ("+@read +@write -@write", "-@write"),
            ("+@all -@admin -@dangerous", "-@dangerous"),
        ] {
            let error = parse(&format!("user a {rules}")).expect_err(rules);
            assert!(error.contains(&format!("the rule {refused:?} is not supported")), "{error}");
        }
    }

    #[test]
    fn verified_passwords_that_are_remembered_are_bounded() {
        let verified = Verified::default();
        (0..3 * VERIFIED_MAX).for_each(|number| verified.remember(verified.digest("app", &number.to_le_bytes())));
        assert!(verified.known.borrow().len() <= VERIFIED_MAX);
        assert_ne!(verified.digest("ab", b"c"), verified.digest("a", b"bc"));
        assert_ne!(verified.digest("a", b"b"), Verified::default().digest("a", b"b"), "each process has its own key");
    }

    #[test]
    fn a_file_without_default_lets_nobody_in_unasked() {
        assert_eq!(parse("user a on >x +@all").expect("a right file").at_start(), None);
        assert_eq!(parse("user default off nopass +@all").expect("a right file").at_start(), None);
        let open = parse("user default on nopass +@read").expect("a right file");
        assert_eq!(open.at_start().map(|user| user.grant), Some(Grant::Read));
        assert_eq!(Users::open(None).at_start().map(|user| user.grant), Some(Grant::All));
        assert_eq!(Users::open(Some("x")).at_start(), None);
    }

    #[test]
    fn unsupported_rule_is_named_without_the_password() {
        for (text, wanted) in [
            ("user a on +get", "line 1: the rule \"+get\" is not supported"),
            ("\nuser a on ~cache:*", "line 2: the rule \"~cache:*\" is not supported"),
            ("user a +@all -@write", "the rule \"-@write\" is not supported"),
            ("user a #abc", "64 hexadecimal digits"),
            ("user a <secret", "only added"),
            ("user a on secret", "a password begins with >"),
            ("users a on", "begins with `user`"),
            ("user", "followed by a name"),
            ("user >secret on", "plain characters"),
            ("user a on\nuser a off", "line 2: the user a stands here twice"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(wanted) && !error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_that_everybody_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("users");
        std::fs::write(&file, "user default on >x +@all\n").expect("it is written");
        let chmod = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("our file");
        chmod(0o644);
        assert!(Users::load(&file).expect_err("open to all").to_string().contains("chmod 640"));
        chmod(0o640);
        assert!(Users::load(&file).is_ok());
    }
}
