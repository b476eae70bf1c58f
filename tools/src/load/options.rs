//! The flags of `walferry load` and what they must fulfil. Called by the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::run::Options;
use super::script::{BUILTINS, PAYLOAD_BYTES_MAX};
use super::target::Target;
use crate::client::Url;
use crate::failure::Failure;

/// Connections that one run may open.
const CLIENTS_MAX: usize = 10_000;
/// Threads that one run may start.
const THREADS_MAX: usize = 256;
/// A hundred million accounts.
const SCALE_MAX: i64 = 1_000;
/// What each client does when neither -t nor -T is given, as in pgbench.
const TRANSACTIONS_DEFAULT: u64 = 10;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry load -i -s 10                                  fill the tables: a million accounts
  walferry load -c 16 -j 2 -T 30 -P 5                     tpcb-like, 16 clients, 30 seconds, progress every 5
  walferry load -c 8 -T 10 --level remote_apply --check   and verify the sums on the leader and every replica
  walferry load -c 64 -T 60 -R 5000 --log run.hlog        5000 transactions a second, latency from the schedule
  walferry load -c 64 -T 10 -b append --level remote_apply --url postgres://postgres@127.0.0.1/postgres
  walferry load -c 4 -t 1000 -f order.script@9 -f stock.script@1 -r

Built-in scripts: tpcb-like (one transaction: account, teller, branch, history), simple-update (account, history),
append (one stream entry of -d bytes), select-only.

A script is a file with one command a line, as for redis-cli. `:name` stands for a variable; `:payload` for -d random
bytes; naccounts, ntellers, nbranches, scale, client_id and random_seed are set. Between them:
  \\set id random(1, :naccounts)      also random_zipfian(low, high, s), random_exponential, random_gaussian,
                                     + - * / %, abs, least, greatest
  \\sleep 10 ms
  \\startpipeline ... \\endpipeline    commands are sent together, answers awaited at the end

PostgreSQL runs the built-in scripts, prepared, in tables load_*, with synchronous_commit set from --level. On Redis --level
ends each transaction with WAIT 1 (remote_write) or WAITAOF 1 1 (remote_flush, remote_apply; from 7.2 on).

Exit codes: 0 the run ended or was interrupted (failed transactions are reported); 1 the node cannot be reached, no
transaction succeeded, or --check found sums that disagree; 2 wrong usage.";

/// Flags of `walferry load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// A node, or for comparison redis://HOST:PORT or postgres://USER[:PASSWORD]@HOST[:PORT]/DATABASE
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    pub url: Target,
    /// Fill the tables of the built-in scripts with zeros, and do nothing else
    #[arg(short = 'i', long = "initialize", visible_alias = "init")]
    pub init: bool,
    /// Clients, each with its own connection
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    pub clients: usize,
    /// Threads that drive them
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,
    /// Run so many seconds
    #[arg(short = 'T', long, value_name = "SECONDS", conflicts_with = "transactions")]
    pub time: Option<u64>,
    /// Run so many transactions in each client [default: 10]
    #[arg(short = 't', long, value_name = "N")]
    pub transactions: Option<u64>,
    /// Show progress every so many seconds
    #[arg(short = 'P', long, value_name = "SECONDS")]
    pub progress: Option<u64>,
    /// So many transactions a second in all, on schedule; latency counts from the scheduled time
    #[arg(short = 'R', long, value_name = "TPS", allow_negative_numbers = true)]
    pub rate: Option<f64>,
    /// Scale: 100000 accounts, 10 tellers, 1 branch each; for a run the scale of the tables counts
    #[arg(short, long, value_name = "N")]
    pub scale: Option<i64>,
    /// A script; with several, each is chosen by its weight
    #[arg(short, long, value_name = "FILE[@WEIGHT]")]
    pub file: Vec<String>,
    /// A built-in script [default: tpcb-like]
    #[arg(short, long, value_name = "NAME[@WEIGHT]")]
    pub builtin: Vec<String>,
    /// Set a variable for scripts
    #[arg(short = 'D', long = "define", value_name = "NAME=NUMBER")]
    pub define: Vec<String>,
    /// Bytes of `:payload`
    #[arg(short, long, value_name = "BYTES", default_value_t = 100)]
    pub data_bytes: usize,
    /// Report the latency of each command
    #[arg(short = 'r', long = "report-per-command")]
    pub per_command: bool,
    /// Ask for this commit level on each connection: off, local, remote_write, remote_flush, remote_apply
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<String>,
    /// Seed of all random numbers; the same seed repeats them
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Write a histogram of each second to this HdrHistogram interval log
    #[arg(long, value_name = "FILE.hlog")]
    pub log: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Afterwards verify that accounts, tellers, branches and history agree, here and on every replica; with -t 0 only that
    #[arg(long)]
    pub check: bool,
    /// Check these replicas in place of those that the leader lists
    #[arg(long, value_name = "URL", requires = "check")]
    pub check_url: Vec<Url>,
}

