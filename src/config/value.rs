//! The kinds of values: each parses what a source gives into a type, or says
//! what it expects.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use secrecy::SecretString;
use toml::de::DeValue;
use tracing_subscriber::EnvFilter;

use crate::secret::WebhookSecret;

use super::{
    endpoint::{Endpoint, EndpointError},
    fault::{escaped, quoted},
};

/// Longest configured text, in characters.
const MAX_TEXT_CHARS: usize = 4096;
/// How many entries of an array a fault shows.
const MAX_SHOWN_ENTRIES: usize = 4;

/// A value as a source gives it.
#[derive(Clone, Copy)]
pub(super) enum Raw<'a> {
    /// A variable of the environment: a text as it is, anything else in the
    /// form that TOML has for it.
    Variable(&'a str),
    /// A value of a file.
    Toml(&'a DeValue<'a>),
}

/// What a value has to be.
pub(super) struct Expected {
    text: String,
    /// The value may hold a secret.
    hidden: bool,
}

/// A value of the right type within its bounds, or what was expected.
pub(super) type Parsed<T> = Result<T, Expected>;

impl Expected {
    pub(super) fn new(text: impl Display) -> Self {
        Self {
            text: text.to_string(),
            hidden: false,
        }
    }

    /// The same without showing the value.
    pub(super) fn hide(mut self) -> Self {
        self.hidden = true;
        self
    }

    /// The fault's message.
    pub(super) fn not(&self, raw: Raw<'_>) -> String {
        if self.hidden {
            format!("must be {}", self.text)
        } else {
            format!("must be {}, not {}", self.text, raw.shown())
        }
    }
}

impl<'a> Raw<'a> {
    pub(super) fn text(self) -> Option<&'a str> {
        match self {
            Self::Variable(text) => Some(text),
            Self::Toml(DeValue::String(text)) => Some(text),
            Self::Toml(_) => None,
        }
    }

    /// `read` on the value in TOML's terms.
    fn typed<T>(self, read: impl FnOnce(&DeValue<'_>) -> Option<T>) -> Option<T> {
        match self {
            Self::Toml(value) => read(value),
            Self::Variable(text) => read(DeValue::parse(text.trim()).ok()?.get_ref()),
        }
    }

    fn shown(self) -> String {
        match self {
            Self::Variable(text) => quoted(text),
            Self::Toml(DeValue::String(text)) => quoted(text),
            Self::Toml(DeValue::Integer(number)) => escaped(&number.to_string()),
            Self::Toml(DeValue::Float(number)) => escaped(number.as_str()),
            Self::Toml(DeValue::Boolean(flag)) => flag.to_string(),
            Self::Toml(DeValue::Datetime(time)) => time.to_string(),
            Self::Toml(DeValue::Array(entries)) => {
                let mut shown: Vec<_> = entries
                    .iter()
                    .take(MAX_SHOWN_ENTRIES)
                    .map(|entry| match entry.get_ref() {
                        DeValue::Array(_) => "an array".to_owned(),
                        entry => Raw::Toml(entry).shown(),
                    })
                    .collect();
                if entries.len() > MAX_SHOWN_ENTRIES {
                    shown.push("…".to_owned());
                }
                format!("[{}]", shown.join(", "))
            }
            Self::Toml(DeValue::Table(_)) => "a table".to_owned(),
        }
    }
}

/// A whole number of `unit` in `range`.
pub(super) fn number<N: TryFrom<u64>>(
    unit: &'static str,
    range: RangeInclusive<u64>,
) -> impl Fn(Raw<'_>) -> Parsed<N> {
    move |raw| {
        raw.typed(|value| match value {
            DeValue::Integer(digits) => u64::from_str_radix(digits.as_str(), digits.radix()).ok(),
            _ => None,
        })
        .filter(|number| range.contains(number))
        .and_then(|number| N::try_from(number).ok())
        .ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            Expected::new(format_args!("a whole number of {unit}, {low} to {high}"))
        })
    }
}

/// Milliseconds in `range`.
pub(super) fn millis(range: RangeInclusive<u64>) -> impl Fn(Raw<'_>) -> Parsed<Duration> {
    let number = number("milliseconds", range);
    move |raw| number(raw).map(Duration::from_millis)
}

/// Hours in `range`.
pub(super) fn hours(range: RangeInclusive<u64>) -> impl Fn(Raw<'_>) -> Parsed<Duration> {
    let number = number::<u64>("hours", range);
    move |raw| number(raw).map(|hours| Duration::from_secs(hours * 3600))
}

