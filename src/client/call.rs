//! The calls behind the commands.

use std::{io::Write, path::Path, time::Duration};

use tokio::io::AsyncReadExt;
use tokio_stream::StreamExt;
use tonic::Request;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    args::{CaptureArgs, ClientCommand, StateArg, TypeArg, Wait},
    connect::{Connection, Reach, Wire, request},
    dead_letters, erase,
    failure::ClientError,
    input,
    json::{to_json, write_json},
    pause::pause,
    render,
};
use crate::proto::{
    Capture, CaptureRequest, CaptureResult, DeliveryState, GetCaptureRequest,
    PreviewCaptureRequest, PreviewCaptureResponse, WatchDeliveriesRequest,
    erase_subject_request::Subject, segment_relay_client::SegmentRelayClient,
};

/// Largest capture file, in bytes: what the relay takes by default.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Exit codes of `capture --wait delivered`.
const STILL_WAITING: u8 = 3;
const DEAD_LETTER: u8 = 4;

/// Runs a command; prints to `out`. The number is the process's exit code.
///
/// # Errors
/// [`ClientError`], for standard error.
pub async fn run(command: ClientCommand, out: &mut impl Write) -> Result<u8, ClientError> {
    match command {
        ClientCommand::Capture {
            connection,
            capture,
            wait,
        } => send_capture(&connection, &capture, wait, out).await,
        ClientCommand::Preview {
            connection,
            capture,
        } => preview(&connection, &capture, out).await,
        ClientCommand::Status {
            connection,
            integration,
            capture_id,
        } => status(&connection, integration, capture_id, out).await,
        ClientCommand::Watch {
            connection,
            integration,
            state,
            r#type,
        } => {
            let request = watch_request(integration, &state, &r#type);
            watch(&connection, request, out).await
        }
        ClientCommand::Pause {
            connection,
            integration,
        } => pause(&connection, integration, true, out).await,
        ClientCommand::Resume {
            connection,
            integration,
        } => pause(&connection, integration, false, out).await,
        ClientCommand::DeadLetters(command) => dead_letters::run(command, out).await,
        ClientCommand::Erase {
            connection,
            email,
            email_sha256,
            integration,
        } => {
            // clap has seen to it that one of them is there.
            let subject = email.map_or_else(
                || Subject::EmailSha256(email_sha256.unwrap_or_default()),
                Subject::Email,
            );
            erase::erase(&connection, subject, integration, out).await
        }
        ClientCommand::Receipts {
            connection,
            email_sha256,
            limit,
        } => erase::receipts(&connection, email_sha256, limit.into(), out).await,
        ClientCommand::Health {
            reach,
            timeout,
            service,
        } => health(&reach, timeout, service, out).await,
    }
}

async fn relay(connection: &Connection) -> Result<SegmentRelayClient<Wire>, ClientError> {
    Ok(SegmentRelayClient::new(connection.connect().await?))
}

async fn read_capture(args: &CaptureArgs) -> Result<Capture, ClientError> {
    let text = match &args.file {
        Some(path) => Some(read_file(path).await?),
        None => None,
    };
    input::capture(args, text.as_deref()).map_err(ClientError::Input)
}

async fn read_file(path: &Path) -> Result<String, ClientError> {
    let mut text = String::new();
    let named =
        |error: std::io::Error| ClientError::Input(format!("--file {}: {error}", path.display()));
    let read = if path == Path::new("-") {
        tokio::io::stdin()
            .take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .await
    } else {
        let file = tokio::fs::File::open(path).await.map_err(named)?;
        file.take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .await
    };
    if read.map_err(named)? as u64 > MAX_FILE_BYTES {
        let rule = format!(
            "--file {}: more than {MAX_FILE_BYTES} bytes",
            path.display()
        );
        return Err(ClientError::Input(rule));
    }
    Ok(text)
}

async fn send_capture(
    connection: &Connection,
    args: &CaptureArgs,
    wait: Wait,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let message = CaptureRequest {
        integration_id: args.integration.clone(),
        capture: Some(read_capture(args).await?),
        wait_for: wait.to_proto().into(),
    };
    let answer = relay(connection)
        .await?
        .capture(request(connection, message))
        .await?;
    let answer = answer.into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "CaptureResponse", true))?;
    }
    let result = answer
        .result
        .ok_or_else(|| ClientError::Answer("no result".to_owned()))?;
    if !connection.json {
        print_result(out, &result)?;
    }
    Ok(if wait == Wait::Delivered {
        exit_code(&result)
    } else {
        0
    })
}

