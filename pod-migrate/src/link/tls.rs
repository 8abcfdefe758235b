//! TLS 1.3 between two hosts that know each other's keys.
//!
//! Both prove a raw public key (RFC 7250) in the handshake: there are no certificates, no names, no authorities. Whoever proves
//! none that is expected gets no further than that. What is sent afterwards is a stream in each direction ([`Session`]), which
//! never blocks: who uses it waits by poll(2).

use nix::sys::socket::{setsockopt, sockopt};
use pod_runtime::{Doing, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, ClientConfig, ClientConnection};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ServerConfig, ServerConnection};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{CertificateError, Connection, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use serde_bytes::ByteBuf;
use std::collections::VecDeque;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A host that does not answer by then is not reached on this way.
const CONNECT: Duration = Duration::from_millis(1500);
/// One that answers takes no longer than this for a handshake.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(5);
/// Read at once: rustls asks for 4 KiB at a time.
const AHEAD: usize = 256 << 10;
/// Encrypted at once; all of it is sent before more is taken.
const AT_ONCE: usize = 256 << 10;

/// What one side proves itself by.
#[derive(Debug)]
pub struct Key(Arc<CertifiedKey>);

impl Key {
    /// One for this once.
    pub fn new() -> Result<Key> {
        Key::of(&Key::secret()?)
    }

    /// A new private half (PKCS #8), to be kept.
    pub fn secret() -> Result<Vec<u8>> {
        let random = ring::rand::SystemRandom::new();
        let private = ring::signature::Ed25519KeyPair::generate_pkcs8(&random);
        let private = private.map_err(|unspecified| unspecified.to_string()).doing(|| "make a key".into())?;
        Ok(private.as_ref().to_vec())
    }

    /// One whose private half was kept.
    pub fn of(secret: &[u8]) -> Result<Key> {
        let what = || "take a key".to_owned();
        let private = PrivatePkcs8KeyDer::from(secret.to_vec()).into();
        let key = provider::default_provider().key_provider.load_private_key(private);
        let key = key.map_err(io::Error::other).doing(what)?;
        let public = key.public_key().map(|public| CertificateDer::from(public.to_vec()));
        Ok(Key(Arc::new(CertifiedKey::new(public.into_iter().collect(), key))))
    }

    /// Its public half (SubjectPublicKeyInfo), to be told to the other side by a way that cannot be tampered with.
    pub fn public(&self) -> ByteBuf {
        ByteBuf::from(self.0.cert.first().map_or(&[][..], |public| public))
    }
}

/// Who is expected.
#[derive(Debug)]
struct Pinned {
    keys: Vec<Vec<u8>>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn is(&self, shown: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let known = self.keys.iter().any(|key| key == shown.as_ref());
        known.then_some(()).ok_or_else(|| CertificateError::ApplicationVerificationFailure.into())
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

fn pinned(keys: Vec<Vec<u8>>, provider: &Arc<CryptoProvider>) -> Arc<Pinned> {
    Arc::new(Pinned { keys, provider: Arc::clone(provider) })
}

/// A connection to a peer that has proved who it is. Never blocks.
pub struct Session {
    socket: BufReader<TcpStream>,
    session: Connection,
}

impl Session {
    fn new(socket: TcpStream, session: Connection) -> io::Result<Session> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        // A host that is gone is noticed after 9 s, as by ssh. One that answers and does not read is waited for.
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &3)?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &3)?;
        setsockopt(&socket, sockopt::TcpKeepCount, &2)?;
        let mut direct = Session { socket: BufReader::with_capacity(AHEAD, socket), session };
        direct.session.set_buffer_limit(Some(AT_ONCE));
        Ok(direct)
    }

    /// Takes as much as it encrypts at once, if nothing waits to be sent; [`Session::drain`] sends it.
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

    /// Whether something was taken from the socket already and not read.
    pub(super) fn has_more(&mut self) -> io::Result<bool> {
        let state = self.session.process_new_packets().map_err(io::Error::other)?;
        Ok(state.plaintext_bytes_to_read() > 0 || !self.socket.buffer().is_empty())
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

    /// Whether something that was encrypted has not been sent yet.
    pub(super) fn is_behind(&self) -> bool {
        self.session.wants_write()
    }

    /// Whom the other side has proved to be (SubjectPublicKeyInfo).
    pub(super) fn peer(&self) -> Option<&[u8]> {
        self.session.peer_certificates()?.first().map(|shown| shown.as_ref())
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.socket.get_ref()
    }

    /// Takes in what has come; whether it goes on.
    fn take(&mut self) -> io::Result<bool> {
        let came = self.session.read_tls(&mut self.socket)?;
        self.session.process_new_packets().map_err(io::Error::other)?;
        Ok(came > 0)
    }

    /// Who came is told that it has been let in, by one byte.
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

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Goes to who listens there and has this key. `wait` says whether the descriptor could be read by then.
pub(super) fn connect(
    address: SocketAddr,
    theirs: &[u8],
    key: &Key,
    wait: impl Fn(BorrowedFd<'_>, Instant) -> io::Result<bool>,
) -> io::Result<Session> {
    let provider = ciphers();
    let verifier = pinned(vec![theirs.to_vec()], &provider);
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&key.0))));
    let name = ServerName::IpAddress(address.ip().into());
    let session = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let socket = TcpStream::connect_timeout(&address, CONNECT)?;
    let mut session = Session::new(socket, session.into())?;
    let end = Instant::now() + HANDSHAKE;
    loop {
        // Having said the last word of the handshake is not to be let in.
        match session.shake().and_then(|()| session.read(&mut [0])) {
            Ok(1) => return Ok(session),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // A word of who has not proved to be anybody is not its own.
            Err(e) if session.peer().is_none() && is_alert(&e) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("what answers there is no pod ({e})")));
            }
            Err(e) => return Err(e),
        }
        if !wait(session.as_fd(), end)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn is_alert(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}