/// A truth value.
pub(super) fn boolean(raw: Raw<'_>) -> Parsed<bool> {
    raw.typed(|value| match value {
        DeValue::Boolean(flag) => Some(*flag),
        _ => None,
    })
    .ok_or_else(|| Expected::new("true or false"))
}

/// A truth value, or `auto`.
pub(super) fn automatic(raw: Raw<'_>) -> Parsed<Option<bool>> {
    if raw.text().is_some_and(|text| text == "auto") {
        return Ok(None);
    }
    let flag = boolean(raw).map_err(|_| Expected::new("auto, true or false"))?;
    Ok(Some(flag))
}

/// Any text.
pub(super) fn text(raw: Raw<'_>) -> Parsed<String> {
    raw.text()
        .map(str::to_owned)
        .ok_or_else(|| Expected::new("a text"))
}

/// A path of 1 to 4,096 characters.
pub(super) fn path(raw: Raw<'_>) -> Parsed<PathBuf> {
    raw.text()
        .filter(|text| (1..=MAX_TEXT_CHARS).contains(&text.chars().count()))
        .filter(|text| !text.contains('\0'))
        .map(PathBuf::from)
        .ok_or_else(|| Expected::new(format_args!("a path of 1 to {MAX_TEXT_CHARS} characters")))
}

/// A path, or nothing.
pub(super) fn optional_path(raw: Raw<'_>) -> Parsed<Option<PathBuf>> {
    match raw.text() {
        Some("") => Ok(None),
        _ => path(raw).map(Some),
    }
}

/// A text of at most 4,096 characters, or nothing.
pub(super) fn optional_text(raw: Raw<'_>) -> Parsed<Option<String>> {
    match raw.text() {
        Some("") => Ok(None),
        Some(text) if text.chars().count() <= MAX_TEXT_CHARS => Ok(Some(text.to_owned())),
        _ => Err(Expected::new(format_args!(
            "a text of at most {MAX_TEXT_CHARS} characters"
        ))),
    }
}

/// A secret, or nothing. No fault shows it.
pub(super) fn optional_secret(raw: Raw<'_>) -> Parsed<Option<SecretString>> {
    optional_text(raw)
        .map(|secret| secret.map(SecretString::from))
        .map_err(Expected::hide)
}

/// What signs webhooks, or nothing. No fault shows it.
pub(super) fn webhook_secret(raw: Raw<'_>) -> Parsed<Option<WebhookSecret>> {
    match raw.text() {
        Some("") => Ok(None),
        text => WebhookSecret::new(text.unwrap_or(""))
            .map(Some)
            .map_err(|rule| Expected::new(rule).hide()),
    }
}

/// A URL, or nothing.
pub(super) fn optional_url(
    default_path: &'static str,
) -> impl Fn(Raw<'_>) -> Parsed<Option<Endpoint>> {
    move |raw| match raw.text() {
        Some("") => Ok(None),
        Some(url) => Endpoint::with_path(url, default_path)
            .map(Some)
            .map_err(|error| Expected::new(error).hide()),
        None => Err(Expected::new("a URL")),
    }
}

/// A URL to which http is good enough, or nothing.
pub(super) fn plain_url(raw: Raw<'_>) -> Parsed<Option<Endpoint>> {
    match raw.text() {
        Some("") => Ok(None),
        Some(url) => Endpoint::plain(url, "/")
            .map(Some)
            .map_err(|error| Expected::new(error).hide()),
        None => Err(Expected::new("a URL")),
    }
}

/// Headers as `name=value` with commas between them. Prints their names alone.
#[derive(Clone, Default)]
pub struct OtlpHeaders(HeaderMap);

impl OtlpHeaders {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The headers, each of them marked as sensitive.
    #[must_use]
    pub fn expose(&self) -> &HeaderMap {
        &self.0
    }
}

impl fmt::Debug for OtlpHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

/// Headers of OTLP. No fault shows them.
pub(super) fn otlp_headers(raw: Raw<'_>) -> Parsed<OtlpHeaders> {
    let expected = || Expected::new("headers as name=value, with commas between them").hide();
    let text = raw.text().ok_or_else(expected)?;
    let mut headers = HeaderMap::new();
    for header in text.split(',').filter(|header| !header.trim().is_empty()) {
        let (name, value) = header.split_once('=').ok_or_else(expected)?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| expected())?;
        let mut value = HeaderValue::from_str(value.trim()).map_err(|_| expected())?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(OtlpHeaders(headers))
}

