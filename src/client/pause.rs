//! `segment-relay pause` and `resume`.

use std::io::Write;

use prost_types::FieldMask;

use super::{
    ClientError,
    connect::{Connection, request},
    json::{to_json, write_json},
    render::plain,
};
use crate::proto::{
    Integration, UpdateIntegrationRequest, integration_service_client::IntegrationServiceClient,
};

/// Holds an integration's deliveries, or lets them go on.
pub(super) async fn pause(
    connection: &Connection,
    integration_id: String,
    paused: bool,
    out: &mut impl Write,
) -> Result<u8, ClientError> {
    let message = UpdateIntegrationRequest {
        integration: Some(Integration {
            integration_id,
            paused: Some(paused),
            ..Integration::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["paused".to_owned()],
        }),
    };
    let mut service = IntegrationServiceClient::new(connection.connect().await?);
    let answer = service.update_integration(request(connection, message));
    let answer = answer.await?.into_inner();
    if connection.json {
        write_json(out, to_json(&answer, "UpdateIntegrationResponse", true))?;
        return Ok(0);
    }
    let id = answer.integration.unwrap_or_default().integration_id;
    let state = match paused {
        true => "paused: captures are accepted and wait, nothing is sent",
        false => "resumed: what waits is sent",
    };
    writeln!(out, "{} is {state}", plain(&id))?;
    Ok(0)
}
