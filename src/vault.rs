//! Encryption of what is stored: XChaCha20-Poly1305 under keys from a file or the
//! environment.
//!
//! The first key encrypts, all of them decrypt; so a key is changed by putting a
//! new one before it. Nonces are random: with their 192 bits any number of
//! messages may be sealed under one key (draft-irtf-cfrg-xchacha, 3.1), which the
//! 96 bits of AES-GCM would not allow at the relay's rates.
//!
//! # Form of a sealed message
//! Version (1 byte, 1), key id (4), nonce (24), ciphertext with its tag (16).

mod blinder;

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use ring::rand::{SecureRandom, SystemRandom};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::config::Secrets;

pub use blinder::Blinder;

/// How a key begins, so that scanners for secrets find one.
const KEY_PREFIX: &str = "srk1_";
const KEY_BYTES: usize = 32;
const VERSION: u8 = 1;
const NONCE_BYTES: usize = 24;
const HEAD_BYTES: usize = 1 + 4 + NONCE_BYTES;
const TAG_BYTES: usize = 16;
/// Keys of one file at the most.
const MAX_KEYS: usize = 16;
/// Largest file of keys, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// What sealing adds to a message, in bytes.
pub const SEAL_BYTES: usize = HEAD_BYTES + TAG_BYTES;

/// Names a key without telling it: the first bytes of its SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 4]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The file can't be read or made.
    #[error("[secrets] key_file {path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The file is missing although there is a store that needs it.
    #[error(
        "[secrets] key_file {0} is missing, but there is a store already, which can't be read \
         without its keys; put the file back"
    )]
    Missing(String),
    /// A line is no key.
    #[error(
        "[secrets] {0}: each line has to be a key as `segment-relay key` prints it, 1 to {MAX_KEYS} \
         of them"
    )]
    Malformed(String),
    /// The system gives no random bytes.
    #[error("the system gives no random bytes")]
    Random,
}

/// Why a sealed message can't be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsealError {
    /// The key is not among the known ones.
    #[error("it is encrypted under the key {0}, which is not among those of [secrets]")]
    UnknownKey(KeyId),
    /// It was changed, or belongs elsewhere.
    #[error("it is damaged, or not what stood there")]
    Damaged,
}

/// The keys.
pub struct Vault {
    /// The first one seals.
    keys: Vec<(KeyId, XChaCha20Poly1305)>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = self.keys.iter().map(|(id, _)| id).collect();
        f.debug_struct("Vault")
            .field("keys", &ids)
            .finish_non_exhaustive()
    }
}

impl Vault {
    /// Takes the configured keys. Where there are none, makes a file with a new one,
    /// unless there is a store already.
    ///
    /// # Errors
    /// [`VaultError`], without anything of a key.
    pub fn load(secrets: &Secrets, store_exists: bool) -> Result<Self, VaultError> {
        if let Some(keys) = &secrets.keys {
            return Self::parse(keys.expose_secret(), "keys");
        }
        let path = &secrets.key_file;
        let shown = path.display().to_string();
        let failed = |source| VaultError::File {
            path: shown.clone(),
            source,
        };
        match File::open(path) {
            Ok(file) => {
                let mut text = Zeroizing::new(String::new());
                file.take(MAX_FILE_BYTES)
                    .read_to_string(&mut text)
                    .map_err(failed)?;
                Self::parse(&text, &format!("key_file {shown}"))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if store_exists {
                    return Err(VaultError::Missing(shown));
                }
                let key = new_key()?;
                write_private(path, key.expose_secret()).map_err(failed)?;
                tracing::info!(path = %shown, "a new key was made; keep the file, and apart from the store");
                Self::parse(key.expose_secret(), "a new key")
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Takes keys, one a line; blank lines and those that begin with # are passed
    /// over.
    fn parse(text: &str, source: &str) -> Result<Self, VaultError> {
        let malformed = || VaultError::Malformed(source.to_owned());
        let mut keys = Vec::new();
        let lines = text.lines().map(str::trim);
        let words = lines
            .filter(|line| !line.starts_with('#'))
            .flat_map(str::split_whitespace);
        for word in words {
            let encoded = word.strip_prefix(KEY_PREFIX).ok_or_else(malformed)?;
            let bytes = Zeroizing::new(STANDARD.decode(encoded).map_err(|_| malformed())?);
            let cipher = XChaCha20Poly1305::new_from_slice(&bytes).map_err(|_| malformed())?;
            let hash = Sha256::digest(bytes.as_slice());
            let mut id = [0; 4];
            id.copy_from_slice(&hash[..4]);
            keys.push((KeyId(id), cipher));
        }
        if !(1..=MAX_KEYS).contains(&keys.len()) {
            return Err(malformed());
        }
        Ok(Self { keys })
    }

    /// A vault with one key that nobody keeps: for tests.
    ///
    /// # Errors
    /// [`VaultError::Random`].
    pub fn forgetful() -> Result<Self, VaultError> {
        Self::parse(new_key()?.expose_secret(), "a new key")
    }

    /// The key that seals.
    #[must_use]
    pub fn current(&self) -> KeyId {
        self.keys.first().map_or(KeyId([0; 4]), |(id, _)| *id)
    }

    /// Whether a key is known.
    #[must_use]
    pub fn knows(&self, id: KeyId) -> bool {
        self.keys.iter().any(|(known, _)| *known == id)
    }

    /// Encrypts a message. `place` says where it belongs: it can be opened there
    /// alone.
    ///
    /// # Errors
    /// [`VaultError::Random`].
    pub fn seal(&self, place: &str, message: &[u8]) -> Result<Vec<u8>, VaultError> {
        let nonce = random::<NONCE_BYTES>()?;
        let (id, cipher) = self.keys.first().ok_or(VaultError::Random)?;
        let payload = Payload {
            msg: message,
            aad: place.as_bytes(),
        };
        let sealed = cipher
            .encrypt(&XNonce::from(nonce), payload)
            .map_err(|_| VaultError::Random)?;
        let mut whole = Vec::with_capacity(HEAD_BYTES + sealed.len());
        whole.push(VERSION);
        whole.extend_from_slice(&id.0);
        whole.extend_from_slice(&nonce);
        whole.extend_from_slice(&sealed);
        Ok(whole)
    }

    /// Decrypts what [`seal`](Self::seal) made for this place.
    ///
    /// # Errors
    /// [`UnsealError`].
    pub fn unseal(&self, place: &str, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        let id = sealed_under(sealed).ok_or(UnsealError::Damaged)?;
        let (_, cipher) = self
            .keys
            .iter()
            .find(|(known, _)| *known == id)
            .ok_or(UnsealError::UnknownKey(id))?;
        let (head, ciphertext) = sealed.split_at(HEAD_BYTES);
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&head[HEAD_BYTES - NONCE_BYTES..]);
        let payload = Payload {
            msg: ciphertext,
            aad: place.as_bytes(),
        };
        cipher
            .decrypt(&XNonce::from(nonce), payload)
            .map_err(|_| UnsealError::Damaged)
    }
}

/// The key under which a message is sealed; `None` where it is not sealed. JSON
/// begins with another byte.
#[must_use]
pub fn sealed_under(message: &[u8]) -> Option<KeyId> {
    let head = message.get(..HEAD_BYTES)?;
    let mut id = [0; 4];
    id.copy_from_slice(&head[1..5]);
    (head[0] == VERSION).then_some(KeyId(id))
}

/// Length of a message as it is sent, whether it is sealed or not, in bytes.
#[must_use]
pub fn unsealed_len(message: &[u8]) -> usize {
    match sealed_under(message) {
        Some(_) => message.len().saturating_sub(SEAL_BYTES),
        None => message.len(),
    }
}

/// Random bytes of the system.
///
/// # Errors
/// [`VaultError::Random`].
pub fn random<const N: usize>() -> Result<[u8; N], VaultError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| VaultError::Random)?;
    Ok(bytes)
}

