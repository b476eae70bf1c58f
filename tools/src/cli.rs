//! The command line: subcommands, help texts, exit codes. Called by `main`; starts the module of each subcommand
//! and knows nothing of how it works.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use walferry_engine::meta::Meta;
use walferry_node::config::{self, ConfigError, NodeConfig, Settings};
use walferry_node::role::Becoming;
use walferry_node::{logging, own_files};
use walferry_tls::{Outsiders, Secrets, open_private};

use crate::client::Credentials;
use crate::failure::{Failure, say};
use crate::{
    demo, describe, distance, drill, fsync, init, inspect, link, load, members, passwd, promote, slot, status,
    switchover, witness,
};

/// A log-shipping appliance: durable here, durable there, applied there, as each commit asks.
#[derive(Debug, Parser)]
#[command(name = "walferry", version, max_term_width = 110, after_help = MAIN_EXAMPLES, after_long_help = MAIN_EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    identity: Identity,
}

/// Who a tool is to the nodes that it asks.
#[derive(Debug, Args)]
struct Identity {
    /// Log in as this user; the password is taken from --password-file, WALFERRY_PASSWORD, REDISCLI_AUTH or the URL
    #[arg(long, value_name = "NAME", global = true, help_heading = "Login")]
    user: Option<String>,
    /// Take the password from the first line of this file, which others may not read
    #[arg(long, value_name = "FILE", global = true, help_heading = "Login")]
    password_file: Option<PathBuf>,
}

/// Where a password may stand, the first that is set counts; flags are no place for one.
const PASSWORD_VARIABLES: [&str; 2] = ["WALFERRY_PASSWORD", "REDISCLI_AUTH"];
/// A longer password file is refused.
const PASSWORD_FILE_BYTES_MAX: u64 = 4096;

impl Identity {
    /// Takes the password for the whole process.
    fn assume(self) -> Result<(), Failure> {
        let password = match &self.password_file {
            Some(file) => Some(read_password(file)?),
            None => PASSWORD_VARIABLES.iter().find_map(|name| std::env::var(name).ok()),
        };
        if let Some(password) = password.filter(|password| !password.is_empty()) {
            Credentials { user: self.user, password }.use_by_default();
        }
        Ok(())
    }
}

/// The first line of a file that others may not read.
pub fn read_password(file: &Path) -> Result<String, Failure> {
    let wrong = |text: &dyn std::fmt::Display| Failure::Usage(format!("--password-file {}: {text}", file.display()));
    let opened = open_private(file, Outsiders::Others).map_err(|error| wrong(&error))?;
    let mut text = String::new();
    opened.take(PASSWORD_FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| wrong(&error))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

const MAIN_EXAMPLES: &str = "\
Examples:
  walferry demo                                              every commit level, then two distances; 50 seconds
  walferry start --data ./a --name a                         a leader on 127.0.0.1:6400
  walferry start --data ./b --name b --listen 127.0.0.1:6410 --peer-listen 127.0.0.1:6411 --follow 127.0.0.1:6401 \\
      --peer-secret ./a/peer.secret                              the same secret on each node: a made it when it began
  walferry status --watch
  walferry load -i && walferry load -c 16 -j 2 -T 10 --level remote_flush

Exit codes:
  0  done; for `start`: stopped by SIGTERM or SIGINT with everything written
  1  it failed: the node cannot be reached, the disk or the log is damaged, sums disagree
  2  the command line or the configuration is wrong; nothing was done";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node: a leader, or a replica with --follow
    #[command(after_help = START_EXAMPLES, args_override_self = true)]
    Start(StartArgs),
    /// Vote in a cluster without storing data
    #[command(after_help = witness::EXAMPLES)]
    Witness(witness::WitnessArgs),
    /// Create a data directory and measure its disk, without starting a node
    #[command(after_help = INIT_EXAMPLES)]
    Init(NodeArgs),
    /// Make a file with a secret that the peers of a cluster share
    #[command(after_help = SECRET_EXAMPLES)]
    Secret(SecretArgs),
    /// Make a line for the users' file: a user, and its password as a salted hash
    #[command(after_help = passwd::EXAMPLES)]
    Passwd(passwd::PasswdArgs),
    /// Make a replica the leader, in a new epoch
    #[command(after_help = promote::EXAMPLES)]
    Promote(promote::PromoteArgs),
    /// Make another member of a cluster the leader, without loss
    #[command(after_help = switchover::EXAMPLES)]
    Switchover(switchover::SwitchoverArgs),
    /// Add a running node to a cluster as a member
    #[command(after_help = members::JOIN_EXAMPLES)]
    Join(members::JoinArgs),
    /// Remove a member from a cluster
    #[command(after_help = members::REMOVE_EXAMPLES)]
    Remove(members::RemoveArgs),
    /// Show the slots that hold a leader's log for its replicas, or drop one
    #[command(alias = "slots", after_help = slot::EXAMPLES)]
    Slot(slot::SlotArgs),
    /// Show a cluster: leader, replicas, in-sync set, epoch, policy, lag
    #[command(after_help = describe::EXAMPLES)]
    Describe(describe::DescribeArgs),
    /// Show a node's replicas, commit level, sync policy and what its flushes cost
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// Put load on a node and report throughput and latency, with pgbench's options
    #[command(after_help = load::EXAMPLES)]
    Load(Box<load::LoadArgs>),
    /// Emulate a distance: round-trip time, jitter, loss and rate between two sides
    #[command(after_help = link::EXAMPLES)]
    Link(link::LinkArgs),
    /// Measure what each commit level costs at each distance, and which to choose for which data
    #[command(after_help = distance::EXAMPLES)]
    Distance(Box<distance::DistanceArgs>),
    /// Kill, stop, cut off and slow down the nodes of a cluster under load, and tell what each fault cost
    #[command(after_help = drill::EXAMPLES)]
    Drill(drill::DrillArgs),
    /// Read the log of a data directory, whether its node runs or not
    #[command(subcommand, after_help = inspect::EXAMPLES)]
    Log(inspect::LogCommand),
    /// Measure what a durable write costs on a disk, by method, depth and size
    #[command(after_help = fsync::EXAMPLES)]
    Fsync(fsync::FsyncArgs),
    /// Check a walferry.toml, or show the values that a node would use
    #[command(subcommand, after_help = CONFIG_EXAMPLES)]
    Config(ConfigCommand),
    /// Start a leader and two replicas here, try every commit level, then two distances; print the tables, stop
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::DemoArgs),
}

