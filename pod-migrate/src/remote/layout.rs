//! Laying out a list of [`RemoteCall`]s as bytes: the table that the stub walks, and behind it the memory of the
//! arguments. Pure; both flavours of the stub use it.
//!
//! An entry is 8 words: number, six arguments, result. The entry after the last has the number [`END`].

use super::call::{Arg, Expect, RemoteCall};
use crate::{Problem, Result};

/// One entry, bytes.
pub const ENTRY: usize = 64;
/// Offset of the result in an entry.
const RESULT: usize = 56;
/// The number of the entry that ends a table.
pub const END: u64 = u64::MAX;

/// A table ready to be written to `base`, and where the results will stand in it.
pub struct Table {
    pub bytes: Vec<u8>,
    /// For each call: offset and length of each of its outputs.
    outputs: Vec<Vec<(usize, usize)>>,
}

/// Lays out as many of `calls` as fit into `room` bytes at `base`; says how many.
///
/// # Errors
/// The first call alone does not fit.
pub fn lay_out(calls: &[RemoteCall], base: u64, room: usize) -> Result<(Table, usize)> {
    let mut count = 0;
    let mut size = ENTRY;
    for call in calls {
        let more = ENTRY + memory_of(call);
        if size + more > room {
            break;
        }
        size += more;
        count += 1;
    }
    if count == 0 && !calls.is_empty() {
        let what = format!("the arguments of a remote call are too large: {}", calls[0].what);
        return Err(Problem::new("E-INTERNAL", what));
    }
    let mut table = Table { bytes: vec![0; (count + 1) * ENTRY], outputs: Vec::with_capacity(count) };
    for (index, call) in calls[..count].iter().enumerate() {
        table.entry(index, call, base);
    }
    table.bytes[count * ENTRY..count * ENTRY + 8].copy_from_slice(&END.to_ne_bytes());
    Ok((table, count))
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

fn memory_of(call: &RemoteCall) -> usize {
    call.args
        .iter()
        .map(|arg| match arg {
            Arg::Value(_) => 0,
            Arg::In(bytes) | Arg::InOut(bytes) => padded(bytes.len()),
            Arg::Out(bytes) => padded(*bytes),
            Arg::Nested(block, parts) => {
                padded(block.len()) + parts.iter().map(|(_, part)| padded(part.len())).sum::<usize>()
            }
        })
        .sum()
}

impl Table {
    fn place(&mut self, bytes: &[u8]) -> usize {
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(offset + padded(bytes.len()), 0);
        offset
    }

    fn entry(&mut self, index: usize, call: &RemoteCall, base: u64) {
        let mut words = [0u64; 8];
        words[0] = call.number as u64;
        let mut outputs = Vec::new();
        for (number, arg) in call.args.iter().enumerate() {
            let at = match arg {
                Arg::Value(value) => {
                    words[1 + number] = *value;
                    continue;
                }
                Arg::In(bytes) => self.place(bytes),
                Arg::InOut(bytes) => {
                    let at = self.place(bytes);
                    outputs.push((at, bytes.len()));
                    at
                }
                Arg::Out(bytes) => {
                    let at = self.place(&vec![0; *bytes]);
                    outputs.push((at, *bytes));
                    at
                }
                Arg::Nested(block, parts) => {
                    let mut block = block.clone();
                    for (word, part) in parts {
                        let at = base + self.place(part) as u64;
                        block[word * 8..word * 8 + 8].copy_from_slice(&at.to_ne_bytes());
                    }
                    self.place(&block)
                }
            };
            words[1 + number] = base + at as u64;
        }
        self.outputs.push(outputs);
        for (number, word) in words.iter().enumerate() {
            let at = index * ENTRY + number * 8;
            self.bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
    }

    /// Takes results and outputs from the table as it is after the run. The first call with an unexpected result is the
    /// error; `who` names the task in it.
    pub fn read_back(&self, after: &[u8], calls: &mut [RemoteCall], who: &dyn std::fmt::Display) -> Result<()> {
        for (index, (call, outputs)) in calls.iter_mut().zip(&self.outputs).enumerate() {
            let at = index * ENTRY + RESULT;
            call.result = i64::from_ne_bytes(after[at..at + 8].try_into().expect("8 bytes"));
            call.out = outputs.iter().map(|&(offset, bytes)| after[offset..offset + bytes].to_vec()).collect();
        }
        calls.iter().try_for_each(|call| expected(call, who))
    }
}

/// Compares a result with what the call expects.
pub fn expected(call: &RemoteCall, who: &dyn std::fmt::Display) -> Result<()> {
    let wrong = match call.expect {
        Expect::Anything => false,
        Expect::Success => call.error().is_some(),
        Expect::Exactly(value) => call.result != value,
    };
    if !wrong {
        return Ok(());
    }
    let problem = Problem::new("E-REMOTE-CALL", format!("{} in task {who}", call.what));
    Err(match call.error() {
        Some(error) => problem.because(error),
        None => problem.because(format!("the kernel returned {}", call.result)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn arguments_lie_behind_the_table() {
        let calls = [
            RemoteCall::new("one", 7, vec![Arg::Value(3), Arg::In(vec![1, 2, 3]), Arg::Out(5)]),
            RemoteCall::new("two", 8, vec![Arg::Nested(vec![0; 16], vec![(1, vec![9; 4])])]),
        ];
        let (table, count) = lay_out(&calls, 0x1000, 4096).unwrap();
        assert_eq!(count, 2);
        assert_eq!(word(&table.bytes, 0), 7);
        assert_eq!(word(&table.bytes, 8), 3);
        let at = (word(&table.bytes, 16) - 0x1000) as usize;
        assert_eq!(table.bytes[at..at + 3], [1, 2, 3]);
        assert_eq!(word(&table.bytes, 2 * ENTRY), END);
        let block = (word(&table.bytes, ENTRY + 8) - 0x1000) as usize;
        let part = (word(&table.bytes, block + 8) - 0x1000) as usize;
        assert_eq!(table.bytes[part..part + 4], [9; 4]);
    }

    #[test]
    fn results_and_outputs_come_back() {
        let mut calls = [RemoteCall::new("one", 7, vec![Arg::Out(5)]), RemoteCall::new("two", 8, vec![])];
        let (table, _) = lay_out(&calls, 0, 4096).unwrap();
        let mut after = table.bytes.clone();
        after[RESULT..RESULT + 8].copy_from_slice(&5i64.to_ne_bytes());
        let at = word(&table.bytes, 8) as usize;
        after[at..at + 5].copy_from_slice(b"hello");
        after[ENTRY + RESULT..ENTRY + RESULT + 8].copy_from_slice(&(-2i64).to_ne_bytes());
        let error = table.read_back(&after, &mut calls, &1).unwrap_err();
        assert_eq!(calls[0].result, 5);
        assert_eq!(calls[0].out, [b"hello".to_vec()]);
        assert!(error.what().starts_with("two"));
    }

    #[test]
    fn what_does_not_fit_waits() {
        let calls = vec![RemoteCall::new("big", 1, vec![Arg::In(vec![0; 1000])]); 10];
        let (_, count) = lay_out(&calls, 0, 4096).unwrap();
        assert!((1..4).contains(&count));
        assert!(lay_out(&calls, 0, 500).is_err());
    }
}
