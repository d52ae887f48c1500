//! What the demo does, and what it says about it.

use std::{io::Write, time::Duration};

use tonic::{Code, Request};

use super::{DemoError, Stage};
use crate::{
    client::{render, status_text},
    proto::{
        AttributeValue, Capture, CaptureRequest, CaptureResult, CreateIntegrationRequest,
        Credential, DataRegion, DeliveryState, EventDelivery, FieldMapping, Integration,
        StringList, ValueType, WaitFor, attribute_value::Kind,
        integration_service_client::IntegrationServiceClient,
        segment_relay_client::SegmentRelayClient,
    },
    sandbox::{self, Rule},
};

const INTEGRATION: &str = "demo";
/// No call of the demo takes longer.
const DEADLINE: Duration = Duration::from_secs(20);
/// What the integration's public description shows as the `userId` of its example.
const EXAMPLE_HASH: &str = "f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55";

/// One line of the closing table.
struct Line {
    what: &'static str,
    outcome: String,
}

pub(super) async fn tell(out: &mut impl Write, stage: &Stage) -> Result<(), DemoError> {
    let [non_eu, eu] = &stage.endpoints;
    writeln!(out, "segment-relay demo")?;
    writeln!(out, "  relay    {} (gRPC)", stage.relay_address)?;
    writeln!(
        out,
        "  Segment  a sandbox in its place: {non_eu} (non-EU), {eu} (EU)"
    )?;
    writeln!(out)?;
    let mut integrations = IntegrationServiceClient::new(stage.channel.clone());
    let request = CreateIntegrationRequest {
        integration: Some(integration()),
    };
    integrations.create_integration(request).await?;
    writeln!(
        out,
        "Created the integration \"{INTEGRATION}\" with a write key for each region.\n"
    )?;

    let mut lines = Vec::new();
    for (what, capture) in good_captures() {
        lines.push(deliver(out, stage, what, capture).await?);
    }
    lines.push(repeat(stage).await?);
    lines.push(retry(out, stage).await?);
    lines.push(skip(stage).await?);
    lines.push(refuse(out, stage).await?);

    writeln!(out, "What became of each capture")?;
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    for line in &lines {
        writeln!(out, "  {:width$}  {}", line.what, line.outcome)?;
    }
    how_to_go_on(out)?;
    Ok(())
}

/// Sends a capture, waits for its delivery, and shows what Segment got.
async fn deliver(
    out: &mut impl Write,
    stage: &Stage,
    what: &'static str,
    capture: Capture,
) -> Result<Line, DemoError> {
    let result = send(stage, capture).await?;
    writeln!(out, "{what}: the events as Segment's Debugger shows them")?;
    for event in &result.events {
        expect(
            event.state() == DeliveryState::Delivered,
            "an event was not delivered",
        )?;
        let arrived = stage
            .sandbox
            .entries()
            .into_iter()
            .find(|entry| entry.event()["messageId"] == event.message_id.as_str());
        let Some(arrived) = arrived else {
            return Err(DemoError::Unexpected(
                "an event did not reach the sandbox".to_owned(),
            ));
        };
        if what == WORKED_EXAMPLE {
            expect(
                arrived.event()["userId"] == EXAMPLE_HASH,
                "the hash is not the example's",
            )?;
        }
        writeln!(out, "{}", sandbox::entry_text(&arrived).trim_end())?;
    }
    writeln!(out, "{}", render::event_table(&result.events))?;
    Ok(Line {
        what,
        outcome: outcome(&result.events),
    })
}

const WORKED_EXAMPLE: &str = "the worked example";

async fn repeat(stage: &Stage) -> Result<Line, DemoError> {
    let again = send(stage, worked_example()).await?;
    expect(again.duplicate, "a repetition was not recognised")?;
    let outcome = format!("duplicate: nothing is sent; {}", outcome(&again.events));
    Ok(Line {
        what: "the same once more",
        outcome,
    })
}

