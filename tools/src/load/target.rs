//! What is put under load: a walferry node, a Redis server or PostgreSQL, and what a commit level means there.

use std::fmt;
use std::str::FromStr;

use tokio_postgres::Config;

use super::script::{Script, Variables};
use crate::client::{Client, ClientError, Reply, Url, info_field};

/// The server's URL.
#[derive(Clone, Debug)]
pub enum Target {
    /// walferry or Redis.
    Redis(Url),
    /// PostgreSQL.
    Postgres(Box<Config>),
}

impl From<Url> for Target {
    fn from(url: Url) -> Target {
        Target::Redis(url)
    }
}

impl FromStr for Target {
    type Err = String;
    fn from_str(text: &str) -> Result<Target, String> {
        let is_postgres = text.starts_with("postgres://") || text.starts_with("postgresql://");
        if !is_postgres {
            return text.parse().map(Target::Redis);
        }
        let config: Config = text.parse().map_err(|error| {
            format!("{error}; expected postgres://USER[:PASSWORD]@HOST[:PORT]/DATABASE, such as postgres://postgres@127.0.0.1/postgres")
        })?;
        if config.get_hosts().is_empty() {
            return Err("the URL names no host, such as postgres://postgres@127.0.0.1/postgres".to_owned());
        }
        Ok(Target::Postgres(Box::new(config)))
    }
}

impl fmt::Display for Target {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = match self {
            Target::Redis(url) => return url.fmt(f),
            Target::Postgres(config) => config,
        };
        let host = match config.get_hosts().first() {
            Some(tokio_postgres::config::Host::Tcp(host)) => host.clone(),
            Some(tokio_postgres::config::Host::Unix(path)) => path.display().to_string(),
            None => String::new(),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        write!(f, "postgres://{host}:{port}/{}", config.get_dbname().unwrap_or_default())
    }
}

/// Which server answers RESP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A node of ours.
    Walferry(String),
    /// redis-server, its version, and whether its AOF is flushed before it answers.
    Redis {
        /// As INFO tells it.
        version: String,
        /// `appendonly yes` and `appendfsync always`.
        flushes: bool,
    },
    /// Another server that speaks RESP and has no INFO.
    Other,
}

impl Server {
    /// Asks.
    pub fn detect(client: &mut Client) -> Result<Server, ClientError> {
        let info = match client.call(&["INFO"]) {
            Err(ClientError::Refused { .. }) => return Ok(Server::Other),
            answer => answer?.text().unwrap_or_default(),
        };
        let field = |key| info_field(&info, key).map(str::to_owned);
        if let Some(version) = field("walferry_version") {
            return Ok(Server::Walferry(version));
        }
        let mut setting = |key| -> Option<String> {
            // A server that hides its configuration flushes as far as is known.
            client.call(&["CONFIG", "GET", key]).ok()?.field(key).and_then(Reply::text)
        };
        let flushes =
            setting("appendonly").as_deref() == Some("yes") && setting("appendfsync").as_deref() == Some("always");
        Ok(Server::Redis { version: field("redis_version").unwrap_or_else(|| "unknown".to_owned()), flushes })
    }

    /// What is appended to each transaction, so that its answer means `level`; or why this server cannot mean it.
    pub fn confirmation(&self, level: Option<&str>) -> Result<Option<&'static str>, String> {
        let (Server::Redis { version, flushes }, Some(level)) = (self, level) else { return Ok(None) };
        let number =
            |index: usize| version.split('.').nth(index).and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
        let has_waitaof = (number(0), number(1)) >= (7, 2);
        let refuse = |why: &str| Err(format!("--level {level}: redis {version} {why}"));
        match level {
            "off" if *flushes => refuse("has appendfsync always, so it flushes each write; set it to everysec"),
            "off" => Ok(None),
            "local" if *flushes => Ok(None),
            "local" => refuse("does not flush before it answers: set appendonly yes and appendfsync always"),
            "remote_write" => Ok(Some("WAIT 1 0")),
            "remote_flush" | "on" | "remote_apply" if has_waitaof => Ok(Some("WAITAOF 1 1 0")),
            "remote_flush" | "on" | "remote_apply" => {
                refuse("cannot tell when a replica has flushed (WAITAOF came with 7.2); remote_write uses WAIT")
            }
            _ => refuse("has no such level; choose off, local, remote_write, remote_flush or remote_apply"),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Server::Walferry(version) => write!(f, "walferry {version}"),
            Server::Redis { version, .. } => write!(f, "redis {version}"),
            Server::Other => f.write_str("unknown"),
        }
    }
}

