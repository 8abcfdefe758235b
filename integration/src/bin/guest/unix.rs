//! Unix sockets of every type: pairs with queued bytes, messages and descriptors; named and abstract listeners with a
//! connection that waits to be accepted; half-closed; across a fork.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg, send, sendmsg,
    socketpair,
};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

struct Sockets {
    stream: (UnixStream, UnixStream),
    datagrams: (OwnedFd, OwnedFd),
    sequenced: (OwnedFd, OwnedFd),
    carrier: (UnixStream, UnixStream),
    half: (UnixStream, UnixStream),
    listener: UnixListener,
    waiting: UnixStream,
    hidden: UnixListener,
    named: UnixDatagram,
    sender: UnixDatagram,
    child: UnixStream,
}

const PATH: &str = "/tmp/guest-socket";
const NAMED: &str = "/tmp/guest-datagrams";

impl Sockets {
    fn queue(&mut self) -> Result<()> {
        self.stream.0.write_all(b"bytes in flight")?;
        for packet in [&b"one"[..], b"", b"three"] {
            send(self.datagrams.0.as_raw_fd(), packet, MsgFlags::empty())?;
            send(self.sequenced.0.as_raw_fd(), packet, MsgFlags::MSG_EOR)?;
        }
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open("/tmp/guest-passed")?;
        file.write_all(b"passed on")?;
        let fds = [file.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.carrier.0.as_raw_fd(), &[IoSlice::new(b"f")], &message, MsgFlags::empty(), None)?;
        self.waiting = UnixStream::connect(PATH)?;
        self.sender.send_to(b"to a name", NAMED)?;
        Ok(())
    }

    fn messages(&mut self) -> Result<()> {
        for (name, pair) in [("datagram", &self.datagrams), ("seqpacket", &self.sequenced)] {
            for expected in [&b"one"[..], b"", b"three"] {
                let mut packet = [0; 64];
                let got =
                    recv(pair.1.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT).with_context(|| name.to_string())?;
                ensure!(&packet[..got] == expected, "{name}: {:?} instead of {expected:?}", &packet[..got]);
            }
        }
        let mut packet = [0; 64];
        let (got, from) = self.named.recv_from(&mut packet)?;
        ensure!(&packet[..got] == b"to a name", "the named socket holds {:?}", &packet[..got]);
        ensure!(from.is_unnamed(), "the datagram came from {from:?}");
        Ok(())
    }

    fn passed(&mut self) -> Result<()> {
        let (mut byte, mut space) = ([0], cmsg_space!([i32; 4]));
        let mut parts = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(self.carrier.1.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs()?.next() else {
            anyhow::bail!("no descriptor came with the byte")
        };
        let mut file = sys::owned(fds[0]);
        ensure!(std::io::Seek::stream_position(&mut file)? == 9, "the passed file's offset is another");
        let text = std::fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        ensure!(text == "passed on", "the passed file holds {text:?}");
        Ok(())
    }
}

fn pair(kind: SockType) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let (child, theirs) = UnixStream::pair()?;
    let other = child.try_clone()?;
    sys::fork(move || {
        drop(other);
        let mut theirs = theirs;
        let mut byte = [0];
        while theirs.read_exact(&mut byte).is_ok() && theirs.write_all(&[byte[0] + 1]).is_ok() {}
        0
    })?;
    let _ = (std::fs::remove_file(PATH), std::fs::remove_file(NAMED));
    let half = UnixStream::pair()?;
    half.0.shutdown(std::net::Shutdown::Write)?;
    let listener = UnixListener::bind(PATH)?;
    let mut sockets = Sockets {
        stream: UnixStream::pair()?,
        datagrams: pair(SockType::Datagram)?,
        sequenced: pair(SockType::SeqPacket)?,
        carrier: UnixStream::pair()?,
        half,
        waiting: UnixStream::pair()?.0,
        listener,
        hidden: UnixListener::bind_addr(&SocketAddr::from_abstract_name("guest")?)?,
        named: UnixDatagram::bind(NAMED)?,
        sender: UnixDatagram::unbound()?,
        child,
    };
    sockets.queue()?;
    Ok(Box::new(sockets))
}

impl Guest for Sockets {
    fn verify(&mut self) -> Result<()> {
        let mut text = [0; 15];
        self.stream.1.read_exact(&mut text)?;
        ensure!(&text == b"bytes in flight", "the stream holds {text:?}");
        self.messages()?;
        self.passed()?;
        ensure!(self.half.1.read(&mut text)? == 0, "the half-closed stream is open");
        self.half.1.write_all(b"x")?;
        ensure!(self.half.0.read(&mut text)? == 1, "its other half is closed");
        let (mut accepted, _) = self.listener.accept()?;
        // Not before: what is written to a connection that nobody accepted refuses the move (E-UNIX-QUEUE).
        self.waiting.write_all(b"let me in")?;
        let mut text = [0; 9];
        accepted.read_exact(&mut text)?;
        ensure!(&text == b"let me in", "the waiting connection says {text:?}");
        accepted.write_all(b"hello")?;
        let mut hello = [0; 5];
        self.waiting.read_exact(&mut hello)?;
        let _client = UnixStream::connect_addr(&SocketAddr::from_abstract_name("guest")?)?;
        self.hidden.accept()?;
        self.child.write_all(&[1])?;
        let mut byte = [0];
        self.child.read_exact(&mut byte)?;
        ensure!(byte == [2], "the child answers {byte:?}");
        self.queue()
    }
}
