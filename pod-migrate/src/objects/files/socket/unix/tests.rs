use super::*;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

#[test]
fn a_stream_is_peeked_and_stays() {
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.write_all(b"hello").unwrap();
    let messages = peek_stream(b.as_fd(), -1).unwrap();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].bytes, b"hello");
    let mut back = [0; 5];
    b.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
}

#[test]
fn descriptors_come_with_their_piece() {
    let (a, b) = UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    unix::send(a.as_fd(), b"with", &[], &[file.as_raw_fd()], None).unwrap();
    unix::send(a.as_fd(), b"after", &[], &[], None).unwrap();
    for _ in 0..2 {
        let messages = peek_stream(b.as_fd(), -1).unwrap();
        let seen: Vec<_> = messages.iter().map(|m| (m.bytes.as_slice(), m.fds.len())).collect();
        assert_eq!(seen, [(&b"with"[..], 1), (b"after", 0)]);
    }
    assert_eq!(inet::number(b.as_fd(), libc::SOL_SOCKET, SO_PEEK_OFF).unwrap(), -1);
    let mut all = vec![0; 9];
    assert_eq!((&b).read(&mut all).unwrap(), 4, "a read stops behind descriptors, as before");
}

#[test]
fn datagrams_keep_their_boundaries() {
    let (a, b) = UnixDatagram::pair().unwrap();
    for message in [&b"one"[..], b"twotwo", b"3"] {
        a.send(message).unwrap();
    }
    let messages = peek_messages(b.as_fd(), -1).unwrap();
    assert_eq!(messages.iter().map(|m| m.bytes.len()).collect::<Vec<_>>(), [3, 6, 1]);
    let mut buffer = [0; 10];
    assert_eq!(b.recv(&mut buffer).unwrap(), 3);
}

#[test]
fn diag_knows_the_peer() {
    let (a, b) = UnixStream::pair().unwrap();
    let inode = |fd: &UnixStream| fstat(fd).unwrap().st_ino;
    let listed = diag::list(a.as_fd()).unwrap();
    assert_eq!(u64::from(listed[&inode(&a)].peer.unwrap()), inode(&b));
    let gone = inode(&a);
    drop(b);
    assert_eq!(diag::list(a.as_fd()).unwrap()[&gone].peer.unwrap_or(0), 0);
    let _: OwnedFd = a.into();
}
