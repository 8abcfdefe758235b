//! A way past ssh, for all that the source sends.
//!
//! ssh moves a fraction of what a connection of our own does: two more programs pass every byte on and encrypt it on the way.
//! So ssh authenticates, starts the far side and carries what that says; what comes from the source goes over TLS 1.3 where
//! the hosts reach each other. The destination listens where ssh has come to, on a port of [`PORTS`]. Each side makes a key
//! for this one move and tells the other through ssh ([`Key`], [`Door`]); both prove theirs in the handshake (raw public keys,
//! RFC 7250). Nobody else gets further than that: there are no certificates, no names, nothing that outlives the move.
//!
//! The direct way goes in one direction. Both sides keep ssh at the same time, and the end of either way is the end of the
//! link.

use super::LINK;
use nix::sys::socket::{setsockopt, sockopt};
use pod_runtime::{Doing, Problem, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, ClientConfig, ClientConnection};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ServerConfig, ServerConnection};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{CertificateError, Connection, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a destination listens: the ports of libvirt's migrations, which firewalls know.
pub const PORTS: RangeInclusive<u16> = 49152..=49215;
/// Memory goes through ssh, though another way was wanted.
pub const TUNNELLED: &str = "W-TUNNELLED";

/// A host that does not answer by then is not reached on this way.
const CONNECT: Duration = Duration::from_millis(1500);
/// One that answers takes no longer than this for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Who has connected and not proved yet who it is.
const MOST_GUESTS: usize = 8;
/// Read at once: rustls asks for 4 KiB at a time.
const AHEAD: usize = 256 << 10;
/// Encrypted at once; all of it is sent before more is taken.
const AT_ONCE: usize = 256 << 10;

/// What one side proves itself by, once.
#[derive(Debug)]
pub struct Key(Arc<CertifiedKey>);

/// Where the destination listens, and whom one finds there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Door {
    pub address: SocketAddr,
    /// Its public key (SubjectPublicKeyInfo).
    pub key: ByteBuf,
}

impl Key {
    pub fn new() -> Result<Key> {
        let what = || "make a key".to_owned();
        let random = ring::rand::SystemRandom::new();
        let private = ring::signature::Ed25519KeyPair::generate_pkcs8(&random);
        let private = private.map_err(|unspecified| unspecified.to_string()).doing(what)?;
        let private = PrivatePkcs8KeyDer::from(private.as_ref().to_vec()).into();
        let key = provider::default_provider().key_provider.load_private_key(private);
        let key = key.map_err(io::Error::other).doing(what)?;
        let public = key.public_key().map(|public| CertificateDer::from(public.to_vec()));
        Ok(Key(Arc::new(CertifiedKey::new(public.into_iter().collect(), key))))
    }

    /// To be told to the other side, by a way that cannot be tampered with.
    pub fn public(&self) -> ByteBuf {
        ByteBuf::from(self.0.cert.first().map_or(&[][..], |public| public))
    }
}

/// The one peer that is let in.
#[derive(Debug)]
struct Pinned {
    key: Vec<u8>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn is(&self, shown: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let same = shown.as_ref() == self.key;
        same.then_some(()).ok_or_else(|| CertificateError::ApplicationVerificationFailure.into())
    }

    fn signed(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(shown.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.2 is never spoken.
fn too_old() -> rustls::Error {
    rustls::PeerIncompatible::Tls12NotOffered.into()
}

/// What either side asks of the other's signature: rustls has a trait for each side, with the same methods.
macro_rules! proved_by_raw_key {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
            Err(too_old())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            shown: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
            self.signed(message, shown, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.schemes()
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.is(shown).map(|()| ServerCertVerified::assertion())
    }

    proved_by_raw_key!();
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.is(shown).map(|()| ClientCertVerified::assertion())
    }

    proved_by_raw_key!();
}

/// The fastest cipher where the processor has instructions for AES, and the one that is fast without.
fn ciphers() -> Arc<CryptoProvider> {
    use provider::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..provider::default_provider() })
}

fn pinned(key: &[u8], provider: &Arc<CryptoProvider>) -> Arc<Pinned> {
    Arc::new(Pinned { key: key.to_vec(), provider: Arc::clone(provider) })
}

/// A connection to a peer that has proved who it is. Never blocks.
pub struct Direct {
    socket: BufReader<TcpStream>,
    session: Connection,
}

