//! Why a run could not be made, or why it failed.

use std::fmt::Display;

/// What ends this program before its work is done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// This system lacks something; nothing was tested.
    #[error("{0}")]
    Missing(String),
    /// Something else went wrong.
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    /// Something went wrong.
    pub fn failed(text: impl Display) -> Failure {
        Failure::Failed(text.to_string())
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Failure {
        Failure::Failed(text)
    }
}

/// Turns an error into a [`Failure`] that says what was being done.
pub trait During<T> {
    /// `what` reads as "cannot WHAT: error".
    fn during(self, what: impl Display) -> Result<T, Failure>;
}

impl<T, E: Display> During<T> for Result<T, E> {
    fn during(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::Failed(format!("cannot {what}: {error}")))
    }
}