/// Where a script comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScriptSource {
    /// A file.
    File(PathBuf, u64),
    /// A built-in of this name.
    Builtin(String, u64),
}

impl LoadArgs {
    /// What to run, checked as far as no node is needed.
    pub fn options(&self) -> Result<Options, Failure> {
        let bounds = |flag: &str, value: usize, max: usize| match value {
            0 => Err(Failure::Usage(format!("{flag} 0: at least 1 is needed"))),
            value if value > max => Err(Failure::Usage(format!("{flag} {value}: at most {max} are possible"))),
            _ => Ok(()),
        };
        bounds("--clients", self.clients, CLIENTS_MAX)?;
        bounds("--jobs", self.jobs, THREADS_MAX)?;
        bounds("--data-bytes", self.data_bytes.max(1), PAYLOAD_BYTES_MAX)?;
        bounds("--time", self.time.unwrap_or(1) as usize, usize::MAX)?;
        bounds("--progress", self.progress.unwrap_or(1) as usize, usize::MAX)?;
        bounds("--scale", usize::try_from(self.scale.unwrap_or(1)).unwrap_or(0), SCALE_MAX as usize)?;
        if self.transactions == Some(0) && !self.check {
            return Err(Failure::Usage("--transactions 0: nothing to do; with --check it only verifies".to_owned()));
        }
        if matches!(self.url, Target::Postgres(_)) {
            let refuse = |text: &str| Err(Failure::Usage(text.to_owned()));
            if self.check {
                return refuse("--check: it compares nodes of walferry; PostgreSQL has pg_amcheck");
            }
            if !self.file.is_empty() {
                return refuse("--file: a script's commands are for walferry and Redis; PostgreSQL runs --builtin");
            }
        }
        if let Some(rate) = self.rate.filter(|rate| !rate.is_finite() || *rate <= 0.0) {
            return Err(Failure::Usage(format!("--rate {rate}: choose a number above 0, such as 1000")));
        }
        let define = self.define.iter().map(|text| {
            let wrong = || Failure::Usage(format!("--define {text}: expected NAME=NUMBER, such as items=5000"));
            let (name, value) = text.split_once('=').ok_or_else(wrong)?;
            Ok((name.to_owned(), value.parse::<i64>().map_err(|_| wrong())?))
        });
        Ok(Options {
            url: self.url.clone(),
            clients: self.clients,
            threads: self.jobs.min(self.clients),
            duration: self.time.map(Duration::from_secs),
            transactions: if self.time.is_some() {
                None
            } else {
                Some(self.transactions.unwrap_or(TRANSACTIONS_DEFAULT))
            },
            progress: self.progress.map(Duration::from_secs),
            rate: self.rate,
            scale: self.scale,
            scripts: self.scripts()?,
            define: define.collect::<Result<_, Failure>>()?,
            payload_bytes: self.data_bytes,
            level: self.level.clone(),
            seed: self.seed,
            log: self.log.clone(),
        })
    }

