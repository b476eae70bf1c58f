//! Who this process is to nodes whose URL does not say it: told once by a program at its start, so that a password stands neither on
//! a command line nor in every URL. Used by `url`.

use std::fmt;
use std::sync::OnceLock;

static OWN: OnceLock<Credentials> = OnceLock::new();

/// What AUTH says.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// None: the user `default`.
    pub user: Option<String>,
    /// The password.
    pub password: String,
}

/// Without the password.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials of {:?}", self.user)
    }
}

impl Credentials {
    /// Takes these for every URL without a password. The first call counts.
    pub fn use_by_default(self) {
        let _ = OWN.set(self);
    }

    pub(crate) fn by_default() -> Option<&'static Credentials> {
        OWN.get()
    }
}
