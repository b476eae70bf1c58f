//! Deliberate bugs, for the proof that the simulator finds such bugs. Without the feature `mutants`, which only the simulator
//! turns on, none of them is compiled in.

#[cfg(feature = "mutants")]
thread_local! {
    static ON: std::cell::Cell<&'static str> = const { std::cell::Cell::new("") };
}

/// Turns one on for this thread, and every other off.
#[cfg(feature = "mutants")]
pub fn turn_on(name: &'static str) {
    ON.with(|on| on.set(name));
}

/// True when this one is on.
#[inline]
pub fn is_on(name: &str) -> bool {
    #[cfg(feature = "mutants")]
    return ON.with(|on| on.get() == name);
    #[cfg(not(feature = "mutants"))]
    {
        let _ = name;
        false
    }
}
