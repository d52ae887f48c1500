//! How long a call may take, as its caller has it in `grpc-timeout`.

use std::time::Duration;

use http::HeaderMap;

/// The caller's time, and at the most `longest`. What is no time counts as none.
pub(super) fn timeout(headers: &HeaderMap, longest: Duration) -> Duration {
    let asked = headers.get("grpc-timeout");
    let asked = asked.and_then(|timeout| parse(timeout.to_str().ok()?));
    asked.map_or(longest, |asked| asked.min(longest))
}

/// `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Requests").
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3_600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_the_protocol_has_them() {
        assert_eq!(parse("2S"), Some(Duration::from_secs(2)));
        assert_eq!(
            parse("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3_600))
        );
        assert_eq!(parse("1500m"), Some(Duration::from_millis(1_500)));
        for bad in ["", "S", "1", "1x", "+1S", "-1S", "123456789S", "1é"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_shorter_time_holds() {
        let longest = Duration::from_secs(60);
        let of = |given: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(one) = given {
                headers.insert("grpc-timeout", one.parse().expect("ASCII"));
            }
            timeout(&headers, longest)
        };
        assert_eq!(of(Some("2S")), Duration::from_secs(2));
        assert_eq!(of(Some("2H")), longest);
        assert_eq!(of(Some("soon")), longest);
        assert_eq!(of(None), longest);
    }
}
