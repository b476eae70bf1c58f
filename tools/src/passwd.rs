//! `walferry passwd`: a line for the users' file, with a salted hash in the place of the password. Asks no node and changes no file.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::cli::read_password;
use crate::failure::{Failure, say};
use walferry_node::session::resp::UNAUTHENTICATED_ARG_BYTES_MAX;
use walferry_node::users::Users;
use walferry_node::users::salted::SaltedHash;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry passwd app >> /etc/walferry/users                asks twice, and prints the user's line
  pwgen 32 1 | walferry passwd reports --role reader        from the standard input
  walferry passwd default --role operator --password-file secret

The hash is salted Argon2id (19 MiB, two passes): a node takes some tens of milliseconds for it, beside its commits, and remembers in memory
whom it has verified. It logs in as with any other password: AUTH NAME PASSWORD. After the line is in `users_file`, `systemctl reload` (or ACL
LOAD) makes the node read it. A password that stands there as #SHA256 still works, and is compared faster, by thieves of the file too.

Exit codes: 0 printed; 1 there was no password to read; 2 wrong usage.";

/// What the user may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UserRole {
    /// Everything
    Operator,
    /// Reads and writes, and nothing that concerns the node or other clients
    Program,
    /// Reads
    Reader,
}

impl UserRole {
    fn rules(self) -> &'static str {
        match self {
            UserRole::Operator => "+@all",
            UserRole::Program => "+@all -@admin",
            UserRole::Reader => "+@read",
        }
    }
}

/// Flags of `walferry passwd`.
#[derive(Debug, Args)]
pub struct PasswdArgs {
    /// The user
    #[arg(value_name = "NAME")]
    name: String,
    /// What it may do
    #[arg(long, value_enum, default_value = "program")]
    role: UserRole,
}

/// Runs `walferry passwd`.
pub fn run(args: &PasswdArgs, file: Option<&PathBuf>) -> Result<(), Failure> {
    let line = |password: &str| format!("user {} on {password} ~* {}", args.name, args.role.rules());
    // Before anybody types anything.
    Users::parse(&line(">x"), "the command line").map_err(|error| Failure::Usage(error.to_string()))?;
    let password = match file.map(|file| read_password(file as &Path)) {
        Some(read) => read?,
        None if io::stdin().is_terminal() => ask(&args.name)?,
        None => {
            let mut text = String::new();
            let mut input = io::stdin().lock().take(UNAUTHENTICATED_ARG_BYTES_MAX as u64 + 2);
            input.read_line(&mut text).map_err(Failure::failed)?;
            text.trim_end_matches(['\r', '\n']).to_owned()
        }
    };
    if password.is_empty() || password.len() > UNAUTHENTICATED_ARG_BYTES_MAX {
        let text = format!("a password has 1 to {UNAUTHENTICATED_ARG_BYTES_MAX} bytes: give it on the standard input");
        return Err(Failure::Failed(text));
    }
    say(line(&SaltedHash::of(password.as_bytes()).to_string()))
}

/// Asks twice.
fn ask(name: &str) -> Result<String, Failure> {
    let first = ask_once(&format!("Password of {name}: ")).map_err(Failure::failed)?;
    let again = ask_once("The same again: ").map_err(Failure::failed)?;
    if first == again { Ok(first) } else { Err(Failure::failed("the two are not the same")) }
}

/// Asks on the terminal, which does not show what is typed.
fn ask_once(prompt: &str) -> io::Result<String> {
    let stdin = io::stdin();
    let mut before: std::mem::MaybeUninit<libc::termios> = std::mem::MaybeUninit::uninit();
    // SAFETY: it fills the structure that it is given, or fails.
    if unsafe { libc::tcgetattr(stdin.as_raw_fd(), before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was filled just now.
    let before = unsafe { before.assume_init() };
    let mut silent = before;
    silent.c_lflag &= !libc::ECHO;
    let set = |how: &libc::termios| {
        // SAFETY: it reads the structure that it is given.
        let set = unsafe { libc::tcsetattr(stdin.as_raw_fd(), libc::TCSAFLUSH, how) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    let mut out = io::stderr();
    write!(out, "{prompt}")?;
    out.flush()?;
    set(&silent)?;
    let mut text = String::new();
    let read = stdin.lock().read_line(&mut text);
    set(&before)?;
    writeln!(out)?;
    read?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}
