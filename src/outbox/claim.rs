//! Integrations of configuration files that differ between relays.

/// The integrations of a relay's configuration file beside those of other relays' files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// They are the ones to store.
    Apply,
    /// Another relay has brought a newer file.
    Older {
        /// The version of its file.
        stored: u64,
    },
    /// Another relay that runs has brought other integrations under the same version.
    Conflict,
}
