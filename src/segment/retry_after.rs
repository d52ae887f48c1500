//! How long an answer asks to wait.

use std::time::{Duration, UNIX_EPOCH};

use http::HeaderMap;

use crate::time::UnixMillis;

/// `Retry-After` as seconds or as a date (RFC 9110, 10.2.3), else Segment's
/// `X-RateLimit-Reset` in seconds. Fractions are rounded up to whole seconds. Nothing
/// where neither can be read; the bounds are for the caller to set.
pub(super) fn parse(headers: &HeaderMap, now: UnixMillis) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let date = |text: &str| {
        let date = httpdate::parse_http_date(text).ok()?;
        let since_epoch = date.duration_since(UNIX_EPOCH).ok()?;
        Some(UnixMillis(0).plus(since_epoch).since(now))
    };
    text("retry-after")
        .and_then(|text| seconds(text).or_else(|| date(text)))
        .or_else(|| text("x-ratelimit-reset").and_then(seconds))
}

fn seconds(text: &str) -> Option<Duration> {
    if let Ok(whole) = text.parse() {
        return Some(Duration::from_secs(whole));
    }
    let fraction: f64 = text.parse().ok()?;
    Duration::try_from_secs_f64(fraction.ceil()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &'static str, value: &'static str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(name, http::HeaderValue::from_static(value));
        // Sun, 06 Nov 1994 08:49:00 GMT
        parse(&headers, UnixMillis(784_111_740_000))
    }

    #[test]
    fn seconds_and_dates_are_read_and_nonsense_is_not() {
        assert_eq!(parsed("retry-after", " 7 "), Some(Duration::from_secs(7)));
        assert_eq!(
            parsed("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::from_secs(37))
        );
        assert_eq!(
            parsed("retry-after", "Sun, 06 Nov 1994 08:48:00 GMT"),
            Some(Duration::ZERO)
        );
        for (text, whole) in [("0.2", 1), ("1.5", 2), ("2.0", 2), ("1e1", 10)] {
            let expected = Some(Duration::from_secs(whole));
            assert_eq!(parsed("retry-after", text), expected, "{text}");
        }
        for text in ["-1", "-0.5e9", "NaN", "inf", "1e300"] {
            assert_eq!(parsed("retry-after", text), None, "{text}");
        }
        assert_eq!(parsed("retry-after", "soon"), None);
        assert_eq!(
            parsed("x-ratelimit-reset", "30"),
            Some(Duration::from_secs(30))
        );
        assert_eq!(parsed("x-other", "30"), None);
    }
}
