//! Messages as text for a terminal. Control characters that come from elsewhere
//! are escaped, so that no answer can play with the terminal.

use std::fmt::Write;

use crate::{
    proto::{
        DeadLetter, DeliveryAttempt, DeliveryReason, EventDelivery, EventType, FieldViolation,
        WatchDeliveriesResponse,
    },
    time::UnixMillis,
};

/// The text with its control characters escaped.
#[must_use]
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() {
                c.escape_default().to_string()
            } else {
                c.to_string()
            }
        })
        .collect()
}

/// Columns, each as wide as its widest cell, two spaces apart.
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    let head = head.map(str::to_owned);
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "  {cell:width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn event_type(event: &EventDelivery) -> String {
    event
        .r#type()
        .as_str_name()
        .trim_start_matches("EVENT_TYPE_")
        .to_lowercase()
}

fn state(event: &EventDelivery) -> String {
    event
        .state()
        .as_str_name()
        .trim_start_matches("DELIVERY_STATE_")
        .to_owned()
}

fn reason(reason: DeliveryReason) -> String {
    match reason {
        DeliveryReason::Unspecified => String::new(),
        other => other
            .as_str_name()
            .trim_start_matches("DELIVERY_REASON_")
            .to_owned(),
    }
}

fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.and_then(UnixMillis::from_proto)
        .map(UnixMillis::to_iso)
        .unwrap_or_default()
}

fn http(status: u32) -> String {
    if status == 0 {
        "-".to_owned()
    } else {
        status.to_string()
    }
}

/// The reason, and the last error behind it.
fn note(event: &EventDelivery) -> String {
    match (reason(event.reason()), plain(&event.last_error)) {
        (reason, error) if error.is_empty() => reason,
        (reason, error) if reason.is_empty() => error,
        (reason, error) => format!("{reason}: {error}"),
    }
}

/// One line for each event.
#[must_use]
pub fn event_table(events: &[EventDelivery]) -> String {
    let rows: Vec<_> = events
        .iter()
        .map(|event| {
            [
                event_type(event),
                state(event),
                event.attempt_count.to_string(),
                http(event.last_http_status),
                plain(&event.message_id),
                note(event),
            ]
        })
        .collect();
    table(
        ["EVENT", "STATE", "ATTEMPTS", "HTTP", "MESSAGE ID", "NOTE"],
        &rows,
    )
}

/// One line for each attempt of one event.
#[must_use]
pub fn attempt_table(attempts: &[DeliveryAttempt]) -> String {
    let rows: Vec<_> = attempts
        .iter()
        .map(|attempt| {
            let event = match attempt.message_id.rsplit_once('-') {
                Some((_, suffix)) => suffix,
                None => "",
            };
            let latency = attempt.latency.as_ref().map_or(0, |latency| {
                latency.seconds * 1_000 + i64::from(latency.nanos / 1_000_000)
            });
            [
                time(attempt.attempt_time.as_ref()),
                plain(event),
                http(attempt.http_status),
                format!("{latency} ms"),
                plain(&attempt.error),
            ]
        })
        .collect();
    table(["TIME", "EVENT", "HTTP", "LATENCY", "ERROR"], &rows)
}

/// One line for each dead letter.
#[must_use]
pub fn dead_letter_table(letters: &[DeadLetter]) -> String {
    let row = |letter: &DeadLetter| {
        let event = letter.event.clone().unwrap_or_default();
        let region = letter
            .data_region()
            .as_str_name()
            .trim_start_matches("DATA_REGION_");
        [
            plain(&letter.dead_letter_id),
            time(letter.dead_letter_time.as_ref()),
            plain(&letter.integration_id),
            plain(&letter.capture_id),
            event_type(&event),
            region.to_owned(),
            http(event.last_http_status),
            letter.payload_bytes.to_string(),
            note(&event),
        ]
    };
    let rows: Vec<_> = letters.iter().map(row).collect();
    table(
        [
            "ID",
            "TIME",
            "INTEGRATION",
            "CAPTURE",
            "EVENT",
            "REGION",
            "HTTP",
            "BYTES",
            "REASON",
        ],
        &rows,
    )
}

/// One line for an update of the live feed, or for a notice.
#[must_use]
pub fn watch_line(update: &WatchDeliveriesResponse) -> String {
    let at = time(update.update_time.as_ref());
    let Some(event) = &update.event else {
        return format!(
            "{at}  {} updates were missed: they came faster than they were read",
            update.missed_count
        );
    };
    let kind = match event.r#type() {
        EventType::Unspecified => "-".to_owned(),
        _ => event_type(event),
    };
    let line = format!(
        "{at}  {}  {}  {kind:8}  {:13}  {} attempts  HTTP {}  {}",
        plain(&update.integration_id),
        plain(&update.capture_id),
        state(event),
        event.attempt_count,
        http(event.last_http_status),
        note(event)
    );
    line.trim_end().to_owned()
}

/// One line for each violation.
#[must_use]
pub fn violation_lines(violations: &[FieldViolation]) -> String {
    let mut text = String::new();
    for violation in violations {
        let (field, rule) = (plain(&violation.field), plain(&violation.description));
        let _ = writeln!(text, "  {field}: {rule} ({})", plain(&violation.reason));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::DeliveryState;

    fn event() -> EventDelivery {
        EventDelivery {
            message_id: "abc-identify".into(),
            r#type: EventType::Identify.into(),
            state: DeliveryState::Retrying.into(),
            attempt_count: 2,
            last_http_status: 503,
            last_error: "HTTP 503\u{1b}[2J".into(),
            reason: DeliveryReason::ServerError.into(),
            ..EventDelivery::default()
        }
    }

    #[test]
    fn events_stand_in_columns_and_escape_what_could_move_the_cursor() {
        assert_eq!(
            event_table(&[event()]),
            "  EVENT     STATE     ATTEMPTS  HTTP  MESSAGE ID    NOTE\n  \
             identify  RETRYING  2         503   abc-identify  SERVER_ERROR: HTTP 503\\u{1b}[2J\n"
        );
    }

    #[test]
    fn attempts_have_their_time_and_latency() {
        let attempt = DeliveryAttempt {
            message_id: "abc-track".into(),
            attempt_time: Some(prost_types::Timestamp {
                seconds: 0,
                nanos: 0,
            }),
            http_status: 0,
            latency: Some(prost_types::Duration {
                seconds: 1,
                nanos: 5_000_000,
            }),
            error: "no connection".into(),
            reason: DeliveryReason::Network.into(),
        };
        let text = attempt_table(&[attempt]);
        assert!(
            text.contains("1970-01-01T00:00:00.000Z  track  -     1005 ms  no connection"),
            "{text}"
        );
    }

    #[test]
    fn the_feed_has_a_line_for_a_change_and_for_what_was_missed() {
        let update = WatchDeliveriesResponse {
            integration_id: "acme".into(),
            capture_id: "c-1".into(),
            event: Some(event()),
            ..WatchDeliveriesResponse::default()
        };
        let line = watch_line(&update);
        assert!(
            line.contains("acme  c-1  identify  RETRYING       2 attempts  HTTP 503  SERVER_ERROR"),
            "{line}"
        );
        let notice = WatchDeliveriesResponse {
            missed_count: 7,
            ..Default::default()
        };
        assert!(watch_line(&notice).contains("7 updates were missed"));
    }
}
