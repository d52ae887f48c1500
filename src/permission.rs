//! Who may do what: permissions, and a caller who has some of them.

use std::{collections::BTreeSet, fmt};

use crate::integration::IntegrationId;

/// What a caller may be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// Send captures, and preview them.
    Capture,
    /// Read captures' status, dead letters and integrations, and watch.
    Read,
    /// Create, change, test and delete integrations.
    Integrations,
    /// Replay and discard dead letters.
    DeadLetters,
    /// Erase a person's data, and read the receipts.
    Privacy,
}

impl Permission {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Capture,
        Self::Read,
        Self::Integrations,
        Self::DeadLetters,
        Self::Privacy,
    ];

    /// Its word in configurations, claims and messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Capture => "capture",
            Self::Read => "read",
            Self::Integrations => "integrations",
            Self::DeadLetters => "dead-letters",
            Self::Privacy => "privacy",
        }
    }

    /// The permission of a word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The integrations that a caller may touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All, also those to come.
    All,
    /// These alone.
    Only(BTreeSet<IntegrationId>),
}

impl Scope {
    /// Whether an integration is among them.
    #[must_use]
    pub fn holds(&self, id: &IntegrationId) -> bool {
        match self {
            Self::All => true,
            Self::Only(ids) => ids.contains(id.name()),
        }
    }

    /// The integrations, where they are bounded.
    #[must_use]
    pub fn only(&self) -> Option<Vec<IntegrationId>> {
        match self {
            Self::All => None,
            Self::Only(ids) => Some(ids.iter().cloned().collect()),
        }
    }
}

/// A name in a client certificate. The kinds are kept apart: a CA that lets a client choose
/// its URI has not confirmed a DNS name of the same characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CertificateName {
    /// A DNS name, in lower case.
    Dns(String),
    /// A URI, e.g. a SPIFFE id, as it stands there.
    Uri(String),
}

impl CertificateName {
    /// A DNS name; it has no case.
    #[must_use]
    pub fn dns(name: &str) -> Self {
        Self::Dns(name.to_ascii_lowercase())
    }

    /// A name of a configuration: a URI has a colon behind its scheme (RFC 3986, 3), and no DNS
    /// name has one.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name.contains(':') {
            true => Self::Uri(name.to_owned()),
            false => Self::dns(name),
        }
    }

    /// Its characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Dns(name) | Self::Uri(name) => name,
        }
    }
}

/// Whoever calls, as authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Name in logs, audits and receipts. Never a token.
    pub name: String,
    /// What the caller may do.
    pub permissions: BTreeSet<Permission>,
    /// Where the caller may do it.
    pub scope: Scope,
}

impl Caller {
    /// Whoever calls a relay that authenticates nobody: may do everything.
    #[must_use]
    pub fn anonymous() -> Self {
        Self {
            name: "anonymous".to_owned(),
            permissions: Permission::ALL.into(),
            scope: Scope::All,
        }
    }

    /// Whether the caller has a permission.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        self.permissions.contains(&permission)
    }

    /// Whether the caller may touch an integration, by what a request names.
    #[must_use]
    pub fn may_touch(&self, integration_id: &str) -> bool {
        match &self.scope {
            Scope::All => true,
            Scope::Only(ids) => ids.iter().any(|id| id.as_str() == integration_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permission_has_a_word_of_its_own() {
        for one in Permission::ALL {
            assert_eq!(Permission::parse(one.as_str()), Some(one));
        }
        assert_eq!(Permission::parse("Capture"), None);
        assert_eq!(Permission::parse(""), None);
    }

    #[test]
    fn a_colon_tells_uris_from_dns_names() {
        let uri = |name: &str| CertificateName::Uri(name.to_owned());
        for name in ["spiffe://x/A", "urn:example:A", "mailto:A@x"] {
            assert_eq!(CertificateName::parse(name), uri(name));
        }
        assert_eq!(
            CertificateName::parse("Ops.Internal"),
            CertificateName::dns("ops.internal")
        );
        assert_ne!(CertificateName::parse("ops.internal"), uri("ops.internal"));
    }

    #[test]
    fn a_scope_lets_its_own_integrations_through_alone() {
        let mut caller = Caller::anonymous();
        assert!(caller.may_touch("acme") && caller.may_touch(""));
        caller.scope = Scope::Only(IntegrationId::new("acme").into_iter().collect());
        assert!(caller.may_touch("acme"));
        assert!(!caller.may_touch("acme2") && !caller.may_touch("") && !caller.may_touch("ACME"));
    }
}