async fn retry(out: &mut impl Write, stage: &Stage) -> Result<Line, DemoError> {
    let rule = Rule {
        status: Some(503),
        count: Some(1),
        ..Rule::default()
    };
    stage
        .sandbox
        .set_rules(vec![rule])
        .map_err(|error| DemoError::Unexpected(error.to_string()))?;
    let capture = person("grace", "Owned+Mobile");
    let result = send(stage, capture).await?;
    let tried_again = result.events.iter().all(|event| event.attempt_count == 2);
    expect(tried_again, "the failed request was not repeated")?;
    writeln!(
        out,
        "While Segment fails (503), the relay keeps the events and tries again:"
    )?;
    writeln!(out, "{}", render::event_table(&result.events))?;
    Ok(Line {
        what: "while Segment fails once",
        outcome: outcome(&result.events),
    })
}

async fn skip(stage: &Stage) -> Result<Line, DemoError> {
    let anonymous = Capture {
        email: String::new(),
        ..person("nobody", "Owned+Web")
    };
    let result = send(stage, anonymous).await?;
    let skipped = result
        .events
        .iter()
        .all(|event| event.state() == DeliveryState::Skipped);
    expect(skipped, "a capture without e-mail was not skipped")?;
    Ok(Line {
        what: "without an e-mail address",
        outcome: outcome(&result.events),
    })
}

async fn refuse(out: &mut impl Write, stage: &Stage) -> Result<Line, DemoError> {
    let mut bad = person("mallory", "Owned+Web");
    bad.attributes
        .insert("household_size".to_owned(), text("many"));
    bad.attributes
        .insert("birthday".to_owned(), text("last spring"));
    match send(stage, bad).await {
        Err(DemoError::Call(status)) if status.code() == Code::InvalidArgument => {
            writeln!(
                out,
                "A capture that breaks its mapping is refused, and changes nothing:"
            )?;
            writeln!(out, "{}", status_text(&status))?;
            let outcome = "refused: INVALID_ARGUMENT, two fields".to_owned();
            Ok(Line {
                what: "breaking its mapping",
                outcome,
            })
        }
        Err(other) => Err(other),
        Ok(_) => Err(DemoError::Unexpected(
            "a bad capture was accepted".to_owned(),
        )),
    }
}

async fn send(stage: &Stage, capture: Capture) -> Result<CaptureResult, DemoError> {
    let mut request = Request::new(CaptureRequest {
        integration_id: INTEGRATION.to_owned(),
        capture: Some(capture),
        wait_for: WaitFor::Delivered.into(),
    });
    request.set_timeout(DEADLINE);
    let mut relay = SegmentRelayClient::new(stage.channel.clone());
    let answer = relay.capture(request).await?.into_inner();
    answer
        .result
        .ok_or_else(|| DemoError::Unexpected("an answer without a result".to_owned()))
}

fn expect(holds: bool, otherwise: &str) -> Result<(), DemoError> {
    if holds {
        Ok(())
    } else {
        Err(DemoError::Unexpected(otherwise.to_owned()))
    }
}

fn outcome(events: &[EventDelivery]) -> String {
    let word = |event: &EventDelivery| {
        let name = event
            .state()
            .as_str_name()
            .trim_start_matches("DELIVERY_STATE_");
        match event.attempt_count {
            0 | 1 => name.to_owned(),
            attempts => format!("{name} ({attempts} attempts)"),
        }
    };
    match events {
        [identify, track] => format!("identify {}, track {}", word(identify), word(track)),
        _ => String::new(),
    }
}

fn integration() -> Integration {
    let credential = |region: DataRegion, write_key: &str| Credential {
        data_region: region.into(),
        write_key: write_key.to_owned(),
        write_key_hint: String::new(),
    };
    let mapping = |id: &str, key: &str, value_type: ValueType| FieldMapping {
        attribute_id: id.to_owned(),
        segment_key: key.to_owned(),
        value_type: value_type.into(),
        ..FieldMapping::default()
    };
    Integration {
        integration_id: INTEGRATION.to_owned(),
        display_name: "Demo".to_owned(),
        credentials: vec![
            credential(DataRegion::NonEu, "demo-write-key-non-eu"),
            credential(DataRegion::Eu, "demo-write-key-eu"),
        ],
        mappings: vec![
            mapping("attribute_id_1", "", ValueType::Unspecified),
            mapping("attribute_id_2", "", ValueType::Unspecified),
            mapping("first_name", "firstName", ValueType::String),
            mapping("birthday", "birthday", ValueType::Unspecified),
            mapping("household_size", "householdSize", ValueType::Number),
            mapping("newsletter", "newsletter", ValueType::Bool),
            mapping("favourites", "favourites", ValueType::List),
        ],
        ..Integration::default()
    }
}

