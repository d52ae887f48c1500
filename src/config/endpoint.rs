//! A URL that events may be sent to.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use http::{Uri, uri::Scheme};

/// Longest URL, in characters.
const MAX_URL_CHARS: usize = 2048;
/// Path of Segment's batch endpoint.
const DEFAULT_PATH: &str = "/v1/batch";

/// An endpoint of Segment's HTTP Tracking API, or another URL of the configuration: https, or http to this machine
/// alone; without user name, query and fragment.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    url: String,
    /// In lower case, an IPv6 address without its brackets.
    host: String,
}

/// Why a URL cannot be an endpoint. Each says what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It is no URL, or longer than 2,048 characters.
    #[error("a URL such as https://api.segment.io/v1/batch")]
    Malformed,
    /// It may hold a password.
    #[error("a URL without user name and password")]
    UserInfo,
    /// Segment's endpoints take none, and tokens are often put there.
    #[error("a URL without query and fragment")]
    QueryOrFragment,
    /// The scheme is another than https and http.
    #[error("an https URL")]
    Scheme,
    /// Plain http would show write keys and addresses to the network.
    #[error("an https URL: http is for 127.0.0.0/8, ::1 and localhost alone")]
    PlainHttp,
}

impl Endpoint {
    /// Takes a URL. An empty path becomes `/v1/batch`; scheme and host are put
    /// into lower case.
    ///
    /// # Errors
    /// What the URL has to be; never the URL itself.
    pub fn new(url: &str) -> Result<Self, EndpointError> {
        Self::with_path(url, DEFAULT_PATH)
    }

    /// The same with another path in place of an empty one.
    ///
    /// # Errors
    /// As [`Endpoint::new`].
    pub fn with_path(url: &str, default_path: &str) -> Result<Self, EndpointError> {
        let endpoint = Self::plain(url, default_path)?;
        if endpoint.is_tls() || endpoint.is_loopback() {
            return Ok(endpoint);
        }
        Err(EndpointError::PlainHttp)
    }

    /// The same, with http to any host: for what holds no secrets.
    ///
    /// # Errors
    /// As [`Endpoint::new`], but for [`EndpointError::PlainHttp`].
    pub fn plain(url: &str, default_path: &str) -> Result<Self, EndpointError> {
        // Before parsing: `Uri` drops a fragment silently, and what does not
        // parse may hold a password all the same.
        if url.contains('@') {
            return Err(EndpointError::UserInfo);
        }
        if url.contains(['?', '#']) {
            return Err(EndpointError::QueryOrFragment);
        }
        if url.len() > MAX_URL_CHARS {
            return Err(EndpointError::Malformed);
        }
        let uri: Uri = url.parse().map_err(|_| EndpointError::Malformed)?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(EndpointError::Malformed);
        };
        let host = plain_host(authority.host()).ok_or(EndpointError::Malformed)?;
        // `Uri` leaves a port that is none to its reader.
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => String::new(),
            Some(_) => match authority.port_u16() {
                Some(1..) => format!(":{}", authority.port_u16().unwrap_or_default()),
                _ => return Err(EndpointError::Malformed),
            },
            None => return Err(EndpointError::Malformed),
        };
        let path = match uri.path() {
            "" | "/" => default_path,
            path => path,
        };
        let endpoint = Self {
            url: format!(
                "{scheme}://{}{port}{path}",
                authority.host().to_ascii_lowercase()
            ),
            host,
        };
        if *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS {
            return Ok(endpoint);
        }
        Err(EndpointError::Scheme)
    }

    /// The whole URL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.url
    }

    /// The host in lower case, an IPv6 address without its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, also where the URL leaves it to its scheme.
    #[must_use]
    pub fn port(&self) -> u16 {
        let written = self.url.parse::<Uri>().ok().and_then(|uri| uri.port_u16());
        written.unwrap_or(if self.is_tls() { 443 } else { 80 })
    }

    /// Whether it is reached by https.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        // A URL's scheme may be in any case.
        self.url
            .get(..6)
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
    }

    /// Whether it is on this machine: 127.0.0.0/8, ::1 or localhost.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self
                .host
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.url).finish()
    }
}

