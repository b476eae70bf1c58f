//! The guest's other clients: `power fill` sends a number of equal values one after another and prints how long it took;
//! `power info` prints what a node says of itself.

use std::time::{Duration, Instant};

use walferry_client::{Client, ClientError, Url};

use crate::error::Failure;

/// So many keys take turns: the store stays small however long the log becomes.
const KEYS: u64 = 8;
/// A commit may have to wait for a replica that is far behind.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(600);

/// Flags of `power fill`.
#[derive(Debug, clap::Args)]
pub struct FillArgs {
    /// Clients connect here
    #[arg(long)]
    address: String,
    /// The commit level
    #[arg(long)]
    level: String,
    /// How many values
    #[arg(long)]
    count: u64,
    /// Of how many bytes
    #[arg(long)]
    bytes: usize,
}

/// Flags of `power info`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// Clients connect here
    #[arg(long)]
    address: String,
}

fn open(address: &str) -> Result<Client, ClientError> {
    let url: Url = format!("redis://{address}").parse().expect("an address");
    let mut client = Client::connect(&url)?;
    client.set_answer_time_max(ANSWER_TIME_MAX)?;
    Ok(client)
}

/// Prints the seconds until the last was acknowledged.
pub fn fill(args: &FillArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let fill = || -> Result<(), ClientError> {
        let mut client = open(&args.address)?;
        client.call(&["COMMITLEVEL", &args.level])?;
        for number in 0..args.count {
            let letter = char::from(b'a' + (number % 26) as u8);
            let value: String = std::iter::repeat_n(letter, args.bytes).collect();
            client.call(&["SET", &format!("fill:{}", number % KEYS), &value])?;
        }
        Ok(())
    };
    fill().map_err(Failure::failed)?;
    println!("{}", started.elapsed().as_secs_f64());
    Ok(())
}

/// Prints INFO.
pub fn info(args: &InfoArgs) -> Result<(), Failure> {
    let reply = open(&args.address).and_then(|mut client| client.call(&["INFO"])).map_err(Failure::failed)?;
    println!("{}", reply.text().unwrap_or_default());
    Ok(())
}
