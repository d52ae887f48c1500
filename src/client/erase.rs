//! `segment-relay erase` and `receipts`.

use std::io::Write;

use super::{
    ClientError,
    connect::{Connection, Wire, request},
    json::{to_json, write_json},
    render::plain,
};
use crate::{
    proto::{
        EraseSubjectRequest, ErasureReceipt, ListErasureReceiptsRequest,
        erase_subject_request::Subject, privacy_service_client::PrivacyServiceClient,
    },
    time::UnixMillis,
};

async fn service(connection: &Connection) -> Result<PrivacyServiceClient<Wire>, ClientError> {
    Ok(PrivacyServiceClient::new(connection.connect().await?))
}

/// Erases a person's data.
pub(super) async fn erase(
    connection: &Connection,
    subject: Subject,
    integration_id: String,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let message = EraseSubjectRequest {
        subject: Some(subject),
        integration_id,
    };
    let mut service = service(connection).await?;
    let answer = service.erase_subject(request(connection, message)).await?;
    let answer = answer.into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "EraseSubjectResponse", true))?;
        return Ok(0);
    }
    let receipt = answer
        .receipt
        .ok_or_else(|| ClientError::Answer("no receipt".to_owned()))?;
    writeln!(out, "{}", line(&receipt))?;
    Ok(0)
}

/// Lists receipts, newest first.
pub(super) async fn receipts(
    connection: &Connection,
    email_sha256: Option<String>,
    limit: usize,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let mut service = service(connection).await?;
    let message = ListErasureReceiptsRequest {
        email_sha256: email_sha256.unwrap_or_default(),
        page_size: i32::try_from(limit).unwrap_or(1_000),
        page_token: String::new(),
    };
    let answer = service
        .list_erasure_receipts(request(connection, message))
        .await?
        .into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "ListErasureReceiptsResponse", true))?;
        return Ok(0);
    }
    for receipt in &answer.receipts {
        writeln!(out, "{}", line(receipt))?;
    }
    Ok(0)
}

fn line(receipt: &ErasureReceipt) -> String {
    let time = receipt.erase_time.as_ref().and_then(UnixMillis::from_proto);
    let integration = match receipt.integration_id.as_str() {
        "" => "all integrations",
        id => id,
    };
    format!(
        "receipt {}  {}  {}  by {}  {}: {} waiting events, {} dead letters, {} payloads, {} attempts{}",
        plain(&receipt.receipt_id),
        time.unwrap_or_default().to_iso(),
        plain(&receipt.email_sha256),
        plain(&receipt.caller),
        plain(integration),
        receipt.waiting_event_count,
        receipt.dead_letter_count,
        receipt.payload_count,
        receipt.attempt_count,
        if receipt.completed {
            ""
        } else {
            "  (interrupted)"
        },
    )
}
