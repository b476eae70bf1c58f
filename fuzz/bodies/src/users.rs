//! The users' file: what is taken means the same when ACL LIST tells it, no error tells a password, and nobody gets in by it who
//! does not stand there.

use walferry_node::users::{Grant, Judged, PASSWORDS_MAX, USERS_MAX, Users};

/// Any bytes.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let users = match Users::parse(text, "users") {
        Ok(users) => users,
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("users_file users, line "), "{error}");
            let passwords = text.split_ascii_whitespace().filter_map(|word| word.strip_prefix('>'));
            // Short ones may be a part of any sentence.
            for password in passwords.filter(|password| password.len() > 40) {
                assert!(!error.contains(password), "{error}");
            }
            return;
        }
    };
    let lines = users.lines();
    assert!(lines.len() <= USERS_MAX);
    assert!(lines.iter().all(|line| line.matches(" #").count() + line.matches(" $").count() <= PASSWORDS_MAX));
    let again = Users::parse(&lines.join("\n").replace(" -@all", ""), "again").expect("what ACL LIST tells is taken");
    assert_eq!(again, users);
    for line in &lines {
        let name = line.split(' ').nth(1).expect("a name");
        let open = line.contains(" on nopass");
        let known = users.authenticate(name.as_bytes(), b"surely nobody's password");
        assert_eq!(matches!(known, Judged::Right(_)), open, "{line}");
        assert!(!matches!(known, Judged::Right(user) if user.grant == Grant::All && !line.ends_with("+@all")));
    }
    assert!(!matches!(users.authenticate(b"no such user", b""), Judged::Right(_)));
}
