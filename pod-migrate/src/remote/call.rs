//! One system call to be run in another task, with the memory that it reads and writes.

use std::borrow::Cow;

/// An argument. Memory is placed in the borrowed pages of the task just before the call runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arg {
    Value(u64),
    /// A pointer to a copy of these bytes.
    In(Vec<u8>),
    /// A pointer to so many zero bytes, read back after the run into [`RemoteCall::out`].
    Out(usize),
    /// A pointer to a copy of these bytes, read back after the run.
    InOut(Vec<u8>),
    /// A pointer to this block of 64-bit words of which some are pointers again: `(word index, bytes)`.
    Nested(Vec<u8>, Vec<(usize, Vec<u8>)>),
}

/// One call. After a run [`result`](Self::result) is what the kernel returned (`-errno` for an error) and
/// [`out`](Self::out) what it wrote, one entry for each `Out` or `InOut` in order.
#[derive(Debug, Clone)]
pub struct RemoteCall {
    /// For messages: "mmap of /usr/bin/x".
    pub what: Cow<'static, str>,
    pub number: i64,
    pub args: Vec<Arg>,
    /// What a correct run returns; anything else is a problem. None: the caller looks itself.
    pub expect: Expect,
    pub result: i64,
    pub out: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Not an error.
    Success,
    Exactly(i64),
    /// The caller looks at `result`.
    Anything,
}

impl RemoteCall {
    pub fn new(what: impl Into<Cow<'static, str>>, number: i64, args: Vec<Arg>) -> Self {
        RemoteCall { what: what.into(), number, args, expect: Expect::Success, result: 0, out: Vec::new() }
    }

    /// Its failure is for the caller to look at.
    #[must_use]
    pub fn may_fail(mut self) -> Self {
        self.expect = Expect::Anything;
        self
    }

    #[must_use]
    pub fn returns(mut self, value: i64) -> Self {
        self.expect = Expect::Exactly(value);
        self
    }

    /// The error that the kernel gave, if it did.
    pub fn error(&self) -> Option<std::io::Error> {
        (-4095..0).contains(&self.result).then(|| std::io::Error::from_raw_os_error(-self.result as i32))
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Arg::Value(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Arg::Value(value as i64 as u64)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Arg::Value(value.into())
    }
}