/// A number from 0 to 1.
pub(super) fn ratio(raw: Raw<'_>) -> Parsed<f64> {
    raw.typed(|value| match value {
        DeValue::Float(number) => number.as_str().parse().ok(),
        DeValue::Integer(number) => number.as_str().parse().ok(),
        _ => None,
    })
    .filter(|number| (0.0..=1.0).contains(number))
    .ok_or_else(|| Expected::new("a number from 0 to 1"))
}

/// An IP address with a port.
pub(super) fn address(raw: Raw<'_>) -> Parsed<SocketAddr> {
    raw.text()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| {
            Expected::new(
                "an IP address with a port, such as 127.0.0.1:50051 or [::]:50051 (all interfaces)",
            )
        })
}

/// An IP address with a port, or nothing.
pub(super) fn optional_address(raw: Raw<'_>) -> Parsed<Option<SocketAddr>> {
    match raw.text() {
        Some("") => Ok(None),
        _ => address(raw).map(Some),
    }
}

/// An endpoint whose host is not `foreign`, the host of the other region.
pub(super) fn endpoint(foreign: &'static str) -> impl Fn(Raw<'_>) -> Parsed<Endpoint> {
    move |raw| {
        let text = raw.text().ok_or_else(|| Expected::new("a URL"))?;
        match Endpoint::new(text) {
            Ok(endpoint) if endpoint.host() == foreign => Err(Expected::new(format_args!(
                "an endpoint of this region, and {foreign} belongs to the other"
            ))),
            Ok(endpoint) => Ok(endpoint),
            Err(error @ (EndpointError::UserInfo | EndpointError::QueryOrFragment)) => {
                Err(Expected::new(error).hide())
            }
            Err(error) => Err(Expected::new(error)),
        }
    }
}

/// Directives of `tracing_subscriber::EnvFilter`.
pub(super) fn filter(raw: Raw<'_>) -> Parsed<String> {
    raw.text()
        .filter(|text| (1..=MAX_TEXT_CHARS).contains(&text.chars().count()))
        .filter(|text| EnvFilter::builder().parse(text).is_ok())
        .map(str::to_owned)
        .ok_or_else(|| Expected::new("filter directives such as info or segment_relay=debug,warn"))
}

/// One of `words`, without regard to case.
pub(super) fn one_of<T: Copy>(
    words: &'static [(&'static str, T)],
) -> impl Fn(Raw<'_>) -> Parsed<T> {
    move |raw| {
        let given = raw.text().unwrap_or("");
        words
            .iter()
            .find(|(word, _)| word.eq_ignore_ascii_case(given))
            .map(|(_, meaning)| *meaning)
            .ok_or_else(|| {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                Expected::new(format_args!("one of {}", words.join(", ")))
            })
    }
}

/// The number of an enum value of the schema, by its name with or without the
/// enum's prefix, and without regard to case: `non_eu` or `DATA_REGION_NON_EU`.
pub(super) fn word<E>(name: fn(&E) -> &'static str) -> impl Fn(Raw<'_>) -> Parsed<i32>
where
    E: Default + TryFrom<i32>,
{
    let unspecified = name(&E::default());
    let prefix = unspecified.strip_suffix("UNSPECIFIED").unwrap_or("");
    let words: Vec<(i32, &'static str)> = (1..)
        .map_while(|number| Some((number, E::try_from(number).ok()?)))
        .map(|(number, value)| (number, name(&value)))
        .collect();
    move |raw| {
        let given = raw.text().unwrap_or("");
        let short = |word: &'static str| word.strip_prefix(prefix).unwrap_or(word);
        words
            .iter()
            .find(|(_, word)| {
                word.eq_ignore_ascii_case(given) || short(word).eq_ignore_ascii_case(given)
            })
            .map(|(number, _)| *number)
            .ok_or_else(|| {
                let words: Vec<_> = words.iter().map(|(_, word)| short(word)).collect();
                Expected::new(format_args!(
                    "one of {}",
                    words.join(", ").to_ascii_lowercase()
                ))
            })
    }
}

/// An array of one or more entries of one kind.
pub(super) fn list<T>(entry: impl Fn(Raw<'_>) -> Parsed<T>) -> impl Fn(Raw<'_>) -> Parsed<Vec<T>> {
    move |raw| match raw {
        Raw::Toml(DeValue::Array(entries)) if !entries.is_empty() => entries
            .iter()
            .map(|value| entry(Raw::Toml(value.get_ref())))
            .collect::<Parsed<Vec<T>>>()
            .map_err(|expected| Expected::new(format_args!("an array, each {}", expected.text))),
        _ => Err(Expected::new("an array of one or more entries")),
    }
}
