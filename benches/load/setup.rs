//! `load setup` and `load ready`: integrations, and whether the relay takes captures.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use clap::Args;
use segment_relay::proto::{
    CreateIntegrationRequest, integration_service_client::IntegrationServiceClient,
};
use serde_json::json;
use tonic::transport::Endpoint;

use crate::{
    call,
    template::{Numbers, Template},
    workload::specification,
};

const RETRY: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Args)]
pub(crate) struct SetupArgs {
    #[arg(long)]
    address: SocketAddr,
    #[arg(long, default_value_t = 4)]
    integrations: usize,
}

pub(crate) async fn setup(args: SetupArgs) -> serde_json::Value {
    let url = format!("http://{}", args.address);
    let mut client = IntegrationServiceClient::connect(url)
        .await
        .expect("connects");
    for number in 0..args.integrations {
        let request = CreateIntegrationRequest {
            integration: Some(specification(&format!("bench-{number}"))),
        };
        client.create_integration(request).await.expect("created");
    }
    json!({"integrations": args.integrations})
}

#[derive(Args)]
pub(crate) struct ReadyArgs {
    #[arg(long)]
    address: SocketAddr,
}

/// Tries a capture for `bench-0` until it is accepted.
pub(crate) async fn ready(args: ReadyArgs) -> serde_json::Value {
    let start = Instant::now();
    let endpoint = Endpoint::from_shared(format!("http://{}", args.address)).expect("a URL");
    let template = Template::unary("bench-0".to_owned());
    let numbers = Numbers::new();
    loop {
        assert!(start.elapsed() < PATIENCE, "no capture was accepted");
        if let Ok(channel) = endpoint.connect().await {
            let mut client = call::client(&channel);
            let request = template.fill(&numbers);
            if call::unary(&mut client, call::path("Capture"), request)
                .await
                .is_ok()
            {
                return json!({"waited_seconds": start.elapsed().as_secs_f64()});
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
