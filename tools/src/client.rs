//! How the operator's tools talk to a node: the client crate's connection, and what INFO answers taken apart.

pub use walferry_client::{Client, ClientError, Credentials, Reply, Url, encode_command};

/// The value of `key` in the text that INFO answers (`key:value` lines).
pub fn info_field<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.trim_end().strip_prefix(key)?.strip_prefix(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_info() {
        let info = "# Server\r\nrole:leader\r\nrole_since:5\r\n";
        assert_eq!(info_field(info, "role"), Some("leader"));
        assert_eq!(info_field(info, "rol"), None);
    }
}
