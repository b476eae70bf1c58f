//! The guest's clients: `power write` sends values and tells the host of each acknowledgement after it came; `power read` prints
//! which values a node holds. A node that is killed meanwhile is waited for, and the value that was under way is sent again.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use walferry_client::{Client, ClientError, Reply, Url, encode_command};

use super::{ACKNOWLEDGED_PORT, open_port, values};
use crate::error::{During, Failure};
use crate::promise::SLOTS;

/// A node that is gone is looked for so often.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(50);
/// An answer may take so long: a disk may stand still for a while.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Somebody leads within this time.
const LEADER_TIME_MAX: Duration = Duration::from_secs(180);

/// Flags of `power write`.
#[derive(Debug, clap::Args)]
pub struct WriteArgs {
    /// The node's clients connect here; of several, the writers go on to the next when one does not take a write
    #[arg(long, value_delimiter = ',')]
    addresses: Vec<String>,
    /// So many connections, each with values of its own
    #[arg(long)]
    writers: usize,
    /// The commit level
    #[arg(long)]
    level: String,
    /// Tell of values that are only sent, too: a client that lies, for the checker's own test
    #[arg(long)]
    early: bool,
}

/// Flags of `power read`.
#[derive(Debug, clap::Args)]
pub struct ReadArgs {
    /// Clients connect here; of several nodes, the one that leads is read
    #[arg(long, value_delimiter = ',')]
    addresses: Vec<String>,
    /// So many writers have written
    #[arg(long)]
    writers: usize,
}

fn open(address: &str) -> Result<Client, ClientError> {
    let url: Url = format!("redis://{address}").parse().expect("an address");
    let mut client = Client::connect_within(&url, RECONNECT_INTERVAL * 20)?;
    client.set_answer_time_max(ANSWER_TIME_MAX)?;
    Ok(client)
}

/// Writes until the machine is cut off or the process is killed.
pub fn write(args: &WriteArgs) -> Result<(), Failure> {
    let port = Mutex::new(open_port(ACKNOWLEDGED_PORT).during("open the port for acknowledgements")?);
    std::thread::scope(|scope| {
        for writer in 0..args.writers {
            let port = &port;
            scope.spawn(move || write_values(args, writer, port));
        }
    });
    Ok(())
}

fn write_values(args: &WriteArgs, writer: usize, port: &Mutex<File>) {
    let mut chosen = 0;
    let mut client = None;
    let mut told = 0;
    let mut tell = |number: u64| {
        if number > told {
            told = number;
            let line = format!("{writer} {number}\n");
            port.lock().expect("the port's lock").write_all(line.as_bytes()).expect("the host listens");
        }
    };
    for number in 1.. {
        if args.early {
            tell(number);
        }
        loop {
            let address = &args.addresses[chosen % args.addresses.len()];
            match try_value(&mut client, address, &args.level, writer, number) {
                Ok(()) => break,
                Err(error) => {
                    if matches!(error, ClientError::Refused { .. }) {
                        eprintln!("{error}");
                    }
                    client = None;
                    chosen += 1;
                    std::thread::sleep(RECONNECT_INTERVAL);
                }
            }
        }
        tell(number);
    }
}

fn try_value(
    client: &mut Option<Client>,
    address: &str,
    level: &str,
    writer: usize,
    number: u64,
) -> Result<(), ClientError> {
    if client.is_none() {
        let mut fresh = open(address)?;
        fresh.call(&["COMMITLEVEL", level])?;
        *client = Some(fresh);
    }
    let client = client.as_mut().expect("just opened");
    let key = values::key(writer, number % SLOTS);
    client.call(&["SET", &key, &values::value(writer, number)])?;
    Ok(())
}

/// Prints `writer slot number` for each key that the node holds. Fails when a value is not what was sent.
pub fn read(args: &ReadArgs) -> Result<(), Failure> {
    let mut client = leader(&args.addresses)?;
    let mut out = std::io::stdout().lock();
    for writer in 0..args.writers {
        let mut request = Vec::new();
        (0..SLOTS).for_each(|slot| encode_command(&mut request, &[b"GET", values::key(writer, slot).as_bytes()]));
        client.send(&request, "GET").map_err(Failure::failed)?;
        for slot in 0..SLOTS {
            let reply = client.receive("GET").map_err(Failure::failed)?;
            if matches!(reply, Reply::Nil) {
                continue;
            }
            let number = values::number(writer, slot, &reply.text().unwrap_or_default())?;
            writeln!(out, "{writer} {slot} {number}").during("print")?;
        }
    }
    Ok(())
}

/// A connection to the node that leads.
fn leader(addresses: &[String]) -> Result<Client, Failure> {
    let deadline = Instant::now() + LEADER_TIME_MAX;
    loop {
        for address in addresses {
            let Ok(mut client) = open(address) else { continue };
            let role = client.call(&["ROLE"]).ok().and_then(|reply| reply.items().first()?.text());
            // An epoch that was just begun is applied before its leader takes a write.
            if role.as_deref() == Some("master") && client.call(&["SET", "read", "now"]).is_ok() {
                return Ok(client);
            }
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(format_args!("none of {} leads", addresses.join(", "))));
        }
        std::thread::sleep(RECONNECT_INTERVAL);
    }
}

/// Waits until a file is there, or a process has ended: `power await`.
#[derive(Debug, clap::Args)]
pub struct AwaitArgs {
    /// The file
    #[arg(long)]
    file: std::path::PathBuf,
    /// The process that makes it
    #[arg(long)]
    process: i32,
    /// At most so many seconds
    #[arg(long)]
    seconds: u64,
}

/// Fails when the process ended first, or nothing came in time.
pub fn wait(args: &AwaitArgs) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(args.seconds);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", args.process));
        let running = stat.is_ok_and(|stat| !stat.contains(") Z "));
        if args.file.exists() {
            return Ok(());
        }
        if !running {
            return Err(Failure::failed("the node ended"));
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(format_args!("nothing after {} s", args.seconds)));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
