//! Relays over one shared outbox, each by its services.

mod dead_letters;
mod shared;
mod world;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::{Gate, Services, Usage, access::Pass};
use crate::{
    audit::Audit,
    config::{Config, Outside},
    delivery::{Sources, Turns},
    metrics::Metrics,
    notify::Notices,
    outbox::{Outbox, shared_double::SharedDouble},
    permission::Caller,
    proto::{self, Credential, DataRegion, Integration},
    registry::{Configured, Registry, Told},
    segment::SegmentClient,
    time::UnixMillis,
    trace::Traces,
};

/// The services of one relay.
async fn relay(outbox: &Arc<SharedDouble>, audit: Audit) -> Services {
    let outside = Outside {
        validate: &|_| Vec::new(),
        read_key_file: &|_| Err(std::io::ErrorKind::NotFound.into()),
    };
    let config = Config::load(None, Vec::<(String, String)>::new(), &outside);
    let config = config.expect("the defaults are fine");
    let outbox = Arc::clone(outbox) as Arc<dyn Outbox>;
    let notices = Notices::nobody();
    let told = Told {
        audit: &audit,
        notices: &notices,
    };
    let configured = Configured {
        integrations: &[],
        version: 0,
    };
    let registry = Registry::load(Arc::clone(&outbox), configured, &told, UnixMillis::now());
    let registry = Arc::new(registry.await.expect("loads"));
    let limits = Arc::new(config.server.clone());
    Services {
        gate: Arc::new(Gate::new(
            limits.max_calls_in_flight,
            limits.max_watchers,
            CancellationToken::new(),
        )),
        outbox,
        registry,
        segment: Arc::new(SegmentClient::new(&config.segment).expect("a client")),
        vitals: Arc::default(),
        sources: Arc::new(Sources::new(Duration::from_secs(300))),
        holds: Arc::default(),
        turns: Arc::new(Turns::new(config.delivery.max_requests_in_flight)),
        notices,
        usage: Arc::new(Usage::new(&config)),
        audit,
        metrics: Metrics::off(),
        traces: Traces::Off,
        limits,
    }
}

/// A request of a caller who may do everything.
fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Pass {
        caller: Arc::new(Caller::anonymous()),
        place: None,
        turn: None,
        bytes: Arc::default(),
        deadline: Instant::now() + Duration::from_secs(30),
    });
    request
}

fn reason(status: &Status) -> String {
    use tonic_types::StatusExt;
    let details = status.get_error_details();
    let info = details.error_info().expect("an ErrorInfo");
    info.reason.clone()
}

fn acme() -> Integration {
    Integration {
        integration_id: "acme".into(),
        credentials: vec![Credential {
            data_region: DataRegion::NonEu.into(),
            write_key: "a-write-key-for-tests".into(),
            ..Credential::default()
        }],
        ..Integration::default()
    }
}

/// As another relay stores it: with an etag of its own.
fn stored(etag: &str, version: u64) -> Integration {
    Integration {
        etag: etag.into(),
        mapping_version: version,
        ..acme()
    }
}

fn capture(id: &str) -> proto::Capture {
    proto::Capture {
        capture_id: id.into(),
        email: "person@example.com".into(),
        campaign_id: "campaign".into(),
        session_id: "session".into(),
        ..proto::Capture::default()
    }
}
