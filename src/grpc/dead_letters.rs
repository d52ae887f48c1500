//! DeadLetterService: what was refused for good or given up.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status};

use super::{RelayError, Services, accept::pass, convert};
use crate::{
    audit::Entry,
    integration::IntegrationId,
    outbox::{DeadLetter, DeadLetterCount, DeadLetterFilter, OutboxError, Selection, Taken},
    permission::Caller,
    proto::{
        self, DeliveryReason, DiscardDeadLettersRequest, DiscardDeadLettersResponse,
        ListDeadLettersRequest, ListDeadLettersResponse, ReplayDeadLettersRequest,
        ReplayDeadLettersResponse, server::dead_letter_service_server::DeadLetterService,
    },
    time::UnixMillis,
};

/// Ids of one request at the most.
const MAX_IDS: usize = 1_000;
/// Ids and integrations that the audit names of one request, at the most.
const NOTED_IDS: usize = 100;
const NOTED_INTEGRATIONS: usize = 20;
/// For so long Segment removes repeats by messageId.
const DEDUPLICATION_WINDOW: Duration = Duration::from_secs(24 * 3_600);

#[derive(Clone)]
pub(super) struct DeadLetters(pub(super) Services);

#[tonic::async_trait]
impl DeadLetterService for DeadLetters {
    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        let (caller, _permit) = self.0.enter(&request)?;
        let held = Arc::clone(&pass(&request)?.bytes);
        let request = request.into_inner();
        let size = super::page_size(request.page_size)?;
        let after = match request.page_token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| {
                let rule = "not a token of this service; start again without one";
                RelayError::invalid("page_token", "INVALID_FORMAT", rule)
            })?,
        };
        let filter = parse_filter(
            &caller,
            "",
            &proto::DeadLetterFilter {
                integration_id: request.integration_id,
                reason: request.reason,
                start_time: request.start_time,
                end_time: request.end_time,
            },
        )?;
        let listed = self.0.outbox.dead_letters(filter, after, size + 1).await;
        let listed = listed.map_err(RelayError::from)?;
        let letters = listed.iter().map(|letter| self.to_proto(letter));
        let (dead_letters, bytes, more) = super::page_of(letters, size);
        self.0.usage.hold_answer(&held, bytes)?;
        let last = dead_letters.last().filter(|_| more);
        let last = last.map(|last| last.dead_letter_id.clone());
        Ok(Response::new(ListDeadLettersResponse {
            dead_letters,
            next_page_token: last.unwrap_or_default(),
        }))
    }

    async fn replay_dead_letters(
        &self,
        request: Request<ReplayDeadLettersRequest>,
    ) -> Result<Response<ReplayDeadLettersResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let now = UnixMillis::now();
        let selection = parse_selection(&caller, request.filter, &request.dead_letter_ids, now)?;
        let count = self.count(&selection, now).await?;
        let event_count = if request.dry_run {
            count.events - count.former
        } else {
            let this = self.clone();
            let replay = async move {
                let mut taken = Taken::default();
                let ended = this.replay_all(&selection, now, &mut taken).await;
                let action = "dead_letters.replayed";
                this.note(&caller, action, &selection, &taken, &ended);
                ended.map_err(|error| partly(error, "replayed", taken.events()))?;
                Ok(taken.events())
            };
            self.0.carry_out(permit, replay).await?
        };
        Ok(Response::new(ReplayDeadLettersResponse {
            event_count,
            older_than_deduplication_count: count.older,
            former_count: count.former,
        }))
    }

    async fn discard_dead_letters(
        &self,
        request: Request<DiscardDeadLettersRequest>,
    ) -> Result<Response<DiscardDeadLettersResponse>, Status> {
        let (caller, permit) = self.0.enter(&request)?;
        let request = request.into_inner();
        let now = UnixMillis::now();
        let selection = parse_selection(&caller, request.filter, &request.dead_letter_ids, now)?;
        if request.dry_run {
            let event_count = self.count(&selection, now).await?.events;
            return Ok(Response::new(DiscardDeadLettersResponse { event_count }));
        }
        let this = self.clone();
        let discard = async move {
            let mut taken = Taken::default();
            let ended = this.discard_all(&selection, &mut taken).await;
            let action = "dead_letters.discarded";
            this.note(&caller, action, &selection, &taken, &ended);
            ended.map_err(|error| partly(error, "discarded", taken.events()))?;
            Ok(taken.events())
        };
        let event_count = self.0.carry_out(permit, discard).await?;
        Ok(Response::new(DiscardDeadLettersResponse { event_count }))
    }
}