fn good_captures() -> [(&'static str, Capture); 3] {
    let mut typed = person("ada", "Paid+Social");
    let list = StringList {
        values: vec!["tea".to_owned(), "maths".to_owned()],
    };
    typed.attributes = [
        ("first_name".to_owned(), text("Ada")),
        ("birthday".to_owned(), text("1815-12-10")),
        ("household_size".to_owned(), value(Kind::IntegerValue(3))),
        ("newsletter".to_owned(), value(Kind::BoolValue(true))),
        ("favourites".to_owned(), value(Kind::ListValue(list))),
        ("not_mapped".to_owned(), text("dropped")),
    ]
    .into();
    typed.consent = [
        ("advertising".to_owned(), false),
        ("analytics".to_owned(), true),
    ]
    .into();
    let in_eu = Capture {
        data_region: DataRegion::Eu.into(),
        ..person("emmy", "Owned+Web")
    };
    [
        (WORKED_EXAMPLE, worked_example()),
        ("typed answers and consent", typed),
        ("a person in the EU", in_eu),
    ]
}

fn worked_example() -> Capture {
    Capture {
        email: "test@aol.com".to_owned(),
        campaign_id: "n3zrik6g".to_owned(),
        campaign_name: "New Quiz".to_owned(),
        session_id: "y2P5ks05mqzGsdkIGjbQ".to_owned(),
        traffic_source: "Owned+Web".to_owned(),
        // 2021-03-12T00:00:00Z
        occur_time: Some(prost_types::Timestamp {
            seconds: 1_615_507_200,
            nanos: 0,
        }),
        data_region: DataRegion::NonEu.into(),
        attributes: [
            ("attribute_id_1".to_owned(), text("attribute_value_1")),
            ("attribute_id_2".to_owned(), text("attribute_value_2")),
        ]
        .into(),
        ..Capture::default()
    }
}

fn person(name: &str, source: &str) -> Capture {
    Capture {
        email: format!("{name}@example.com"),
        campaign_id: "q7demo".to_owned(),
        campaign_name: "Which hero are you?".to_owned(),
        session_id: format!("session-of-{name}"),
        traffic_source: source.to_owned(),
        data_region: DataRegion::NonEu.into(),
        ..Capture::default()
    }
}

fn text(text: &str) -> AttributeValue {
    value(Kind::StringValue(text.to_owned()))
}

fn value(kind: Kind) -> AttributeValue {
    AttributeValue { kind: Some(kind) }
}

fn how_to_go_on(out: &mut impl Write) -> std::io::Result<()> {
    let program = std::env::args()
        .next()
        .unwrap_or_else(|| "segment-relay".to_owned());
    writeln!(
        out,
        "
How to go on, with a sandbox in Segment's place, in three terminals
  {program} sandbox
  SEGMENT_RELAY__SEGMENT__ENDPOINTS__NON_EU=http://127.0.0.1:8765/v1/batch \\
  SEGMENT_RELAY__SEGMENT__ENDPOINTS__EU=http://127.0.0.1:8766/v1/batch \\
    {program} serve
  grpcurl -plaintext -d '{{\"integration\":{{\"integration_id\":\"acme\",\"credentials\":
    [{{\"data_region\":\"DATA_REGION_NON_EU\",\"write_key\":\"any-key-for-the-sandbox\"}}]}}}}' \\
    127.0.0.1:50051 jebbit.segmentrelay.v1.IntegrationService/CreateIntegration
  {program} capture --integration acme --email test@aol.com --campaign-id n3zrik6g \\
    --session-id y2P5ks05mqzGsdkIGjbQ --wait delivered
For the real Segment, leave the two variables out: segment-relay serve --config FILE,
where `segment-relay config` prints a file to start from."
    )
}