/// A host in the one form in which two of them can be compared. None for any
/// other spelling that a resolver may take for the same host: a final dot,
/// escapes, numbers that are addresses.
fn plain_host(host: &str) -> Option<String> {
    if let Some(address) = host.strip_prefix('[') {
        let address: Ipv6Addr = address.strip_suffix(']')?.parse().ok()?;
        return Some(address.to_string());
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let is_label = |label: &str| !label.is_empty() && label.chars().all(fits);
    if !host.split('.').all(is_label) {
        return None;
    }
    let last = host.rsplit('.').next().unwrap_or("");
    if last.starts_with(|c: char| c.is_ascii_digit()) && host.parse::<Ipv4Addr>().is_err() {
        return None;
    }
    Some(host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_normalised() {
        for (url, normal) in [
            ("https://api.segment.io", "https://api.segment.io/v1/batch"),
            ("https://api.segment.io/", "https://api.segment.io/v1/batch"),
            ("HTTPS://API.Segment.IO/x", "https://api.segment.io/x"),
            ("https://proxy:8443/v1/b", "https://proxy:8443/v1/b"),
            ("http://127.0.0.1:9", "http://127.0.0.1:9/v1/batch"),
            ("http://127.9.9.9", "http://127.9.9.9/v1/batch"),
            ("http://[::1]:80/", "http://[::1]:80/v1/batch"),
            ("http://LocalHost/", "http://localhost/v1/batch"),
        ] {
            let endpoint = Endpoint::new(url).expect(url);
            assert_eq!(endpoint.as_str(), normal);
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for url in ["https://127.0.0.1", "https://[::1]", "https://localhost"] {
            assert!(Endpoint::new(url).expect(url).is_loopback(), "{url}");
        }
        for url in ["https://10.0.0.1", "https://[::2]", "https://localhost.io"] {
            assert!(!Endpoint::new(url).expect(url).is_loopback(), "{url}");
        }
    }

    #[test]
    fn the_port_is_the_one_that_is_connected_to() {
        for (url, port) in [
            ("https://h", 443),
            ("http://127.0.0.1/x", 80),
            ("https://h:8443", 8443),
            ("http://[::1]:81", 81),
        ] {
            assert_eq!(Endpoint::new(url).expect(url).port(), port);
        }
    }

    #[test]
    fn what_holds_no_secrets_may_cross_the_network_in_clear() {
        let endpoint = Endpoint::plain("http://otel-collector:4317", "/").expect("fine");
        assert_eq!(endpoint.as_str(), "http://otel-collector:4317/");
        let astray = Endpoint::plain("http://user:pass@host", "/").err();
        assert_eq!(astray, Some(EndpointError::UserInfo));
    }

    #[test]
    fn urls_that_could_lead_astray_are_refused() {
        use EndpointError::{Malformed, PlainHttp, QueryOrFragment, Scheme, UserInfo};
        for (url, error) in [
            ("", Malformed),
            ("api.segment.io/v1/batch", Malformed),
            ("/v1/batch", Malformed),
            ("https://", Malformed),
            ("https://api.segment.io./", Malformed),
            ("https://api%2esegment.io/", Malformed),
            ("https://2130706433/", Malformed),
            ("https://0x7f.1/", Malformed),
            ("https://host:0/", Malformed),
            ("https://host:/", Malformed),
            ("https://host:70000/", Malformed),
            ("https://host name/", Malformed),
            ("ftp://host/", Scheme),
            ("http://api.segment.io/", PlainHttp),
            ("http://127.0.0.1.evil.com/", PlainHttp),
            ("http://[::ffff:7f00:1]/", PlainHttp),
            ("https://user:pass@host/", UserInfo),
            ("https://host/?token=1", QueryOrFragment),
            ("https://host/#part", QueryOrFragment),
        ] {
            assert_eq!(Endpoint::new(url).err(), Some(error), "{url}");
        }
        let long = format!("https://host/{}", "p".repeat(MAX_URL_CHARS));
        assert_eq!(Endpoint::new(&long).err(), Some(Malformed));
    }
}
