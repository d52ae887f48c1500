//! How long an answer asks to wait.

use std::time::{Duration, UNIX_EPOCH};

use http::HeaderMap;

use crate::time::UnixMillis;

/// `Retry-After` as seconds or as a date (RFC 9110, 10.2.3), else Segment's
/// `X-RateLimit-Reset` in seconds. Nothing where neither can be read; the
/// bounds are for the caller to set.
pub(super) fn parse(headers: &HeaderMap, now: UnixMillis) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let seconds = |text: &str| text.parse().map(Duration::from_secs).ok();
    let date = |text: &str| {
        let date = httpdate::parse_http_date(text).ok()?;
        let since_epoch = date.duration_since(UNIX_EPOCH).ok()?;
        Some(UnixMillis(0).plus(since_epoch).since(now))
    };
    text("retry-after")
        .and_then(|text| seconds(text).or_else(|| date(text)))
        .or_else(|| text("x-ratelimit-reset").and_then(seconds))
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
        assert_eq!(parsed("retry-after", "-1"), None);
        assert_eq!(parsed("retry-after", "soon"), None);
        assert_eq!(
            parsed("x-ratelimit-reset", "30"),
            Some(Duration::from_secs(30))
        );
        assert_eq!(parsed("x-other", "30"), None);
    }
}
