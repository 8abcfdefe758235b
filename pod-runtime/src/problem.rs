//! What a person is told when something cannot be done.
//!
//! Every fallible function of the libraries returns [`Result`]. A [`Problem`] has a stable code with a page in
//! `docs/codes/` (compiled in, see [`page`]), a line that names the object, the process and the reason, the way out
//! when there is one, and the error below it. Texts are lower case, without a period, and never repeat their source.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

pub type Result<T, E = Problem> = std::result::Result<T, E>;

/// One problem: what failed, why, and what to do about it.
#[derive(Debug)]
pub struct Problem {
    code: Cow<'static, str>,
    what: String,
    fix: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// A system call or a library failed in a way that no finer code describes.
pub const SYSTEM: &str = "E-SYSTEM";

impl Problem {
    /// `code` is the name of a page in `docs/codes/`.
    pub fn new(code: impl Into<Cow<'static, str>>, what: impl Into<String>) -> Self {
        Problem { code: code.into(), what: what.into(), fix: None, source: None }
    }

    /// Adds the way out: a command or an action, as the person should type or do it.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub fn code(&self) -> &str {
        &self.code
    }

    pub fn what(&self) -> &str {
        &self.what
    }

    pub fn way_out(&self) -> Option<&str> {
        self.fix.as_deref()
    }

    /// The whole chain on one line, outermost first.
    pub fn chain(&self) -> String {
        let mut text = self.what.clone();
        let mut next = self.source();
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }

    /// The same problem as plain data, to cross a process or a wire.
    pub fn report(&self) -> Report {
        Report { code: self.code.to_string(), what: self.chain(), fix: self.fix.clone() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for Problem {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|s| s.as_ref() as &(dyn StdError + 'static))
    }
}

/// A [`Problem`] as data: what crosses a socket, a link or `--json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub code: String,
    pub what: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl From<Report> for Problem {
    fn from(report: Report) -> Self {
        Problem { code: Cow::Owned(report.code), what: report.what, fix: report.fix, source: None }
    }
}

/// Says what was being done when a lower error came up.
pub trait Doing<T> {
    /// `what` reads as the failed action: "mount proc on /proc".
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;

    /// The same under a code of its own.
    fn code(self, code: &'static str, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| {
            let source = source.into();
            // A problem keeps its code and its way out when context is added around it.
            match source.downcast::<Problem>() {
                Ok(inner) => {
                    Problem { code: inner.code.clone(), fix: inner.fix.clone(), what: what(), source: Some(inner) }
                }
                Err(source) => Problem { code: Cow::Borrowed(SYSTEM), what: what(), fix: None, source: Some(source) },
            }
        })
    }

    fn code(self, code: &'static str, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Problem::new(code, what()).because(source))
    }
}

include!(concat!(env!("OUT_DIR"), "/pages.rs"));

/// The page of a code, as `pod explain` shows it.
pub fn page(code: &str) -> Option<&'static str> {
    PAGES.iter().find(|(name, _)| name.eq_ignore_ascii_case(code)).map(|(_, text)| *text)
}

/// All codes that have a page, in order.
pub fn codes() -> impl Iterator<Item = &'static str> {
    PAGES.iter().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_code_and_fix() {
        let inner: Result<()> = Err(Problem::new("E-SYSTEM", "inner").fix("do this"));
        let outer = inner.doing(|| "outer".into()).unwrap_err();
        assert_eq!(outer.code(), "E-SYSTEM");
        assert_eq!(outer.way_out(), Some("do this"));
        assert_eq!(outer.chain(), "outer: inner");
    }

    #[test]
    fn report_round_trip() {
        let problem = Problem::new("E-SYSTEM", "what").because(std::io::Error::from_raw_os_error(2));
        let back: Problem = problem.report().into();
        assert_eq!(back.code(), "E-SYSTEM");
        assert!(back.what().starts_with("what: "));
    }
}