impl Direct {
    fn new(socket: TcpStream, session: Connection) -> io::Result<Direct> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        // A host that is gone is noticed after 9 s, as by ssh. One that answers and does not read is waited for.
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &3)?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &3)?;
        setsockopt(&socket, sockopt::TcpKeepCount, &2)?;
        let mut direct = Direct { socket: BufReader::with_capacity(AHEAD, socket), session };
        direct.session.set_buffer_limit(Some(AT_ONCE));
        Ok(direct)
    }

    /// Takes as much as it encrypts at once, if nothing waits to be sent; [`Direct::drain`] sends it.
    pub(super) fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.drain()?;
        self.session.writer().write_vectored(from)
    }

    /// Sends what was encrypted.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(self.socket.get_mut())?;
        }
        Ok(())
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(into) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if !self.take()? {
                return Ok(0);
            }
        }
    }

    /// Takes in what has come; whether it goes on.
    fn take(&mut self) -> io::Result<bool> {
        let came = self.session.read_tls(&mut self.socket)?;
        self.session.process_new_packets().map_err(io::Error::other)?;
        Ok(came > 0)
    }

    /// Destination: the source is told that it has been let in, by the one byte that ever goes to it here.
    fn welcome(&mut self) -> io::Result<()> {
        self.session.writer().write_all(&[1])?;
        self.drain()
    }

    /// As far as a handshake comes without waiting. It may have to be called again when something can be read.
    fn shake(&mut self) -> io::Result<()> {
        while self.session.is_handshaking() {
            self.drain()?;
            if !self.session.is_handshaking() {
                break;
            }
            match self.take() {
                Ok(true) => {}
                Ok(false) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(e) => {
                    let _ = self.drain(); // it is told why
                    return Err(e);
                }
            }
        }
        self.drain()
    }
}

impl AsFd for Direct {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Source: goes to where the destination listens. `wait` says whether the descriptor could be read by then.
pub fn connect(
    door: &Door,
    key: &Key,
    wait: impl Fn(BorrowedFd<'_>, Instant) -> io::Result<bool>,
) -> io::Result<Direct> {
    let provider = ciphers();
    let verifier = pinned(&door.key, &provider);
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&key.0))));
    let name = ServerName::IpAddress(door.address.ip().into());
    let session = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let socket = TcpStream::connect_timeout(&door.address, CONNECT)?;
    let mut direct = Direct::new(socket, session.into())?;
    let end = Instant::now() + HANDSHAKE;
    loop {
        // Having said the last word of the handshake is not to be let in.
        match direct.shake().and_then(|()| direct.read(&mut [0])) {
            Ok(1) => return Ok(direct),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        if !wait(direct.as_fd(), end)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// Destination: waits for the source.
pub struct Listening {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    guests: Vec<Direct>,
    /// Nobody more is let in: that failed, and would again.
    full: bool,
    /// The one that has proved who it is.
    source: Option<Direct>,
}

impl Listening {
    /// Where ssh has come to, for the holder of this key.
    ///
    /// # Errors
    /// Nothing says where that is; there is no free port; that is no address of this host.
    pub fn open(source: &[u8]) -> Result<(Listening, Door)> {
        let came_to = std::env::var("SSH_CONNECTION").ok().as_deref().and_then(came_to);
        let unknown = || {
            let what = "SSH_CONNECTION does not say to which address ssh has come";
            Problem::new(LINK, what).fix("have sudo keep SSH_CONNECTION (env_keep), if that starts pod there")
        };
        Listening::at(came_to.ok_or_else(unknown)?, source)
    }

    fn at(address: IpAddr, source: &[u8]) -> Result<(Listening, Door)> {
        let what = || format!("listen at {address} on a port from {} to {}", PORTS.start(), PORTS.end());
        let listener = bind(address).code(LINK, what)?;
        listener.set_nonblocking(true).doing(what)?;
        let (key, provider) = (Key::new()?, ciphers());
        let verifier = pinned(source, &provider);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)
            .doing(what)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&key.0))));
        // Nobody comes again, and a source that closes its end with tickets unread would take back what it had sent.
        config.send_tls13_tickets = 0;
        let door = Door { address: listener.local_addr().doing(what)?, key: key.public() };
        Ok((Listening { listener, config: Arc::new(config), guests: Vec::new(), full: false, source: None }, door))
    }

    /// What this waits for.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let listener = (!self.full).then(|| self.listener.as_fd());
        self.guests.iter().map(AsFd::as_fd).chain(listener).collect()
    }

    /// Goes on with everybody as far as that is possible without waiting. Who is not the source is shown out.
    pub(super) fn serve(&mut self) {
        for guest in std::mem::take(&mut self.guests) {
            self.greet(guest);
        }
        // Not without end: by then there may be a word from the source.
        for _ in 0..MOST_GUESTS {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    let session = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other);
                    if let Ok(guest) = session.and_then(|session| Direct::new(socket, session.into())) {
                        self.greet(guest);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(problem) => {
                    tracing::warn!(%problem, "nobody more can be let in");
                    self.full = true;
                    return;
                }
            }
        }
    }

    fn greet(&mut self, mut guest: Direct) {
        match guest.shake().and_then(|()| guest.welcome()) {
            Ok(()) => self.source = Some(guest),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if self.guests.len() == MOST_GUESTS {
                    self.guests.remove(0); // who has had most time
                }
                self.guests.push(guest);
            }
            Err(problem) => tracing::info!(%problem, "somebody who is not the source wanted to send a pod"),
        }
    }

    pub(super) fn source(&mut self) -> Option<Direct> {
        self.source.take()
    }

    /// How long the source may take once it says that it comes this way.
    pub(super) fn patience(&self) -> Duration {
        HANDSHAKE
    }
}