fn exit_code(result: &CaptureResult) -> u8 {
    let any = |state: DeliveryState| result.events.iter().any(|event| event.state() == state);
    if any(DeliveryState::DeadLettered) {
        DEAD_LETTER
    } else if any(DeliveryState::Queued) || any(DeliveryState::Retrying) {
        STILL_WAITING
    } else {
        0
    }
}

fn print_result(out: &mut impl Write, result: &CaptureResult) -> Result<(), ClientError> {
    let duplicate = if result.duplicate {
        " (a duplicate: accepted before)"
    } else {
        ""
    };
    writeln!(
        out,
        "capture {}{duplicate}",
        render::plain(&result.capture_id)
    )?;
    Ok(write!(out, "{}", render::event_table(&result.events))?)
}

async fn preview(
    connection: &Connection,
    args: &CaptureArgs,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let message = PreviewCaptureRequest {
        integration_id: args.integration.clone(),
        capture: Some(read_capture(args).await?),
    };
    let answer = relay(connection)
        .await?
        .preview_capture(request(connection, message))
        .await?;
    let answer = answer.into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "PreviewCaptureResponse", true))?;
    } else {
        print_preview(out, &answer)?;
    }
    Ok(u8::from(!answer.violations.is_empty()))
}

fn print_preview(out: &mut impl Write, answer: &PreviewCaptureResponse) -> Result<(), ClientError> {
    for event in &answer.events {
        let value: serde_json::Value = serde_json::from_str(&event.json)
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        writeln!(out, "{value:#}")?;
    }
    if !answer.violations.is_empty() {
        writeln!(out, "The capture would be refused:")?;
        write!(out, "{}", render::violation_lines(&answer.violations))?;
    } else if answer.events.is_empty() {
        writeln!(
            out,
            "Nothing would be sent: no e-mail address, or the integration is disabled."
        )?;
    }
    Ok(())
}

async fn status(
    connection: &Connection,
    integration_id: String,
    capture_id: String,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let message = GetCaptureRequest {
        integration_id,
        capture_id,
    };
    let answer = relay(connection)
        .await?
        .get_capture(request(connection, message))
        .await?;
    let answer = answer.into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "GetCaptureResponse", true))?;
        return Ok(0);
    }
    let result = answer
        .result
        .ok_or_else(|| ClientError::Answer("no result".to_owned()))?;
    print_result(out, &result)?;
    if !answer.attempts.is_empty() {
        write!(out, "\n{}", render::attempt_table(&answer.attempts))?;
    }
    Ok(0)
}

fn watch_request(
    integration: Option<String>,
    states: &[StateArg],
    types: &[TypeArg],
) -> WatchDeliveriesRequest {
    WatchDeliveriesRequest {
        integration_id: integration.unwrap_or_default(),
        states: states.iter().map(|state| state.to_proto().into()).collect(),
        types: types.iter().map(|event| event.to_proto().into()).collect(),
    }
}

async fn watch(
    connection: &Connection,
    message: WatchDeliveriesRequest,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let mut updates = relay(connection)
        .await?
        .watch_deliveries(message)
        .await?
        .into_inner();
    loop {
        let update = tokio::select! {
            // Where signals can't be heard, the process ends by them.
            Ok(()) = tokio::signal::ctrl_c() => return Ok(0),
            update = updates.next() => update,
        };
        let Some(update) = update else { return Ok(0) };
        let update = update?;
        if connection.json {
            write_json(out, to_json(&update, "WatchDeliveriesResponse", false))?;
        } else {
            writeln!(out, "{}", render::watch_line(&update))?;
        }
        out.flush()?;
    }
}

async fn health(
    reach: &Reach,
    timeout: Duration,
    service: String,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let mut client = HealthClient::new(reach.connect(timeout).await?);
    let mut request = Request::new(HealthCheckRequest { service });
    request.set_timeout(timeout);
    let status = client.check(request).await?.into_inner().status();
    writeln!(out, "{}", status.as_str_name())?;
    Ok(u8::from(status != ServingStatus::Serving))
}
