//! The issuer's public keys: a JSON Web Key Set (RFC 7517) from a file or a URL,
//! read again now and then, and when a token names a key that is not known.

use std::{
    collections::HashMap,
    fs,
    io::Read,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jsonwebtoken::{
    AlgorithmFamily, DecodingKey,
    jwk::{JwkSet, PublicKeyUse},
};
use tokio::{
    sync::{Mutex, Semaphore},
    time::Instant,
};

use crate::config::{Endpoint, JwksSource};

/// Largest key set, in bytes.
const MAX_BYTES: usize = 1024 * 1024;
/// Longest time to fetch it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An unknown key has the set read again, but not more often than this.
const MIN_INTERVAL: Duration = Duration::from_secs(10);

/// Calls that wait for the set at once; more are refused.
const MAX_WAITING: usize = 256;

/// Why the keys can't be had.
#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    /// The file can't be read.
    #[error("[jwt] jwks_file: {path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The URL can't be fetched.
    #[error("[jwt] jwks_url: {0}")]
    Fetch(String),
    /// It is no key set, or one without a key that can be used.
    #[error("[jwt] the key set: {0}")]
    Content(String),
}

/// The keys that are known now.
pub struct Jwks {
    source: JwksSource,
    client: Option<reqwest::Client>,
    keys: RwLock<Arc<Keys>>,
    /// When the set was asked for last, and that was answered.
    asked: Mutex<Option<Instant>>,
    /// Those who wait because their key is not known.
    waiting: Semaphore,
}

/// Keys by their ids.
#[derive(Default)]
pub(super) struct Keys {
    by_id: HashMap<String, DecodingKey>,
    /// Those without an id.
    nameless: Vec<DecodingKey>,
}

impl Keys {
    /// Whether none could be read yet.
    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty() && self.nameless.is_empty()
    }

    /// The key for a token with this `kid`.
    pub(super) fn find(&self, id: Option<&str>) -> Option<&DecodingKey> {
        match id {
            Some(id) => self.by_id.get(id),
            // Only where there can be no doubt.
            None if self.by_id.len() + self.nameless.len() == 1 => {
                self.nameless.first().or(self.by_id.values().next())
            }
            None => None,
        }
    }
}

impl Jwks {
    /// Reads the keys. A file has to be good; a URL that does not answer is tried
    /// again, and tokens are refused until then.
    ///
    /// # Errors
    /// [`JwksError`].
    pub async fn open(source: JwksSource) -> Result<Self, JwksError> {
        let client = match &source {
            JwksSource::File(_) => None,
            JwksSource::Url(url) => Some(client(url)?),
        };
        let jwks = Self {
            source,
            client,
            keys: RwLock::default(),
            asked: Mutex::default(),
            waiting: Semaphore::new(MAX_WAITING),
        };
        match jwks.refresh(Duration::ZERO).await {
            Err(error) if matches!(jwks.source, JwksSource::Url(_)) => {
                tracing::error!(%error, "no token can be checked until the keys are read");
            }
            other => other?,
        }
        Ok(jwks)
    }

    /// The keys as they are.
    pub(super) fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads them again because a token names one that is not known. Returns whether
    /// that could be done: not where too many wait for it.
    pub(super) async fn refresh_for_unknown(&self) -> bool {
        let Ok(_place) = self.waiting.try_acquire() else {
            return false;
        };
        if let Err(error) = self.refresh(MIN_INTERVAL).await {
            tracing::warn!(%error, "the former keys are used on");
        }
        true
    }

    /// Reads the keys, unless that was done within `least`. Who comes meanwhile
    /// waits for it.
    pub(super) async fn refresh(&self, least: Duration) -> Result<(), JwksError> {
        let mut asked = self.asked.lock().await;
        if asked.is_some_and(|moment| moment.elapsed() < least) {
            return Ok(());
        }
        *asked = Some(Instant::now());
        let text = self.read().await;
        // A server that is slow to fail would otherwise be asked by each who waits, in turn.
        *asked = Some(Instant::now());
        let keys = parse(&text?)?;
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        Ok(())
    }
}

impl Jwks {
    async fn read(&self) -> Result<Vec<u8>, JwksError> {
        match (&self.source, &self.client) {
            (JwksSource::Url(url), Some(client)) => fetch(client, url).await,
            (JwksSource::File(path), _) => read(path),
            (JwksSource::Url(_), None) => Ok(Vec::new()),
        }
    }
}

fn client(url: &Endpoint) -> Result<reqwest::Client, JwksError> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::Client::builder()
        .timeout(TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy();
    if !url.is_tls() {
        client = client.tls_certs_only([]);
    }
    client
        .build()
        .map_err(|error| JwksError::Fetch(error.to_string()))
}

async fn fetch(client: &reqwest::Client, url: &Endpoint) -> Result<Vec<u8>, JwksError> {
    let failed = |error: reqwest::Error| JwksError::Fetch(error.without_url().to_string());
    let mut answer = client.get(url.as_str()).send().await.map_err(failed)?;
    if !answer.status().is_success() {
        return Err(JwksError::Fetch(format!("HTTP {}", answer.status())));
    }
    let mut text = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_BYTES {
            return Err(JwksError::Fetch(format!("more than {MAX_BYTES} bytes")));
        }
    }
    Ok(text)
}

fn read(path: &Path) -> Result<Vec<u8>, JwksError> {
    let mut text = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_BYTES as u64).read_to_end(&mut text))
        .map_err(|source| JwksError::File {
            path: path.display().to_string(),
            source,
        })?;
    Ok(text)
}

fn parse(text: &[u8]) -> Result<Keys, JwksError> {
    let set: JwkSet =
        serde_json::from_slice(text).map_err(|error| JwksError::Content(error.to_string()))?;
    let mut keys = Keys::default();
    for jwk in &set.keys {
        let signs = matches!(
            jwk.common.public_key_use,
            None | Some(PublicKeyUse::Signature)
        );
        let Ok(key) = DecodingKey::from_jwk(jwk) else {
            continue;
        };
        // A shared secret in a public key set is a mistake.
        if !signs || key.family() == AlgorithmFamily::Hmac {
            continue;
        }
        match &jwk.common.key_id {
            Some(id) => {
                keys.by_id.insert(id.clone(), key);
            }
            None => keys.nameless.push(key),
        }
    }
    if keys.is_empty() {
        let rule = "holds no public key for signatures that can be used here".to_owned();
        return Err(JwksError::Content(rule));
    }
    Ok(keys)
}