fn bind(address: IpAddr) -> io::Result<TcpListener> {
    for port in PORTS {
        match TcpListener::bind((address, port)) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Of what sshd says: the client's address and port, and then ours.
fn came_to(connection: &str) -> Option<IpAddr> {
    connection.split(' ').nth(2)?.parse().ok()
}

/// Why the source did not get to where the destination listens, and what helps.
pub(super) fn unreached(door: &Door, error: io::Error) -> Problem {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    let closed = [TimedOut, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable];
    let ports = format!("let its TCP ports {} to {} be reached from here", PORTS.start(), PORTS.end());
    let closed = closed.contains(&error.kind());
    let problem = Problem::new(LINK, format!("{} cannot be reached", door.address)).because(error);
    if closed { problem.fix(ports) } else { problem }
}

/// The operator should know: it is slower, and how it becomes faster.
pub fn tunnelled(host: &str, problem: &Problem) -> String {
    let help = problem.way_out().map_or_else(String::new, |fix| format!("; {fix}"));
    format!(
        "{TUNNELLED}: memory goes through ssh, which is slower, and not directly to {host}: {}{help} (--tunnelled does not try it)",
        problem.chain()
    )
}

#[cfg(test)]
mod tests {
    use super::super::Link;
    use super::*;
    use std::net::Ipv4Addr;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn link(stream: UnixStream) -> Link {
        let copy = stream.try_clone().unwrap();
        Link::open(OwnedFd::from(stream), OwnedFd::from(copy), "the other", None).unwrap()
    }

    /// What the destination hears after the source has said by which way it comes, until the end.
    fn destination(ssh: UnixStream, mut listening: Listening) -> (Vec<String>, Problem) {
        let mut link = link(ssh);
        link.serve_until_heard(&mut listening).unwrap();
        if link.hear::<bool>().unwrap() {
            link.come(listening).unwrap();
        }
        let mut heard = Vec::new();
        loop {
            match link.hear() {
                Ok(word) => heard.push(word),
                Err(problem) => return (heard, problem),
            }
        }
    }

    fn words(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("{n} ").repeat(40_000)).collect()
    }

    #[test]
    fn all_that_is_said_comes_past_ssh() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        assert!(PORTS.contains(&door.address.port()));
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        let before = link.writer.bytes();
        words(50).iter().for_each(|word| link.say(word).unwrap());
        assert!(link.writer.bytes() - before > 4 << 20);
        drop(link);
        let (heard, end) = there.join().unwrap();
        assert!(heard == words(50), "{} words came", heard.len());
        assert_eq!(end.code(), LINK, "{end}");
    }

    #[test]
    fn strangers_do_not_get_in_and_do_not_keep_the_source_out() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        // They say nothing, nonsense, prove another key, or find another than they were told of.
        let _silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(door.address).unwrap()).collect();
        let mut loud = TcpStream::connect(door.address).unwrap();
        loud.write_all(&[0x16; 70_000]).ok();
        assert!(link.connect(&door, &Key::new().unwrap()).is_err(), "a stranger was let in");
        let other = Door { key: Key::new().unwrap().public(), ..door.clone() };
        assert!(link.connect(&other, &key).is_err(), "another host was taken for the destination");
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        link.say(&"it is I").unwrap();
        drop(link);
        assert_eq!(there.join().unwrap().0, ["it is I"]);
    }

    #[test]
    fn the_end_of_ssh_is_the_end() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let also = ssh.try_clone().unwrap();
        let mut link = link(ssh);
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        link.say(&"one").unwrap();
        also.shutdown(std::net::Shutdown::Both).unwrap();
        let (heard, end) = there.join().unwrap();
        assert_eq!((heard.len() <= 1, end.code()), (true, LINK), "{end}");
        drop(link);
    }

    #[test]
    fn who_does_not_come_goes_through_ssh() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        let nobody = TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap();
        let unreached = Door { address: nobody, ..door };
        let problem = link.connect(&unreached, &key).err().unwrap();
        let said = tunnelled("hostB", &problem);
        assert!(said.contains("to hostB: ") && said.contains("ports 49152 to 49215"), "{said}");
        link.say(&false).unwrap();
        words(3).iter().for_each(|word| link.say(word).unwrap());
        drop(link);
        assert_eq!(there.join().unwrap().0, words(3));
    }

    #[test]
    fn where_ssh_came_to() {
        assert_eq!(came_to("10.0.0.1 50000 10.0.0.2 22"), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(came_to("fd77::1 50000 fd77::2 22"), Some("fd77::2".parse().unwrap()));
        for strange in ["", "10.0.0.1 50000", "a b c d", "UNKNOWN 65535 UNKNOWN 65535"] {
            assert_eq!(came_to(strange), None, "{strange}");
        }
    }
}
