//! The control socket of a running `walferry link`: one line asks, the answer's first line is `ok` or `error: ...`.
//! Requests: `set KEY=VALUE...`, `cut out|back|both`, `heal out|back|both`, `rtt`, `status`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use nix::unistd::geteuid;

use super::Link;
use super::shape::Direction;
use walferry_node::own_files;

/// The longest request.
const REQUEST_BYTES_MAX: u64 = 4096;
/// A client that sends nothing for so long is left.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer takes at most as long as measuring a round trip does.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const SUFFIX: &str = "sock";

/// The directory of this user's links. Others may write to the directory for temporary files, and this one is only used when it is
/// a directory of this user alone.
fn directory() -> std::io::Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("walferry-link-{}", geteuid()));
    own_files::make_private_directory(&path)?;
    Ok(path)
}

/// Where a link of this process listens unless told.
pub fn default_path() -> std::io::Result<PathBuf> {
    Ok(directory()?.join(format!("{}.{SUFFIX}", std::process::id())))
}

/// Serves requests until the link is taken away.
pub fn serve(listener: &UnixListener, link: &Mutex<Option<Link>>) {
    for client in listener.incoming().flatten() {
        let Ok(mut link) = link.lock() else { return };
        let Some(link) = link.as_mut() else { return };
        if let Err(error) = answer_client(&client, link) {
            tracing::debug!("a client of the control socket was lost: {error}");
        }
    }
}

fn answer_client(mut client: &UnixStream, link: &mut Link) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(client.take(REQUEST_BYTES_MAX)).read_line(&mut line)?;
    match answer(line.trim(), link) {
        Ok(text) => writeln!(client, "ok\n{text}"),
        Err(error) => writeln!(client, "error: {error}"),
    }
}

fn directions(word: Option<&str>) -> Result<&'static [Direction], String> {
    match word {
        None | Some("both") => Ok(&Direction::BOTH),
        Some("out") => Ok(&Direction::BOTH[..1]),
        Some("back") => Ok(&Direction::BOTH[1..]),
        Some(other) => Err(format!("{other:?} is no direction: write out, back or both")),
    }
}

fn answer(request: &str, link: &mut Link) -> Result<String, String> {
    let mut words = request.split_whitespace();
    let failed = |error: std::io::Error| error.to_string();
    match words.next() {
        Some("set") => {
            let mut shape = link.control().behaviour().shape;
            words.try_for_each(|assignment| shape.assign(assignment))?;
            link.set(shape.checked()?).map_err(failed)?;
            Ok(shape.to_string())
        }
        Some("cut") => link.cut(directions(words.next())?).map(|()| "cut".to_owned()).map_err(failed),
        Some("heal") => link.heal(directions(words.next())?).map(|()| "healed".to_owned()).map_err(failed),
        Some("rtt") => link.measure_rtt().map(|rtt| rtt.to_string()).map_err(failed),
        Some("status") => Ok(format!("{:#}", link.status())),
        _ => Err(format!("{request:?}: expected set, cut, heal, rtt or status")),
    }
}

/// Asks the link at `path`, or the only one that runs here.
pub fn ask(path: Option<&Path>, request: &str) -> Result<String, String> {
    let mut socket = match path {
        Some(path) => UnixStream::connect(path).map_err(|error| format!("--control {}: {error}", path.display()))?,
        None => only_link()?,
    };
    let failed = |error: std::io::Error| format!("the link did not answer: {error}");
    socket.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    writeln!(socket, "{request}").map_err(failed)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).map_err(failed)?;
    match answer.split_once('\n') {
        Some(("ok", text)) => Ok(text.trim_end().to_owned()),
        Some((error, _)) => Err(error.strip_prefix("error: ").unwrap_or(error).to_owned()),
        None => Err("the link ended before it answered".to_owned()),
    }
}

/// The only link that answers; sockets that a killed link left behind do not.
fn only_link() -> Result<UnixStream, String> {
    let dir = directory().map_err(|error| error.to_string())?;
    let is_link = |path: &PathBuf| path.extension().is_some_and(|end| end == SUFFIX);
    let entries = dir.read_dir().map_err(|error| format!("{}: {error}", dir.display()))?;
    let paths = entries.flatten().map(|entry| entry.path()).filter(is_link);
    let mut links: Vec<(PathBuf, UnixStream)> =
        paths.filter_map(|path| UnixStream::connect(&path).ok().map(|socket| (path, socket))).collect();
    match links.len() {
        0 => Err("no link runs here; start one with `walferry link`, or name its socket with --control".to_owned()),
        1 => Ok(links.remove(0).1),
        _ => {
            let paths: Vec<String> = links.iter().map(|(path, _)| path.display().to_string()).collect();
            Err(format!("several links run here, choose one with --control: {}", paths.join(", ")))
        }
    }
}