/// A new key, as the file has it.
///
/// # Errors
/// [`VaultError::Random`].
pub fn new_key() -> Result<SecretString, VaultError> {
    let key = Zeroizing::new(random::<KEY_BYTES>()?);
    Ok(format!("{KEY_PREFIX}{}", STANDARD.encode(key.as_slice())).into())
}

fn write_private(path: &Path, line: &str) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(format!("{line}\n").as_bytes())?;
    file.sync_all()?;
    // The file's name has to survive a power loss too.
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(keys: Option<&str>, key_file: &Path) -> Secrets {
        Secrets {
            keys: keys.map(|keys| keys.to_owned().into()),
            key_file: key_file.to_owned(),
        }
    }

    #[test]
    fn what_is_sealed_opens_at_its_place_alone_and_never_twice_the_same() {
        let vault = Vault::forgetful().expect("random");
        let sealed = vault.seal("a", b"planted").expect("sealed");
        assert_eq!(sealed.len(), 7 + SEAL_BYTES);
        assert_ne!(sealed, vault.seal("a", b"planted").expect("sealed"));
        assert!(!sealed.windows(7).any(|part| part == b"planted"));
        assert_eq!(vault.unseal("a", &sealed).as_deref(), Ok(&b"planted"[..]));
        assert_eq!(vault.unseal("b", &sealed), Err(UnsealError::Damaged));
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(vault.unseal("a", &changed).is_err(), "byte {index}");
            assert!(vault.unseal("a", &sealed[..index]).is_err());
        }
    }

    #[test]
    fn a_key_is_changed_by_putting_another_before_it() {
        let (old, new) = (new_key().expect("a key"), new_key().expect("a key"));
        let nowhere = Path::new("/nowhere");
        let load = |keys: &str| Vault::load(&secrets(Some(keys), nowhere), true).expect("loads");
        let before = load(old.expose_secret());
        let sealed = before.seal("a", b"x").expect("sealed");
        let after = load(&format!("{}\n{}", new.expose_secret(), old.expose_secret()));
        assert_eq!(after.unseal("a", &sealed).as_deref(), Ok(&b"x"[..]));
        assert_ne!(after.current(), before.current());
        assert!(after.knows(before.current()));
        let without = load(new.expose_secret());
        let unknown = Err(UnsealError::UnknownKey(before.current()));
        assert_eq!(without.unseal("a", &sealed), unknown);
    }

    #[test]
    fn a_key_file_is_made_once_for_its_owner_alone_and_missed_where_a_store_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("key");
        let secrets = secrets(None, &path);
        let missing = Vault::load(&secrets, true).expect_err("missing");
        assert!(missing.to_string().contains("is missing"), "{missing}");
        let made = Vault::load(&secrets, false).expect("made");
        let read = Vault::load(&secrets, true).expect("read");
        assert_eq!(made.current(), read.current());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(&path)
                .expect("there")
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn faults_of_keys_name_the_source_and_not_the_key() {
        let nowhere = Path::new("/nowhere");
        for bad in ["", "# none", "planted", "srk1_planted", "srk1_AAAA"] {
            let error = Vault::load(&secrets(Some(bad), nowhere), true).expect_err("bad");
            assert!(!error.to_string().contains("planted"), "{error}");
            assert!(error.to_string().contains("segment-relay key"), "{error}");
        }
        assert!(!format!("{:?}", Vault::forgetful()).contains("srk1"));
    }
}
