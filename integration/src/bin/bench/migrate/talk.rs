//! What the clients say: RESP, HTTP and lines that are echoed. Each knows what the right reply is.

use super::load::Protocol;
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Length of a value in redis.
const VALUE: usize = 1000;

/// SETs of keys out of a full server, each key by one connection only, so that it is known which value is the last.
pub struct Redis {
    connections: usize,
    /// By key: which of its values was acknowledged last, 0 for none.
    last: Vec<u32>,
    /// By connection: what is not acknowledged yet.
    under_way: Vec<VecDeque<(u32, u32)>>,
    round: u32,
    random: u64,
}

impl Redis {
    pub fn new(connections: usize, keys: usize) -> Redis {
        let under_way = vec![VecDeque::new(); connections];
        Redis { connections, last: vec![0; keys], under_way, round: 0, random: 0x9e37_79b9_7f4a_7c15 }
    }

    /// One of a connection's own keys.
    fn key(&mut self, connection: usize) -> usize {
        // Xorshift: any spread over all keys will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let own = self.last.len() / self.connections;
        (self.random as usize % own) * self.connections + connection
    }

    /// Whether the server has that value, asked for in a row with others.
    fn read_back(&self, keys: &[usize], out: &mut TcpStream, answers: &mut impl BufRead) -> Result<()> {
        let ask: String = keys.iter().map(|key| format!("GET key:{key}\r\n")).collect();
        out.write_all(ask.as_bytes())?;
        let (mut line, mut found, mut due) = (String::new(), vec![0; VALUE + 2], Vec::new());
        for key in keys {
            line.clear();
            ensure!(answers.read_line(&mut line)? > 0, "the server closed the connection");
            ensure!(line.trim() == format!("${VALUE}"), "key:{key} is {} at the end", line.trim());
            answers.read_exact(&mut found)?;
            due.clear();
            value(*key as u32, self.last[*key], &mut due);
            let head = String::from_utf8_lossy(&found[..20]);
            ensure!(found[..VALUE] == due, "key:{key}: an acknowledged write is lost, it begins {head:?}");
        }
        Ok(())
    }
}

/// A value that tells of which key and round it is, everywhere in it.
fn value(key: u32, round: u32, out: &mut Vec<u8>) {
    let piece = format!("{key:08}-{round:010}.");
    let from = out.len();
    out.extend_from_slice(piece.as_bytes());
    while out.len() - from < VALUE {
        let more = (out.len() - from).min(VALUE - (out.len() - from));
        out.extend_from_within(from..from + more);
    }
}

impl Protocol for Redis {
    fn request(&mut self, connection: usize, out: &mut Vec<u8>) {
        let key = self.key(connection) as u32;
        self.round += 1;
        let name = format!("key:{key}");
        out.extend_from_slice(format!("*3\r\n$3\r\nSET\r\n${}\r\n{name}\r\n${VALUE}\r\n", name.len()).as_bytes());
        value(key, self.round, out);
        out.extend_from_slice(b"\r\n");
        self.under_way[connection].push_back((key, self.round));
    }

    fn reply(&mut self, connection: usize, bytes: &[u8]) -> Result<Option<usize>> {
        const OK: &[u8] = b"+OK\r\n";
        if bytes.len() < OK.len() && OK.starts_with(bytes) {
            return Ok(None);
        }
        ensure!(bytes.starts_with(OK), "a SET is answered by {:?}", String::from_utf8_lossy(bytes));
        let (key, round) = self.under_way[connection].pop_front().context("OK without a SET")?;
        self.last[key as usize] = round;
        Ok(Some(OK.len()))
    }

    fn check(&mut self, server: SocketAddr) -> Result<Option<String>> {
        let mut out = TcpStream::connect(server)?;
        out.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut answers = BufReader::new(out.try_clone()?);
        let written: Vec<usize> = (0..self.last.len()).filter(|key| self.last[*key] > 0).collect();
        for some in written.chunks(100) {
            self.read_back(some, &mut out, &mut answers)?;
        }
        Ok(Some(format!("{} keys read back, each with the value that was acknowledged last", written.len())))
    }
}

/// GETs of one page, always the same bytes.
pub struct Http {
    request: String,
    page: Option<Vec<u8>>,
}

impl Http {
    pub fn new(host: &str, path: &str) -> Http {
        Http { request: format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"), page: None }
    }
}

impl Protocol for Http {
    fn request(&mut self, _connection: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(self.request.as_bytes());
    }

    fn reply(&mut self, _connection: usize, bytes: &[u8]) -> Result<Option<usize>> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
        let head = std::str::from_utf8(&bytes[..end])?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "a GET is answered by {head:?}");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.context("no length")?.trim().parse()?;
        let Some(body) = bytes.get(end + 4..end + 4 + length) else { return Ok(None) };
        let page = self.page.get_or_insert_with(|| body.to_vec());
        ensure!(page == body, "the page is another");
        Ok(Some(end + 4 + length))
    }
}

/// Lines that come back as they are.
pub struct Ping {
    next: u64,
    under_way: Vec<VecDeque<u64>>,
}

impl Ping {
    pub fn new(connections: usize) -> Ping {
        Ping { next: 0, under_way: vec![VecDeque::new(); connections] }
    }
}

impl Protocol for Ping {
    fn request(&mut self, connection: usize, out: &mut Vec<u8>) {
        self.next += 1;
        self.under_way[connection].push_back(self.next);
        out.extend_from_slice(format!("ping {}\n", self.next).as_bytes());
    }

    fn reply(&mut self, connection: usize, bytes: &[u8]) -> Result<Option<usize>> {
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
        let line = std::str::from_utf8(&bytes[..end])?;
        match self.under_way[connection].pop_front() {
            Some(number) if line == format!("ping {number}") => Ok(Some(end + 1)),
            other => bail!("{line:?} came where {other:?} was due"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_as_long_as_it_says() {
        let mut out = b"before".to_vec();
        value(12, 7, &mut out);
        assert_eq!(out.len(), 6 + VALUE);
        assert!(out.starts_with(b"before00000012-0000000007.00000012-"));
    }

    #[test]
    fn only_an_ok_is_an_answer_to_a_set() {
        let mut redis = Redis::new(2, 10);
        let mut out = Vec::new();
        redis.request(1, &mut out);
        assert_eq!(redis.reply(1, b"+O").unwrap(), None);
        assert_eq!(redis.reply(1, b"+OK\r\n").unwrap(), Some(5));
        assert_eq!(redis.last.iter().filter(|round| **round == 1).count(), 1);
        assert!(redis.reply(1, b"-ERR\r\n").is_err());
    }

    #[test]
    fn a_page_must_stay_the_same() {
        let mut http = Http::new("h", "/");
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab";
        assert_eq!(http.reply(0, &answer[..30]).unwrap(), None);
        assert_eq!(http.reply(0, answer).unwrap(), Some(answer.len()));
        assert!(http.reply(0, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nac").is_err());
    }

    #[test]
    fn lines_come_back_in_their_order() {
        let mut ping = Ping::new(1);
        let mut out = Vec::new();
        ping.request(0, &mut out);
        ping.request(0, &mut out);
        assert_eq!(ping.reply(0, b"ping 1\nping 2\n").unwrap(), Some(7));
        assert!(ping.reply(0, b"ping 3\n").is_err());
    }
}
