//! RESP over plain connections: writers set and read back without pause, the others stay connected and ask now and then.

use crate::{Tally, Work, connect};
use anyhow::{Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

struct Connection {
    out: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Connection {
    fn new(address: &str) -> Result<Connection> {
        let out = connect(address)?;
        Ok(Connection { answers: BufReader::new(out.try_clone()?), out })
    }

    fn send(&mut self, words: &[&str]) -> Result<()> {
        let mut command = format!("*{}\r\n", words.len());
        for word in words {
            command.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        Ok(self.out.write_all(command.as_bytes())?)
    }

    /// A simple or bulk string.
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "the server closed the connection");
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", text)) => Ok(text.into()),
            Some(("$", "-1")) => bail!("a key is gone"),
            Some(("$", length)) => {
                let mut text = vec![0; length.parse::<usize>()? + 2];
                self.answers.read_exact(&mut text)?;
                text.truncate(text.len() - 2);
                Ok(String::from_utf8(text)?)
            }
            _ => bail!("the server answers {line:?}"),
        }
    }

    fn ask(&mut self, words: &[&str], expected: &str) -> Result<()> {
        self.send(words)?;
        let answer = self.answer()?;
        ensure!(answer == expected, "{words:?} is answered by {answer:?}, not {expected:?}");
        Ok(())
    }
}

/// The value of a key in a round: long enough that a torn one shows.
fn value(key: usize, round: u64) -> String {
    format!("{round}:{}", format!("{key}-{round}.").repeat(8))
}

/// Loads `keys` keys and opens the connections; the first `writers` of them write.
pub fn connections(address: &str, count: usize, writers: usize, keys: usize, pause: Duration) -> Result<Vec<Work>> {
    ensure!(count >= 1 && writers <= count && keys >= writers, "CONNECTIONS >= WRITERS, KEYS >= WRITERS");
    let mut first = Connection::new(address)?;
    for key in 0..keys {
        first.ask(&["SET", &format!("key:{key}"), &value(key, 0)], "OK")?;
    }
    let mut work: Vec<Work> = Vec::new();
    let mut first = Some(first);
    for index in 0..count {
        let connection = first.take().map_or_else(|| Connection::new(address), Ok)?;
        if index < writers {
            let own: Vec<usize> = (0..keys).filter(|key| key % writers == index).collect();
            work.push(Box::new(move |tally: &Tally| write(connection, &own, pause, tally)));
        } else {
            work.push(Box::new(move |tally: &Tally| ping(connection, tally)));
        }
    }
    Ok(work)
}

/// Writes each of its own keys in turn and reads the one before back, which nobody else writes.
fn write(mut connection: Connection, own: &[usize], pause: Duration, tally: &Tally) -> Result<()> {
    let mut last = vec![0u64; own.len()];
    let (mut round, mut checks) = (0, 0);
    while !tally.stopped() {
        round += 1;
        for at in 0..own.len() {
            if tally.stopped() {
                break;
            }
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            tally.check(&mut checks, || read_back(&mut connection, own, &last, tally))?;
            let key = format!("key:{}", own[at]);
            tally.request(|| connection.ask(&["SET", &key, &value(own[at], round)], "OK"))?;
            last[at] = round;
            let other = (at * 7 + 3) % own.len();
            let key = format!("key:{}", own[other]);
            tally.request(|| connection.ask(&["GET", &key], &value(own[other], last[other])))?;
        }
    }
    read_back(&mut connection, own, &last, tally)
}

/// All that was acknowledged.
fn read_back(connection: &mut Connection, own: &[usize], last: &[u64], tally: &Tally) -> Result<()> {
    for (key, round) in own.iter().zip(last) {
        tally.request(|| connection.ask(&["GET", &format!("key:{key}")], &value(*key, *round)))?;
    }
    Ok(())
}

fn ping(mut connection: Connection, tally: &Tally) -> Result<()> {
    let mut checks = 0;
    while !tally.stopped() {
        tally.check(&mut checks, || Ok(()))?;
        tally.request(|| connection.ask(&["PING"], "PONG"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    tally.request(|| connection.ask(&["PING"], "PONG"))
}
