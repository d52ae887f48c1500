//! Misbehaviour on demand: which requests are answered wrongly, and how.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::http::HeaderValue;
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Region;
use super::event::CheckedEvent;

/// Longest `delay_ms`.
const MAX_DELAY_MS: u64 = 600_000;
/// Most rules at the same time.
const MAX_RULES: usize = 100;
/// Most entries of `reject_message_ids`.
const MAX_REJECTED_IDS: usize = 10_000;

/// How a connection is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropConnection {
    /// The request is read, then the connection is closed without an answer.
    BeforeAnswer,
    /// The answer's head and a part of its body are sent, then the connection is closed.
    MidAnswer,
}

/// One rule of misbehaviour for requests to `/v1/batch`. The fields are those of
/// the JSON that `PUT /control` takes; the first rule that matches a request acts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Status to answer instead of 200, from 200 to 599.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The `Retry-After` header, sent as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<String>,
    /// The `X-RateLimit-Reset` header, sent as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_reset: Option<String>,
    /// Wait before the answer, in milliseconds, at most 600,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    /// Closes the connection instead of answering fully.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_connection: Option<DropConnection>,
    /// The share of the requests that misbehave, from 0 to 1; 1 if missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// The rule acts so many times; without end if missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Only requests with an event of one of these `messageId`s, which are answered
    /// `reject_status`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reject_message_ids: Vec<String>,
    /// Only requests with an event whose JSON, as received, contains this; they are
    /// answered `reject_status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reject_containing: Option<String>,
    /// The status for the two above; `status` if missing, and else 400.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reject_status: Option<u16>,
    /// Only requests to this region's listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    /// Only requests with this write key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_key: Option<String>,
    /// Whether the events are taken all the same, as when an answer is lost. If
    /// missing: yes where the answer is a whole 2xx (a mere delay), otherwise no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<bool>,
    /// Seed for `share`, which makes it repeatable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// A rule that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A field's value is not possible.
    #[error("rule {rule}: {field} {problem}")]
    Field {
        /// Index of the rule, from 0 on.
        rule: usize,
        /// Name of the field.
        field: &'static str,
        /// What would be right.
        problem: &'static str,
    },
    /// More rules than are kept.
    #[error("at most 100 rules")]
    TooMany,
    /// The JSON is not a rule or a list of rules.
    #[error("{0}")]
    NotRules(String),
}

/// What a rule looks at.
pub(super) struct Facts<'a> {
    pub(super) region: Region,
    pub(super) write_key: Option<&'a str>,
    pub(super) events: &'a [CheckedEvent<'a>],
}

/// How one request misbehaves.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    /// None: the status that the request would get anyway.
    pub(super) status: Option<u16>,
    pub(super) retry_after: Option<HeaderValue>,
    pub(super) rate_limit_reset: Option<HeaderValue>,
    pub(super) delay: Duration,
    pub(super) drop_connection: Option<DropConnection>,
    pub(super) process: bool,
}

/// The rules in force.
#[derive(Debug)]
pub(super) struct Faults {
    active: Mutex<Arc<[Active]>>,
    seed: u64,
}

#[derive(Debug)]
struct Active {
    rule: Rule,
    fault: Fault,
    rejected_ids: HashSet<String>,
    acted: AtomicU64,
    rng: Mutex<Rng>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleList {
    rules: Vec<Rule>,
}

/// Reads what `PUT /control` takes: one rule, or `{"rules": […]}`.
pub(super) fn parse_rules(json: &[u8]) -> Result<Vec<Rule>, RuleError> {
    #[derive(Deserialize)]
    struct Probe<'a> {
        #[serde(borrow)]
        rules: Option<&'a RawValue>,
    }
    let not_rules = |error: serde_json::Error| RuleError::NotRules(error.to_string());
    if !json.trim_ascii_start().starts_with(b"{") {
        return Err(RuleError::NotRules("not a JSON object".to_owned()));
    }
    let probe: Probe<'_> = serde_json::from_slice(json).map_err(not_rules)?;
    if probe.rules.is_some() {
        let list: RuleList = serde_json::from_slice(json).map_err(not_rules)?;
        return Ok(list.rules);
    }
    let rule: Rule = serde_json::from_slice(json).map_err(not_rules)?;
    Ok(vec![rule])
}

impl Faults {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            active: Mutex::new(Arc::from([])),
            seed,
        }
    }

    pub(super) fn set(&self, rules: Vec<Rule>) -> Result<(), RuleError> {
        if rules.len() > MAX_RULES {
            return Err(RuleError::TooMany);
        }
        let active: Result<Vec<Active>, RuleError> = rules
            .into_iter()
            .enumerate()
            .map(|(index, rule)| Active::new(index, rule, self.seed))
            .collect();
        *lock(&self.active) = active?.into();
        Ok(())
    }

    pub(super) fn clear(&self) {
        *lock(&self.active) = Arc::from([]);
    }

    /// The rules, and how many times each has acted.
    pub(super) fn rules_and_acted(&self) -> (Vec<Rule>, Vec<u64>) {
        let active = Arc::clone(&lock(&self.active));
        let of = |active: &Active| (active.rule.clone(), active.acted.load(Ordering::Relaxed));
        active.iter().map(of).unzip()
    }

    /// The misbehaviour of the first rule that acts on the request.
    pub(super) fn decide(&self, facts: &Facts<'_>) -> Option<Fault> {
        let active = Arc::clone(&lock(&self.active));
        let acting = active.iter().find(|active| active.acts_on(facts))?;
        Some(acting.fault.clone())
    }
}