/// Where one listens, and who has come there.
pub(super) struct Door {
    listener: TcpListener,
    key: Key,
    config: Arc<ServerConfig>,
    /// Who has connected and not proved yet who it is, and how many of those may be there.
    guests: Vec<Session>,
    most: usize,
    /// Nobody more can be let in now.
    full: bool,
    /// Who has proved to be somebody that is expected.
    arrived: VecDeque<Session>,
}

impl Door {
    pub fn new(listener: TcpListener, key: Key, expected: Vec<Vec<u8>>, most: usize) -> Result<Door> {
        listener.set_nonblocking(true).doing(|| "set up a socket".into())?;
        let config = expecting(&key, expected)?;
        Ok(Door { listener, key, config, guests: Vec::new(), most, full: false, arrived: VecDeque::new() })
    }

    /// Whoever connects from now on has to be one of these.
    pub fn expect(&mut self, keys: Vec<Vec<u8>>) -> Result<()> {
        self.config = expecting(&self.key, keys)?;
        Ok(())
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What this waits for.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let listener = (!self.full).then(|| self.listener.as_fd());
        self.guests.iter().map(AsFd::as_fd).chain(listener).collect()
    }

    /// Goes on with everybody as far as that is possible without waiting. Who is not expected is shown out.
    pub fn serve(&mut self) {
        for guest in std::mem::take(&mut self.guests) {
            self.greet(guest);
        }
        // Not without end: the caller may have something else to do by then.
        for _ in 0..self.most {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    let session = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other);
                    if let Ok(guest) = session.and_then(|session| Session::new(socket, session.into())) {
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

    /// Whether letting in has failed.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// What kept more from being let in may be over.
    pub fn reopen(&mut self) {
        self.full = false;
    }

    fn greet(&mut self, mut guest: Session) {
        match guest.shake().and_then(|()| guest.welcome()) {
            Ok(()) => self.arrived.push_back(guest),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if self.guests.len() == self.most {
                    self.guests.remove(0); // who has had most time
                }
                self.guests.push(guest);
            }
            Err(problem) => tracing::info!(%problem, "somebody who is not expected has come"),
        }
    }

    pub fn arrived(&mut self) -> Option<Session> {
        self.arrived.pop_front()
    }
}

fn expecting(key: &Key, keys: Vec<Vec<u8>>) -> Result<Arc<ServerConfig>> {
    let provider = ciphers();
    let verifier = pinned(keys, &provider);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)
        .doing(|| "set up TLS".into())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&key.0))));
    // Nobody comes again, and a source that closes its end with tickets unread would take back what it had sent.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
