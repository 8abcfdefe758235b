//! HTTP/1.1 with keep-alive: the same page again and again over the same connections, always the same bytes.

use crate::{Tally, Work, connect};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

struct Connection {
    out: TcpStream,
    answers: BufReader<TcpStream>,
    request: String,
}

impl Connection {
    fn get(&mut self) -> Result<Vec<u8>> {
        self.out.write_all(self.request.as_bytes())?;
        let mut length = None;
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "the server closed the connection");
        ensure!(line.contains(" 200 "), "the server answers {line:?}");
        loop {
            line.clear();
            ensure!(self.answers.read_line(&mut line)? > 0, "the server closed the connection");
            if line.trim().is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').context("a header has a colon")?;
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse::<usize>()?);
            }
        }
        let mut body = vec![0; length.context("no content-length")?];
        self.answers.read_exact(&mut body)?;
        Ok(body)
    }
}

pub fn connections(address: &str, path: &str, count: usize) -> Result<Vec<Work>> {
    let mut work: Vec<Work> = Vec::new();
    for _ in 0..count {
        let out = connect(address)?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: keep-alive\r\n\r\n");
        let mut connection = Connection { answers: BufReader::new(out.try_clone()?), out, request };
        let expected = connection.get()?;
        work.push(Box::new(move |tally: &Tally| {
            let mut checks = 0;
            while !tally.stopped() {
                // Every answer is compared with what is known to be right: there is nothing else to look at.
                tally.check(&mut checks, || Ok(()))?;
                tally.request(|| {
                    let body = connection.get()?;
                    ensure!(body == expected, "the page is another: {} bytes, not {}", body.len(), expected.len());
                    Ok(())
                })?;
            }
            Ok(())
        }));
    }
    Ok(work)
}
