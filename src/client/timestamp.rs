//! Moments in flags.

/// A moment in RFC 3339; the error names the flag.
pub(super) fn timestamp(flag: &str, text: &str) -> Result<prost_types::Timestamp, String> {
    let wrong =
        || format!("{flag}: write a moment as RFC 3339 has it, such as 2021-03-12T00:00:00Z");
    let time: jiff::Timestamp = text.parse().map_err(|_| wrong())?;
    // Protobuf's nanos count forward, also before 1970.
    let nanos = time.as_nanosecond();
    Ok(prost_types::Timestamp {
        seconds: i64::try_from(nanos.div_euclid(1_000_000_000)).map_err(|_| wrong())?,
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).map_err(|_| wrong())?,
    })
}
