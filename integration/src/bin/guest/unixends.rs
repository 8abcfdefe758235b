//! Unix sockets in rarer states: connected to themselves, renamed, their peer or a queued message's sender gone, messages
//! of which some are empty before the end.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

const HOME: &str = "/var/tmp/guest-unixends";

struct Ends {
    selfish: UnixDatagram,
    renamed: UnixListener,
    nameless: (UnixStream, UnixStream),
    widow: UnixDatagram,
    inbox: UnixDatagram,
    answered: (UnixDatagram, UnixDatagram),
    sequence: OwnedFd,
}

fn path(name: &str) -> String {
    format!("{HOME}/{name}")
}

impl Ends {
    /// What reading takes is put there anew.
    fn queue(&mut self) -> Result<()> {
        self.selfish.send(b"note to self")?;
        let sender = UnixDatagram::bind(path("sender"))?;
        sender.send_to(b"last words", path("inbox"))?;
        drop(sender);
        self.answered.1.send_to(b"answer", path("client"))?;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        for message in [&b"1"[..], b"", b"333"] {
            send(theirs.as_raw_fd(), message, MsgFlags::empty())?;
        }
        self.sequence = ours;
        self.widow = UnixDatagram::unbound()?;
        let gone = UnixDatagram::bind(path("gone"))?;
        self.widow.connect(path("gone"))?;
        drop(gone);
        fs::remove_file(path("gone"))?;
        Ok(())
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let _ = fs::remove_dir_all(HOME);
    fs::create_dir_all(HOME)?;
    let selfish = UnixDatagram::bind(path("selfish"))?;
    selfish.connect(path("selfish"))?;
    let renamed = UnixListener::bind(path("before"))?;
    fs::rename(path("before"), path("after"))?;
    let listener = UnixListener::bind(path("nameless"))?;
    let client = UnixStream::connect(path("nameless"))?;
    let (server, _) = listener.accept()?;
    fs::remove_file(path("nameless"))?;
    fs::write(path("nameless"), "a file that took the name")?;
    let answered = (UnixDatagram::bind(path("client"))?, UnixDatagram::bind(path("server"))?);
    answered.0.connect(path("server"))?;
    let mut ends = Ends {
        selfish,
        renamed,
        nameless: (client, server),
        widow: UnixDatagram::unbound()?,
        inbox: UnixDatagram::bind(path("inbox"))?,
        answered,
        sequence: UnixDatagram::unbound()?.into(),
    };
    ends.queue()?;
    Ok(Box::new(ends))
}

impl Guest for Ends {
    fn verify(&mut self) -> Result<()> {
        let mut text = [0; 64];
        let got = self.selfish.recv(&mut text)?;
        ensure!(&text[..got] == b"note to self", "the socket that talks to itself holds {:?}", &text[..got]);
        let name = self.renamed.local_addr()?;
        ensure!(name.as_pathname() == Some(path("before").as_ref()), "the renamed socket is called {name:?}");
        let _client = UnixStream::connect(path("after")).context("connect by the new name")?;
        self.renamed.accept()?;
        ensure!(!fs::exists(path("before"))?, "the old name is there again");
        self.nameless.0.write_all(b"x")?;
        self.nameless.1.read_exact(&mut text[..1])?;
        let name = self.nameless.0.peer_addr()?;
        ensure!(name.as_pathname() == Some(path("nameless").as_ref()), "the unlinked socket is called {name:?}");
        ensure!(fs::read(path("nameless"))? == b"a file that took the name", "who took its name lost it");
        let refused = self.widow.send(b"?").map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::ConnectionRefused), "sending to a peer that is gone: {refused:?}");
        let (got, from) = self.inbox.recv_from(&mut text)?;
        ensure!(&text[..got] == b"last words", "the inbox holds {:?}", &text[..got]);
        ensure!(from.as_pathname() == Some(path("sender").as_ref()), "they are from {from:?}");
        fs::remove_file(path("sender")).context("the sender's file")?;
        let got = self.answered.0.recv(&mut text)?;
        ensure!(&text[..got] == b"answer", "the client holds {:?}", &text[..got]);
        for expected in [&b"1"[..], b"", b"333", b""] {
            let got = recv(self.sequence.as_raw_fd(), &mut text, MsgFlags::MSG_DONTWAIT)?;
            ensure!(&text[..got] == expected, "a message is {:?}, not {expected:?}", &text[..got]);
        }
        self.queue()
    }
}