impl Active {
    fn new(index: usize, rule: Rule, seed: u64) -> Result<Self, RuleError> {
        let in_rule = |(field, problem)| RuleError::Field {
            rule: index,
            field,
            problem,
        };
        rule.check().map_err(in_rule)?;
        Ok(Self {
            fault: rule.fault().map_err(in_rule)?,
            rejected_ids: rule.reject_message_ids.iter().cloned().collect(),
            acted: AtomicU64::new(0),
            rng: Mutex::new(Rng::with_seed(rule.seed.unwrap_or(seed))),
            rule,
        })
    }

    /// Whether the rule acts, which counts as one of its `count` times.
    fn acts_on(&self, facts: &Facts<'_>) -> bool {
        let rule = &self.rule;
        let left = |acted: u64| rule.count.is_none_or(|count| acted < count);
        if !left(self.acted.load(Ordering::Relaxed))
            || rule.region.is_some_and(|region| region != facts.region)
            || (rule.write_key.is_some() && rule.write_key.as_deref() != facts.write_key)
            || (rule.rejects() && !facts.events.iter().any(|event| self.rejects(event)))
        {
            return false;
        }
        // Thrown for matching requests only, so that a seed tells which of them act.
        if rule
            .share
            .is_some_and(|share| lock(&self.rng).f64() >= share)
        {
            return false;
        }
        let raise = |acted: u64| left(acted).then_some(acted + 1);
        self.acted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, raise)
            .is_ok()
    }

    fn rejects(&self, event: &CheckedEvent<'_>) -> bool {
        let contains = |needle: &String| event.text.contains(needle.as_str());
        let is_listed = |id| self.rejected_ids.contains(id);
        self.rule.reject_containing.as_ref().is_some_and(contains)
            || event.message_id.as_deref().is_some_and(is_listed)
    }
}

/// A field and what is wrong with it.
type Wrong = (&'static str, &'static str);

impl Rule {
    fn rejects(&self) -> bool {
        !self.reject_message_ids.is_empty() || self.reject_containing.is_some()
    }

    fn status_to_answer(&self) -> Option<u16> {
        if self.rejects() {
            self.reject_status.or(self.status).or(Some(400))
        } else {
            self.status
        }
    }

    fn check(&self) -> Result<(), Wrong> {
        for (field, status) in [
            ("status", self.status),
            ("reject_status", self.reject_status),
        ] {
            // 1xx is no final answer.
            if status.is_some_and(|status| !(200..=599).contains(&status)) {
                return Err((field, "has to be from 200 to 599"));
            }
        }
        if self.delay_ms.is_some_and(|delay| delay > MAX_DELAY_MS) {
            return Err(("delay_ms", "has to be at most 600000"));
        }
        if self
            .share
            .is_some_and(|share| !(0.0..=1.0).contains(&share))
        {
            return Err(("share", "has to be from 0 to 1"));
        }
        if self.reject_message_ids.len() > MAX_REJECTED_IDS {
            return Err(("reject_message_ids", "has to have at most 10000 ids"));
        }
        if self.reject_containing.as_deref() == Some("") {
            return Err(("reject_containing", "has to have at least one character"));
        }
        if self.reject_status.is_some() && !self.rejects() {
            return Err((
                "reject_status",
                "needs reject_message_ids or reject_containing",
            ));
        }
        let has_no_body = matches!(self.status_to_answer(), Some(204 | 304));
        if has_no_body && self.drop_connection == Some(DropConnection::MidAnswer) {
            return Err(("drop_connection", "mid_answer needs a status with a body"));
        }
        Ok(())
    }

    fn fault(&self) -> Result<Fault, Wrong> {
        let status = self.status_to_answer();
        let succeeds = status.is_none_or(|status| status < 300) && self.drop_connection.is_none();
        let fault = Fault {
            status,
            retry_after: header("retry_after", self.retry_after.as_deref())?,
            rate_limit_reset: header("rate_limit_reset", self.rate_limit_reset.as_deref())?,
            delay: Duration::from_millis(self.delay_ms.unwrap_or(0)),
            drop_connection: self.drop_connection,
            process: self.process.unwrap_or(succeeds),
        };
        let nothing = Fault {
            status: None,
            retry_after: None,
            rate_limit_reset: None,
            delay: Duration::ZERO,
            drop_connection: None,
            process: true,
        };
        if fault == nothing && self.delay_ms.is_none() {
            return Err(("(none)", "says what to do: set status, delay_ms or another"));
        }
        Ok(fault)
    }
}

fn header(field: &'static str, value: Option<&str>) -> Result<Option<HeaderValue>, Wrong> {
    value
        .map(HeaderValue::from_str)
        .transpose()
        .map_err(|_error| (field, "has to be visible ASCII, as headers are"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
