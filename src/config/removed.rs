//! Settings of earlier versions.

/// What to do before the outbox on NATS JetStream is left.
pub(super) const DRAIN: &str =
    "first empty its streams with the version that wrote them, see docs/scaling.md";

/// What to do about a section that an earlier version had.
pub(super) fn section(name: &str) -> Option<String> {
    let is_removed = name.eq_ignore_ascii_case("nats");
    is_removed.then(|| {
        format!(
            "was removed with the outbox on NATS JetStream; set [postgres] instead, and {DRAIN}"
        )
    })
}