impl Command {
    /// True for what makes files that belong to a node, or a socket that controls something. What the others make is the caller's.
    fn keeps_files(&self) -> bool {
        matches!(
            self,
            Command::Start(_)
                | Command::Witness(_)
                | Command::Init(_)
                | Command::Promote(_)
                | Command::Link(_)
                | Command::Log(_)
        )
    }
}

const START_EXAMPLES: &str = "\
Examples:
  walferry start --data /var/lib/walferry/a --name a
  walferry start --config /etc/walferry/a.toml
  walferry start --data ./b --name b --listen 127.0.0.1:6410 --peer-listen 127.0.0.1:6411 --follow 127.0.0.1:6401 \\
      --peer-secret ./a/peer.secret                              the same secret on each node: a made it when it began
  walferry start --data ./a --name a --commit-level remote_flush --sync 'ANY 1 (b, c)'
  walferry start --data ./b --name b --become leader         in spite of what ./b was; the refusal without it tells the price

Every flag is also a key of walferry.toml, with _ for -; a flag wins over the file.
SIGTERM or SIGINT writes what is open and stops the node; exit code 0.";

const SECRET_EXAMPLES: &str = "\
Examples:
  walferry secret /etc/walferry/peer.secret
  walferry start --data ./a --name a --peer-secret /etc/walferry/peer.secret \\
      --members a=10.0.0.1:6401,b=10.0.0.2:6401

Give every node of the cluster the same file. It is made for its owner alone (mode 0600); a file that others can read is refused.
A line is a secret: the first one is proved, any of them is taken. To change it without a pause add the new line at the end of the
file on every node, then put it first on every node, then take the old one out; nodes see a changed file within a second.

Exit codes: 0 made; 1 the file exists or cannot be made.";

/// `walferry secret`.
#[derive(Debug, Args)]
struct SecretArgs {
    /// The file to make
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

fn make_secret(args: &SecretArgs) -> Result<(), Failure> {
    Secrets::create(&args.file).map_err(Failure::failed)?;
    say(format_args!("{}: give every node of the cluster this file, with --peer-secret", args.file.display()))
}

const INIT_EXAMPLES: &str = "\
Examples:
  walferry init --data /var/lib/walferry/a --name a
  walferry init --data ./a --segment-bytes 256MiB --sync-method dsync

`start` initialises a missing data directory by itself; `init` only does it ahead of time and prints what the
disk can do. Of the flags only data, name, segment-bytes, write-depth, sync-method and buffered matter here.

Exit codes: 0 initialised; 1 it was already, the directory holds something else, or its disk cannot be used; 2 wrong usage.";

/// `walferry start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Take this role although the data directory is another's: leader, replica (with --follow) or member (with --members). Give it
    /// once, by hand; the error that asks for it tells what may be lost
    #[arg(long = "become", value_name = "ROLE")]
    becoming: Option<Becoming>,
}

