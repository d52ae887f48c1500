//! Where a relay is, and what is wrong where it is not reached.

use std::path::PathBuf;

use super::{
    ClientError,
    dial::{asks_for_certificate, speaks_tls},
    seen::{ASKS_FOR_CERTIFICATE, SILENT, SPEAKS_TLS, Seen, causes},
};

/// Where a relay is.
#[derive(Debug)]
pub(super) struct Place {
    /// As the user has it.
    pub(super) address: String,
    pub(super) kind: Kind,
    /// What was given for TLS.
    pub(super) ca: Option<String>,
    pub(super) has_certificate: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain(String),
    Tls(String),
    Unix(PathBuf),
}

impl Place {
    pub(super) fn new(address: &str) -> Result<Self, ClientError> {
        let refused = |rule: &str| ClientError::Input(format!("--address {address}: {rule}"));
        let kind = if let Some(path) = address.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(refused(
                    "name the socket's file, as in unix:/run/relay.sock",
                ));
            }
            Kind::Unix(path.into())
        } else {
            match address.split_once("://") {
                None => Kind::Plain(format!("http://{address}")),
                Some(("http", _)) => Kind::Plain(address.to_owned()),
                Some(("https", _)) => Kind::Tls(address.to_owned()),
                Some((scheme, rest)) => {
                    return Err(refused(&format!(
                        "`{scheme}` is not known: use https://{rest} with TLS, http://{rest} \
                         without, or unix: and a path"
                    )));
                }
            }
        };
        let address = address.to_owned();
        Ok(Self {
            address,
            kind,
            ca: None,
            has_certificate: false,
        })
    }

    pub(super) fn is_tls(&self) -> bool {
        matches!(self.kind, Kind::Tls(_))
    }

    /// What failed, with what that says of the place.
    pub(super) async fn unreachable(
        &self,
        seen: &Seen,
        error: &(dyn std::error::Error + Send + Sync + 'static),
    ) -> ClientError {
        let causes = causes(error);
        let cause = match self.diagnosis(seen, &causes).await {
            Some(known) => known.to_owned(),
            None => {
                causes.rsplit(": ").next().unwrap_or(&causes).to_owned()
                    + "; is `segment-relay serve` running there?"
            }
        };
        ClientError::Connect {
            address: self.address.clone(),
            cause,
        }
    }

    pub(super) async fn diagnosis(&self, seen: &Seen, causes: &str) -> Option<&'static str> {
        let known = seen.diagnosis(self.is_tls(), causes);
        // A port with TLS may close before its alert can be read.
        match (&self.kind, known) {
            (Kind::Plain(url), Some(SILENT)) if speaks_tls(url).await => Some(SPEAKS_TLS),
            // So may its refusal of a client without a certificate.
            (Kind::Tls(url), None)
                if !self.has_certificate && asks_for_certificate(url, self.ca.as_deref()).await =>
            {
                Some(ASKS_FOR_CERTIFICATE)
            }
            _ => known,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_known_kinds() {
        let kind = |address: &str| Place::new(address).map(|place| place.kind).ok();
        let plain = |url: &str| Some(Kind::Plain(url.to_owned()));
        assert_eq!(kind("relay:1"), plain("http://relay:1"));
        assert_eq!(kind("http://relay:1"), plain("http://relay:1"));
        assert_eq!(
            kind("https://relay"),
            Some(Kind::Tls("https://relay".into()))
        );
        let socket = Some(Kind::Unix("/run/relay.sock".into()));
        assert_eq!(kind("unix:/run/relay.sock"), socket);
        assert_eq!(kind("unix:///run/relay.sock"), socket);
        for other in [
            "grpc://relay:1",
            "grpcs://relay",
            "tcp://relay:1",
            "unix:",
            "unix://",
        ] {
            assert_eq!(kind(other), None, "{other}");
        }
        let refused = Place::new("grpc://relay:1")
            .expect_err("refused")
            .to_string();
        assert!(refused.contains("http://relay:1"), "{refused}");
    }
}
