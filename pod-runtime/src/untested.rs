//! For tests of what not every machine has. None is passed over in silence: the reader of its output is told, and where
//! CI is set, which promises to have everything, it fails.

/// Says that a test ends here because of `why`.
///
/// # Panics
///
/// Where the environment says CI.
pub fn here(why: impl std::fmt::Display) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(std::env::var_os("CI").is_none_or(|value| value.is_empty()), "{test} was not done here: {why}");
    eprintln!("NOT TESTED: {test} was not done here: {why}");
}
