//! What becomes of a panic. It is a bug, and a process that goes on with one of its threads gone is neither up nor down: it ends at
//! once, for its supervisor to start again. But where a library is known to trip over damaged bytes, its panic is a finding.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};

#[cfg(panic = "abort")]
compile_error!("`panics::caught` takes panics for findings: build with panic = \"unwind\"");

/// A panic's message may take so long to be written.
const MESSAGE_SECONDS_MAX: libc::c_uint = 10;

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// From now on a panic of any thread ends the process (SIGABRT) after `last_lines` and its message, unless it is [`caught`]. Where
/// nobody reads stderr, SIGALRM ends it.
pub fn end_the_process(last_lines: fn()) {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if !CATCHING.get() {
            // SAFETY: a plain system call; nothing here handles the signal.
            unsafe { libc::alarm(MESSAGE_SECONDS_MAX) };
            last_lines();
            tell(panic);
            std::process::abort();
        }
    }));
}

/// What `look` gives, or the text of its panic. Whatever `look` worked on is not to be used any more then.
pub fn caught<T>(look: impl FnOnce() -> T) -> Result<T, String> {
    let before = CATCHING.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(look));
    CATCHING.set(before);
    outcome.map_err(|panic| text_of(&*panic))
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
