//! A cluster that runs already, on hosts of its own: the drill measures it, and an operator's commands do what is done to it.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::{Command, Stdio};
use std::str::FromStr;

use super::fault::Fault;
use super::member::Member;
use crate::failure::Failure;

/// `NAME=HOST:PORT`: a member and where its clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedHost {
    /// The member.
    pub name: String,
    address: String,
}

impl FromStr for NamedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<NamedHost, String> {
        let wrong = || format!("{text:?} is not NAME=HOST:PORT, such as a=10.0.0.1:6400");
        let (name, address) = text.split_once('=').ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if name.is_empty() || host.is_empty() || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(NamedHost { name: name.to_owned(), address: address.to_owned() })
    }
}

impl NamedHost {
    /// The member, with its address resolved.
    pub fn resolve(&self) -> Result<Member, Failure> {
        let failed = |text: String| Failure::failed(format_args!("--hosts: {}: {text}", self.address));
        let address: Option<SocketAddr> =
            self.address.to_socket_addrs().map_err(|error| failed(error.to_string()))?.next();
        let address = address.ok_or_else(|| failed("the name has no address".to_owned()))?;
        Ok(Member { name: self.name.clone(), address })
    }

    fn host(&self) -> &str {
        self.address.rsplit_once(':').map_or(&self.address, |(host, _)| host)
    }
}

/// The operator's commands.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    /// The members.
    pub hosts: Vec<NamedHost>,
    /// Does a fault.
    pub on_fault: Option<String>,
    /// Undoes it.
    pub on_heal: Option<String>,
}

impl Hooks {
    /// Why a fault cannot be injected.
    pub fn cannot(&self, fault: Fault) -> Option<&'static str> {
        let hooked = self.on_fault.is_some() && self.on_heal.is_some();
        (fault != Fault::Switchover && !hooked).then_some("with --hosts it needs --on-fault and --on-heal")
    }

    /// Runs the command that does a fault to a member.
    pub fn inject(&self, fault: Fault, name: &str) -> Result<(), Failure> {
        self.run("--on-fault", self.on_fault.as_deref(), fault, name)
    }

    /// Runs the command that undoes it.
    pub fn heal(&self, fault: Fault, name: &str) -> Result<(), Failure> {
        self.run("--on-heal", self.on_heal.as_deref(), fault, name)
    }

    fn run(&self, flag: &str, command: Option<&str>, fault: Fault, name: &str) -> Result<(), Failure> {
        let Some(command) = command else { return Ok(()) };
        let text = self.filled_in(command, fault, name);
        let status = Command::new("sh").args(["-c", &text]).stdin(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failure::failed(format_args!("{flag}: `{text}` ended with {status}"))),
            Err(error) => Err(Failure::failed(format_args!("{flag}: `{text}`: {error}"))),
        }
    }

    fn filled_in(&self, command: &str, fault: Fault, name: &str) -> String {
        let host = self.hosts.iter().find(|host| host.name == name).map_or("", NamedHost::host);
        command.replace("{fault}", &fault.to_string()).replace("{name}", name).replace("{host}", host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_and_reached_at_a_port() {
        let host: NamedHost = "a=db1.example:6400".parse().expect("a host");
        assert_eq!((host.name.as_str(), host.host()), ("a", "db1.example"));
        for wrong in ["a", "a=", "=h:1", "a=h", "a=:1", "a=h:x"] {
            let error = wrong.parse::<NamedHost>().expect_err(wrong);
            assert!(error.contains("NAME=HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn commands_are_filled_in_and_have_to_succeed() {
        let hosts = vec!["a=10.0.0.1:6400".parse().expect("a host")];
        let command = "test {fault}/{name}/{host} = kill/a/10.0.0.1".to_owned();
        let hooks = Hooks { hosts, on_fault: Some(command), on_heal: Some("false".to_owned()) };
        assert!(hooks.inject(Fault::Kill, "a").is_ok());
        let error = hooks.heal(Fault::Kill, "a").expect_err("false").to_string();
        assert!(error.contains("--on-heal") && error.contains("exit status: 1"), "{error}");
        assert_eq!(hooks.cannot(Fault::Stop), None);
        assert!(Hooks::default().cannot(Fault::Kill).is_some());
        assert_eq!(Hooks::default().cannot(Fault::Switchover), None);
    }
}
