//! Points in time as the relay stores and sends them: whole milliseconds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::civil::Date;

/// 1970-01-01.
const EPOCH_DAY: Date = jiff::civil::date(1970, 1, 1);
/// 0001-01-01T00:00:00Z, the first moment a protobuf `Timestamp` may name.
const FIRST_SECOND: i64 = -62_135_596_800;
/// 9999-12-31T23:59:59Z, the last second a protobuf `Timestamp` may name.
const LAST_SECOND: i64 = 253_402_300_799;

/// Bytes of a moment in ISO-8601, as the relay writes it.
pub const ISO_BYTES: usize = 24;

/// Milliseconds since 1970-01-01T00:00:00Z, without leap seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// The system clock. Only the shell of the program calls this; pure code
    /// is handed `now`.
    #[must_use]
    pub fn now() -> Self {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => Self(i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Err(before) => Self(-i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX)),
        }
    }

    /// Cuts a protobuf timestamp to milliseconds. `None` where it breaks
    /// protobuf's own rules: years 1 to 9999, nanos 0 to 999,999,999.
    #[must_use]
    pub fn from_proto(time: &prost_types::Timestamp) -> Option<Self> {
        let in_range = (FIRST_SECOND..=LAST_SECOND).contains(&time.seconds)
            && (0..1_000_000_000).contains(&time.nanos);
        in_range.then(|| Self(time.seconds * 1_000 + i64::from(time.nanos / 1_000_000)))
    }

    /// The same moment as a protobuf timestamp.
    #[must_use]
    pub fn to_proto(self) -> prost_types::Timestamp {
        prost_types::Timestamp {
            seconds: self.0.div_euclid(1_000),
            nanos: i32::try_from(self.0.rem_euclid(1_000) * 1_000_000).unwrap_or(0),
        }
    }

    /// ISO-8601 in UTC with milliseconds, e.g. `2021-03-12T00:00:00.000Z`:
    /// the form that Segment asks for.
    #[must_use]
    pub fn to_iso(self) -> String {
        self.iso_bytes().map(char::from).iter().collect()
    }

    /// The same as ASCII.
    #[must_use]
    pub fn iso_bytes(self) -> [u8; ISO_BYTES] {
        const DAY_MILLIS: i64 = 86_400_000;
        let clamped = self
            .0
            .clamp(FIRST_SECOND * 1_000, LAST_SECOND * 1_000 + 999);
        // By way of the calendar date, since jiff's own timestamps end a day
        // before protobuf's.
        let days = jiff::Span::new().days(clamped.div_euclid(DAY_MILLIS));
        let date = EPOCH_DAY.checked_add(days).unwrap_or(EPOCH_DAY);
        let of_day = clamped.rem_euclid(DAY_MILLIS);
        // Digit by digit: the machinery of `format!` takes longer than the hash of an
        // address, and every event has a time.
        let mut text = *b"0000-00-00T00:00:00.000Z";
        for (number, end) in [
            (i64::from(date.year()), 4),
            (date.month().into(), 7),
            (date.day().into(), 10),
            (of_day / 3_600_000, 13),
            (of_day / 60_000 % 60, 16),
            (of_day / 1_000 % 60, 19),
            (of_day % 1_000, 23),
        ] {
            let (mut rest, mut place) = (number, end);
            while rest > 0 {
                place -= 1;
                // One digit: it fits.
                text[place] = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
        text
    }

    /// This moment plus a duration, at most the end of time.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(millis))
    }

    /// How long after `earlier` this moment is; nothing where it is before it.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn iso_form_has_milliseconds_and_z() {
        assert_eq!(
            UnixMillis(1_615_507_200_000).to_iso(),
            "2021-03-12T00:00:00.000Z"
        );
        assert_eq!(UnixMillis(-1).to_iso(), "1969-12-31T23:59:59.999Z");
        assert_eq!(UnixMillis(i64::MAX).to_iso(), "9999-12-31T23:59:59.999Z");
        assert_eq!(UnixMillis(i64::MIN).to_iso(), "0001-01-01T00:00:00.000Z");
    }

    #[test]
    fn protobuf_rules_bound_what_is_taken() {
        let time = |seconds, nanos| prost_types::Timestamp { seconds, nanos };
        assert_eq!(
            UnixMillis::from_proto(&time(1, 999_999_999)),
            Some(UnixMillis(1_999))
        );
        for bad in [
            time(LAST_SECOND + 1, 0),
            time(FIRST_SECOND - 1, 0),
            time(0, -1),
            time(0, 1_000_000_000),
        ] {
            assert_eq!(UnixMillis::from_proto(&bad), None);
        }
    }

    proptest! {
        #[test]
        fn iso_form_agrees_with_jiff(millis in FIRST_SECOND * 1_000..=253_402_207_200_000_i64) {
            let jiff = jiff::Timestamp::from_millisecond(millis).expect("in jiff's range");
            prop_assert_eq!(UnixMillis(millis).to_iso(), format!("{jiff:.3}"));
        }

        #[test]
        fn protobuf_form_round_trips(millis in FIRST_SECOND * 1_000..=LAST_SECOND * 1_000 + 999) {
            prop_assert_eq!(UnixMillis::from_proto(&UnixMillis(millis).to_proto()), Some(UnixMillis(millis)));
        }
    }
}