impl Script {
    /// Lets each transaction end with `command`, sent with the transaction and not after its answer.
    pub fn end_with(&mut self, command: &str, variables: &Variables) -> Result<(), String> {
        use super::script::{Step, parse_command};
        let step = Step::Command(parse_command(command, variables)?);
        if self.steps.last() == Some(&Step::EndPipeline) {
            self.steps.insert(self.steps.len() - 1, step);
            return Ok(());
        }
        let first = self.steps.iter().rposition(|step| !matches!(step, Step::Command(_))).map_or(0, |index| index + 1);
        self.steps.insert(first, Step::StartPipeline);
        self.steps.extend([step, Step::EndPipeline]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::script::Step;

    #[test]
    fn urls_tell_the_server() {
        let target = |text: &str| text.parse::<Target>();
        assert!(matches!(target("redis://127.0.0.1:1"), Ok(Target::Redis(_))));
        let postgres = target("postgres://ann:secret@db.example:5433/shop").unwrap();
        assert_eq!(postgres.to_string(), "postgres://db.example:5433/shop", "no password is shown");
        for wrong in ["postgres://", "postgres://a:b:c@/", "http://x"] {
            assert!(target(wrong).unwrap_err().contains("such as"), "{wrong}");
        }
    }

    #[test]
    fn a_level_means_on_redis_what_it_says_or_is_refused() {
        let redis = |version: &str, flushes| Server::Redis { version: version.to_owned(), flushes };
        let confirmation = |server: Server, level| server.confirmation(Some(level));
        assert_eq!(confirmation(redis("7.0.15", true), "local"), Ok(None));
        assert_eq!(confirmation(redis("7.0.15", true), "remote_write"), Ok(Some("WAIT 1 0")));
        assert!(confirmation(redis("7.0.15", true), "remote_flush").unwrap_err().contains("WAITAOF came with 7.2"));
        assert_eq!(confirmation(redis("7.2.1", true), "remote_apply"), Ok(Some("WAITAOF 1 1 0")));
        assert!(confirmation(redis("7.2.1", false), "local").unwrap_err().contains("appendfsync always"));
        assert!(confirmation(redis("7.2.1", true), "off").unwrap_err().contains("everysec"));
        assert_eq!(
            confirmation(Server::Walferry("1".to_owned()), "remote_apply"),
            Ok(None),
            "it has levels of its own"
        );
        assert_eq!(redis("7.2.1", false).confirmation(None), Ok(None));
    }

    #[test]
    fn the_confirmation_travels_with_the_transaction() {
        let mut variables = Variables::predefined(1, 1);
        let texts = |script: &Script| -> Vec<String> {
            let text = |step: &Step| match step {
                Step::Command(template) => template.text.split(' ').next().unwrap_or_default().to_owned(),
                Step::StartPipeline => "{".to_owned(),
                Step::EndPipeline => "}".to_owned(),
                _ => String::new(),
            };
            script.steps.iter().map(text).filter(|text| !text.is_empty()).collect()
        };
        let mut append = Script::builtin("append", 1, &mut variables).unwrap();
        append.end_with("WAIT 1 0", &variables).unwrap();
        assert_eq!(texts(&append), ["{", "XADD", "WAIT", "}"]);
        let mut tpcb = Script::builtin("tpcb-like", 1, &mut variables).unwrap();
        tpcb.end_with("WAIT 1 0", &variables).unwrap();
        assert_eq!(texts(&tpcb)[6..], ["EXEC", "WAIT", "}"]);
    }
}