/// How a node is to run: a file, and flags that win over it.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Read the configuration from this walferry.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

impl NodeArgs {
    fn file_settings(&self) -> Result<Settings, ConfigError> {
        self.config.as_deref().map_or(Ok(Settings::default()), Settings::from_file)
    }

    /// The checked configuration. A node that is named nowhere keeps the name that its data directory has.
    fn node_config(mut self) -> Result<NodeConfig, ConfigError> {
        if self.settings.password.is_some() {
            return Err(ConfigError::Value {
                key: "password",
                value: "(not shown)".to_owned(),
                reason: "other users of this host see the flags of a process: name a users_file instead".to_owned(),
            });
        }
        let file = self.file_settings()?;
        let data = self.settings.data.as_ref().or(file.data.as_ref());
        if self.settings.name.is_none()
            && file.name.is_none()
            && let Some(Ok(Some(meta))) = data.map(|data| Meta::load(data))
        {
            self.settings.name = Some(meta.name);
        }
        NodeConfig::new(self.settings, file)
    }
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file: unknown keys, values out of bounds
    Check {
        /// The walferry.toml to check
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print every key with the value that a node would use, and where it comes from
    Show(Box<NodeArgs>),
}

const CONFIG_EXAMPLES: &str = "\
Examples:
  walferry config check /etc/walferry/a.toml
  walferry config show --config /etc/walferry/a.toml --commit-level remote_apply
  walferry config show > walferry.toml

Exit codes: 0 right; 1 the output cannot be written; 2 the file or a flag is wrong, with line and key.";

/// Runs the chosen subcommand to its end.
pub fn run(cli: Cli) -> Result<(), Failure> {
    let password_file = cli.identity.password_file.clone();
    cli.identity.assume()?;
    if cli.command.keeps_files() {
        own_files::limit_modes();
    }
    match cli.command {
        Command::Start(args) => {
            let config = NodeConfig { becoming: args.becoming, ..args.node.node_config()? };
            logging::start(&config.log_filter)?;
            Ok(walferry_node::run(config)?)
        }
        Command::Witness(args) => witness::run(args),
        Command::Secret(args) => make_secret(&args),
        Command::Init(args) => init::run(&args.node_config()?),
        Command::Passwd(args) => passwd::run(&args, password_file.as_ref()),
        Command::Promote(args) => promote::run(&args),
        Command::Switchover(args) => switchover::run(&args),
        Command::Join(args) => members::join(&args),
        Command::Remove(args) => members::remove(&args),
        Command::Slot(args) => slot::run(&args),
        Command::Describe(args) => describe::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Load(args) => load::run(*args),
        Command::Link(args) => link::run(&args),
        Command::Distance(args) => distance::run(&args),
        Command::Drill(args) => drill::run(&args),
        Command::Log(command) => inspect::run(&command),
        Command::Fsync(args) => fsync::run(&args),
        Command::Config(ConfigCommand::Check { file }) => config_check(&file),
        Command::Config(ConfigCommand::Show(args)) => config_show(&args),
        Command::Demo(args) => demo::run(&args),
    }
}

fn config_check(file: &Path) -> Result<(), Failure> {
    let settings = Settings::from_file(file)?;
    // The data directory may be left to a flag of the unit file; everything else must stand on its own.
    let flags = Settings { data: settings.data.is_none().then(PathBuf::new), ..Settings::default() };
    NodeConfig::new(flags, settings)?;
    say(format_args!("{}: ok", file.display()))
}

fn config_show(args: &NodeArgs) -> Result<(), Failure> {
    let file = args.file_settings()?;
    say(config::show(&args.settings, &file, args.config.as_deref()).trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The words of a command as a shell would split it.
    fn words(command: &str) -> Vec<String> {
        let (mut words, mut quoted) = (vec![String::new()], false);
        for letter in command.chars() {
            match letter {
                '\'' => quoted = !quoted,
                ' ' if !quoted => words.push(String::new()),
                _ => words.last_mut().expect("it begins with one").push(letter),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn every_example_of_the_help_texts_is_understood() {
        let mut tried = 0;
        for command in Cli::command().get_subcommands() {
            let text = command.get_after_help().expect("examples").to_string();
            let text = text.split("\\\n").map(str::trim_start).collect::<Vec<_>>().join("");
            for example in text.lines().filter_map(|line| line.strip_prefix("  walferry ")) {
                // What a shell does with the output is not ours, and behind two spaces stands what the example does.
                let ends =
                    [" && ", " | ", " > ", " >> ", " &", "  "].map(|end| example.find(end).unwrap_or(example.len()));
                let given = &example[..ends.into_iter().min().expect("some")];
                let words = ["walferry".to_owned()].into_iter().chain(words(given));
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{}: {example}\n{}", command.get_name(), parsed.expect_err("just seen"));
                tried += 1;
            }
        }
        assert!(tried > 30, "{tried} examples were found");
    }

    #[test]
    fn every_help_text_tells_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(|text| text.to_string()).unwrap_or_default();
            assert!(help.contains("Examples:"), "`walferry {}` has no example", command.get_name());
        }
    }

    /// Compares a document with what the code says; with UPDATE_REFERENCE=1 it is written instead.
    fn check_reference(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference").join(name);
        if std::env::var_os("UPDATE_REFERENCE").is_some() {
            std::fs::write(&path, text).expect("a document");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == text,
            "docs/reference/{name} is out of date: UPDATE_REFERENCE=1 cargo test -p walferry reference"
        );
    }

    fn cell(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
    }

    #[test]
    fn reference_of_configuration_keys_is_current() {
        let mut text = String::from(
            "# Configuration keys\n\nEach key of `walferry.toml` is also a flag of `walferry start`, with `-` for `_`; a flag wins over the \
             file.\n`walferry config show` prints every key with its value and origin.\n\n| key | value | meaning |\n|---|---|---|\n",
        );
        let start = Cli::command().find_subcommand("start").expect("a subcommand").clone();
        let mut keys = 0;
        for arg in start.get_arguments().filter(|arg| !["config", "become", "help"].contains(&arg.get_id().as_str())) {
            let Some(flag) = arg.get_long().filter(|_| !arg.is_global_set()) else { continue };
            let value = arg.get_value_names().filter(|_| arg.get_action().takes_values()).unwrap_or_default();
            let value = value.first().map_or("true or false".to_owned(), |name| format!("`{name}`"));
            let help = cell(&arg.get_help().map(ToString::to_string).unwrap_or_default());
            text.push_str(&format!("| `{}` | {value} | {help} |\n", flag.replace('-', "_")));
            keys += 1;
        }
        assert!(keys > 40, "{keys} keys were found");
        check_reference("config.md", &text);
    }

    #[test]
    fn reference_of_subcommands_is_current() {
        let mut text = String::from("# Subcommands of walferry\n");
        for command in Cli::command().get_subcommands() {
            let about = cell(&command.get_about().map(ToString::to_string).unwrap_or_default());
            text.push_str(&format!("\n## walferry {}\n\n{about}.\n", command.get_name()));
            if command.get_name() == "start" || command.get_name() == "init" {
                text.push_str("\nIts flags are the [configuration keys](config.md), `--config FILE`, and for `start` `--become ROLE`.\n");
            } else {
                let parts: Vec<_> = std::iter::once(command).chain(command.get_subcommands()).collect();
                for part in parts {
                    let args: Vec<_> =
                        part.get_arguments().filter(|arg| !arg.is_global_set() && arg.get_id() != "help").collect();
                    if part.get_name() != command.get_name() {
                        let about = cell(&part.get_about().map(ToString::to_string).unwrap_or_default());
                        text.push_str(&format!("\n`walferry {} {}`: {about}.\n", command.get_name(), part.get_name()));
                    }
                    if args.is_empty() {
                        continue;
                    }
                    text.push_str("\n| argument | meaning |\n|---|---|\n");
                    for arg in args {
                        let name = arg.get_value_names().and_then(|names| names.first()).map(ToString::to_string);
                        let shown = match (arg.get_long(), name.filter(|_| arg.get_action().takes_values())) {
                            (Some(flag), Some(value)) => format!("--{flag} {value}"),
                            (Some(flag), None) => format!("--{flag}"),
                            (None, value) => value.unwrap_or_else(|| arg.get_id().to_string()),
                        };
                        let short = arg.get_short().map_or(String::new(), |short| format!("-{short}, "));
                        let help = cell(&arg.get_help().map(ToString::to_string).unwrap_or_default());
                        text.push_str(&format!("| `{short}{shown}` | {help} |\n"));
                    }
                }
            }
            if let Some(examples) = command.get_after_help() {
                text.push_str(&format!("\n```text\n{}\n```\n", examples.to_string().trim_end()));
            }
        }
        check_reference("cli.md", &text);
    }
}