impl DeadLetters {
    fn to_proto(&self, letter: &DeadLetter) -> proto::DeadLetter {
        let record = &letter.record;
        proto::DeadLetter {
            dead_letter_id: letter.id.to_string(),
            integration_id: record.integration_id.name().to_owned(),
            capture_id: record.capture_id.clone(),
            event: Some(convert::event_delivery(record, letter.event)),
            data_region: record.region.to_proto().into(),
            dead_letter_time: Some(letter.time.to_proto()),
            former: self.0.registry.get(&record.integration_id).is_none(),
            payload_bytes: u32::try_from(letter.payload_bytes).unwrap_or(u32::MAX),
        }
    }

    /// Notes what was done, also where it broke off half-way.
    fn note(
        &self,
        caller: &Caller,
        action: &str,
        selection: &Selection,
        taken: &Taken,
        ended: &Result<(), RelayError>,
    ) {
        let broke_off = match ended {
            Ok(()) => "",
            Err(RelayError::Outbox(OutboxError::OutcomeUnknown(_))) => {
                ", then it broke off; perhaps some more"
            }
            Err(_) if taken.events() == 0 => return,
            Err(_) => ", then it broke off",
        };
        let (whose, counts) = shown_counts(taken);
        let events = taken.events();
        let selected = shown_selection(selection);
        self.0.audit.note(&Entry {
            caller: &caller.name,
            action,
            integration: whose.unwrap_or(""),
            detail: format!("{events} events{broke_off}{counts}; {selected}"),
        });
    }

    async fn count(
        &self,
        selection: &Selection,
        now: UnixMillis,
    ) -> Result<DeadLetterCount, RelayError> {
        let window = i64::try_from(DEDUPLICATION_WINDOW.as_millis()).unwrap_or(i64::MAX);
        let older_than = UnixMillis(now.0.saturating_sub(window));
        Ok(self
            .0
            .outbox
            .count_dead_letters(selection.clone(), older_than)
            .await?)
    }

    /// Replays piece by piece, so that live traffic is stored in between. Where
    /// room ends on the way, the rest stays as it is.
    async fn replay_all(
        &self,
        selection: &Selection,
        now: UnixMillis,
        total: &mut Taken,
    ) -> Result<(), RelayError> {
        loop {
            let _replays = self.0.holds.hold_replays(selection.integrations()).await;
            match self.0.outbox.replay(selection.clone(), now).await? {
                Ok(taken) if taken.events() == 0 => return Ok(()),
                Ok(taken) => total.append(&taken),
                Err(quota) if total.events() == 0 => return Err(RelayError::Full(quota)),
                Err(_) => return Ok(()),
            }
        }
    }

    async fn discard_all(
        &self,
        selection: &Selection,
        total: &mut Taken,
    ) -> Result<(), RelayError> {
        loop {
            let taken = self.0.outbox.discard(selection.clone()).await?;
            if taken.events() == 0 {
                return Ok(());
            }
            total.append(&taken);
        }
    }
}

/// The integration, if it is one; otherwise how many events of each, for the first of them.
fn shown_counts(taken: &Taken) -> (Option<&str>, String) {
    let mut each = taken.each();
    let others = each.len().saturating_sub(NOTED_INTEGRATIONS);
    match (each.len(), each.next()) {
        (1, Some((id, _))) => (Some(id), String::new()),
        (_, None) => (None, String::new()),
        (_, Some(first)) => {
            let named = std::iter::once(first).chain(each).take(NOTED_INTEGRATIONS);
            let mut named: Vec<_> = named.map(|(id, events)| format!("{id} {events}")).collect();
            if others > 0 {
                named.push(format!("{others} more integrations"));
            }
            (None, format!(" ({})", named.join(", ")))
        }
    }
}

/// What was asked for, of bounded length. It holds no address.
fn shown_selection(selection: &Selection) -> String {
    let of = |integrations: &Option<Vec<IntegrationId>>| match integrations.as_deref() {
        None => "all integrations".to_owned(),
        Some(ids) => bounded(ids.iter().map(IntegrationId::name), NOTED_INTEGRATIONS),
    };
    match selection {
        Selection::Filter(filter) => {
            let time = |time: Option<UnixMillis>| time.map_or("any".to_owned(), UnixMillis::to_iso);
            let reason = filter.reason.map_or("any", |reason| reason.as_str_name());
            format!(
                "filter: {}, reason {reason}, from {} to {}",
                of(&filter.integrations),
                time(filter.start),
                time(filter.end)
            )
        }
        Selection::Ids { ids, integrations } => format!(
            "ids: {}, of {}",
            bounded(ids.iter(), NOTED_IDS),
            of(integrations)
        ),
    }
}