    fn scripts(&self) -> Result<Vec<ScriptSource>, Failure> {
        let mut scripts = Vec::new();
        for text in &self.file {
            let (path, weight) = split_weight("--file", text)?;
            scripts.push(ScriptSource::File(path.into(), weight));
        }
        for text in &self.builtin {
            let (name, weight) = split_weight("--builtin", text)?;
            if !BUILTINS.iter().any(|(known, ..)| *known == name) {
                let names = BUILTINS.map(|(name, ..)| name).join(", ");
                return Err(Failure::Usage(format!("--builtin {name}: no such script; there are {names}")));
            }
            scripts.push(ScriptSource::Builtin(name.to_owned(), weight));
        }
        if scripts.is_empty() {
            scripts.push(ScriptSource::Builtin("tpcb-like".to_owned(), 1));
        }
        let weight = |script: &ScriptSource| match script {
            ScriptSource::File(_, weight) | ScriptSource::Builtin(_, weight) => *weight,
        };
        if scripts.iter().all(|script| weight(script) == 0) {
            return Err(Failure::Usage("every script has the weight 0; give one a weight of 1 or more".to_owned()));
        }
        Ok(scripts)
    }
}

/// `name@3` is `name` with the weight 3; without `@` the weight is 1.
fn split_weight<'a>(flag: &str, text: &'a str) -> Result<(&'a str, u64), Failure> {
    match text.rsplit_once('@') {
        None => Ok((text, 1)),
        Some((name, weight)) => match weight.parse::<u32>() {
            Ok(weight) => Ok((name, u64::from(weight))),
            Err(_) => Err(Failure::Usage(format!("{flag} {text}: the weight after @ must be a whole number"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        load: LoadArgs,
    }

    fn options(flags: &str) -> Result<Options, Failure> {
        Only::try_parse_from(std::iter::once("load").chain(flags.split_whitespace())).unwrap().load.options()
    }

    #[test]
    fn pgbench_habits_parse() {
        let options = options("-c 8 -j 2 -T 10 -P 1 -R 500 -s 3 -f a.sql@3 -b append -D items=7 --seed 9").unwrap();
        assert_eq!((options.clients, options.threads), (8, 2));
        assert_eq!((options.duration, options.transactions), (Some(Duration::from_secs(10)), None));
        assert_eq!((options.rate, options.scale, options.seed), (Some(500.0), Some(3), Some(9)));
        let scripts = [ScriptSource::File("a.sql".into(), 3), ScriptSource::Builtin("append".to_owned(), 1)];
        assert_eq!(options.scripts, scripts);
        assert_eq!(options.define, [("items".to_owned(), 7)]);
    }

    #[test]
    fn defaults_are_those_of_pgbench() {
        let options = options("-j 4").unwrap();
        assert_eq!((options.clients, options.threads, options.transactions), (1, 1, Some(10)));
        assert_eq!(options.scripts, [ScriptSource::Builtin("tpcb-like".to_owned(), 1)]);
    }

    #[test]
    fn what_cannot_be_run_is_said() {
        for (flags, says) in [
            ("-c 0", "--clients 0: at least 1"),
            ("-c 20000", "at most 10000"),
            ("-t 0", "nothing to do"),
            ("-R 0", "--rate 0: choose a number above 0"),
            ("-b tpcc", "--builtin tpcc: no such script; there are tpcb-like"),
            ("-f a@b", "the weight after @"),
            ("-f a@0", "every script has the weight 0"),
            ("-D x", "--define x: expected NAME=NUMBER"),
            ("-s 0", "--scale 0"),
            ("-d 99999999", "--data-bytes 99999999: at most"),
        ] {
            let error = options(flags).unwrap_err();
            assert!(matches!(error, Failure::Usage(_)), "{flags}");
            assert!(error.to_string().contains(says), "{flags}: {error}");
        }
    }
}