/// The first of some words, and how many more there are.
fn bounded<T: ToString>(words: impl ExactSizeIterator<Item = T>, most: usize) -> String {
    let more = words.len().saturating_sub(most);
    let mut shown: Vec<_> = words.take(most).map(|word| word.to_string()).collect();
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(" ")
}

/// Says how far a change came that the outbox broke off.
fn partly(error: RelayError, action: &'static str, events: u64) -> RelayError {
    match error {
        RelayError::Outbox(cause) if events > 0 => RelayError::PartlyDone {
            events,
            action,
            cause,
        },
        error => error,
    }
}

fn parse_selection(
    caller: &Caller,
    filter: Option<proto::DeadLetterFilter>,
    ids: &[String],
    now: UnixMillis,
) -> Result<Selection, RelayError> {
    match filter {
        Some(filter) if ids.is_empty() => {
            let mut filter = parse_filter(caller, "filter.", &filter)?;
            // What is given up from now on, perhaps for the second time, is not meant.
            let end = UnixMillis(now.0.saturating_add(1));
            filter.end = Some(filter.end.map_or(end, |asked| asked.min(end)));
            Ok(Selection::Filter(filter))
        }
        None if !ids.is_empty() => parse_ids(caller, ids),
        _ => {
            let rule = "give either a filter (an empty one takes all) or dead_letter_ids";
            Err(RelayError::invalid("filter", "ONE_OF", rule))
        }
    }
}

fn parse_ids(caller: &Caller, ids: &[String]) -> Result<Selection, RelayError> {
    if ids.len() > MAX_IDS {
        let rule = format!("at most {MAX_IDS} ids; use several requests or a filter");
        return Err(RelayError::invalid("dead_letter_ids", "TOO_MANY", rule));
    }
    let mut parsed = Vec::with_capacity(ids.len());
    for (index, id) in ids.iter().enumerate() {
        parsed.push(id.parse().map_err(|_| {
            let rule = "not an id of this service; take dead_letter_id of ListDeadLetters";
            RelayError::invalid(&format!("dead_letter_ids[{index}]"), "INVALID_FORMAT", rule)
        })?);
    }
    parsed.sort_unstable();
    parsed.dedup();
    Ok(Selection::Ids {
        ids: parsed,
        integrations: caller.scope.only(),
    })
}

fn parse_filter(
    caller: &Caller,
    prefix: &str,
    filter: &proto::DeadLetterFilter,
) -> Result<DeadLetterFilter, RelayError> {
    let time = |field: &str, time: &Option<prost_types::Timestamp>| match time {
        None => Ok(None),
        Some(time) => UnixMillis::from_proto(time).map(Some).ok_or_else(|| {
            let rule = "years 1 to 9999, nanos 0 to 999,999,999";
            RelayError::invalid(&format!("{prefix}{field}"), "OUT_OF_RANGE", rule)
        }),
    };
    let integrations = match filter.integration_id.as_str() {
        "" => caller.scope.only(),
        id if !caller.may_touch(id) => return Err(RelayError::OutOfScope),
        // An integration that was deleted may have left dead letters.
        id => Some(vec![IntegrationId::new(id).ok_or_else(|| {
            let rule = "1 to 63 characters of a-z, 0-9 and hyphen";
            RelayError::invalid(&format!("{prefix}integration_id"), "INVALID_FORMAT", rule)
        })?]),
    };
    let reason = match DeliveryReason::try_from(filter.reason) {
        Ok(DeliveryReason::Unspecified) => None,
        Ok(reason) => Some(reason),
        Err(_) => {
            let rule = "a value of DeliveryReason; leave it out for all";
            return Err(RelayError::invalid(
                &format!("{prefix}reason"),
                "UNKNOWN_VALUE",
                rule,
            ));
        }
    };
    Ok(DeadLetterFilter {
        integrations,
        reason,
        start: time("start_time", &filter.start_time)?,
        end: time("end_time", &filter.end_time)?,
    })
}
