//! A collector of OpenTelemetry data that keeps what it gets, and looks through all
//! of it for what must never leave the relay.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, mpsc::sync_channel},
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::any_value::Value,
    trace::v1::{Span, status::StatusCode},
};
use tokio::{net::TcpListener, sync::Notify};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::{harness::PATIENCE, scan};

#[derive(Default)]
struct State {
    spans: Mutex<Vec<Span>>,
    metrics: Mutex<BTreeSet<String>>,
    resources: Mutex<BTreeSet<String>>,
    headers: Mutex<BTreeSet<String>>,
    came: Notify,
}

#[derive(Clone)]
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

impl Collector {
    /// One that is spoken to by gRPC.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let collector = Self {
            address: listener.local_addr().expect("an address"),
            state: Arc::default(),
        };
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .add_service(MetricsServiceServer::new(collector.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        collector
    }

    /// The one that all relays of the tests export to which are not about a
    /// collector of their own: so all their spans and metrics are looked through.
    pub(crate) fn for_all() -> SocketAddr {
        static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
        *ADDRESS.get_or_init(|| {
            let (tell, told) = sync_channel(1);
            // Each test has a runtime that ends with it; this one outlives them.
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a runtime");
                runtime.block_on(async {
                    let collector = Self::start().await;
                    tell.send(collector.address).expect("asked for");
                    std::future::pending::<()>().await;
                });
            });
            told.recv().expect("it starts")
        })
    }

    /// One that is fed by hand.
    pub(crate) fn by_hand() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            state: Arc::default(),
        }
    }

    pub(crate) fn take_traces(&self, request: ExportTraceServiceRequest) {
        scan::check(&format!("{request:?}"));
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let names = attributes
                .iter()
                .map(|one| format!("{}={}", one.key, shown(one.value.as_ref())));
            self.state.resources.lock().expect("sound").extend(names);
            for scope in resource.scope_spans {
                let version = scope.scope.as_ref().map(|scope| scope.version.as_str());
                assert_eq!(version, Some(env!("CARGO_PKG_VERSION")));
                self.state.spans.lock().expect("sound").extend(scope.spans);
            }
        }
        self.state.came.notify_waiters();
    }

    pub(crate) fn take_metrics(&self, request: ExportMetricsServiceRequest) {
        scan::check(&format!("{request:?}"));
        let metrics = request.resource_metrics.into_iter();
        let metrics = metrics.flat_map(|resource| resource.scope_metrics);
        let names = metrics
            .flat_map(|scope| scope.metrics)
            .map(|metric| metric.name);
        self.state.metrics.lock().expect("sound").extend(names);
        self.state.came.notify_waiters();
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        let spans = self.state.spans.lock().expect("sound").clone();
        spans.iter().for_each(check_types);
        spans
    }

    pub(crate) fn metrics(&self) -> BTreeSet<String> {
        self.state.metrics.lock().expect("sound").clone()
    }

    pub(crate) fn resources(&self) -> BTreeSet<String> {
        self.state.resources.lock().expect("sound").clone()
    }

    /// Headers of requests for metrics or traces, as `name=value`.
    pub(crate) fn headers(&self) -> BTreeSet<String> {
        self.state.headers.lock().expect("sound").clone()
    }

    /// Waits until something is true of what came.
    pub(crate) async fn until<T>(&self, found: impl Fn(&Self) -> Option<T>) -> T {
        let wait = async {
            loop {
                let came = self.state.came.notified();
                if let Some(found) = found(self) {
                    return found;
                }
                came.await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found,
            Err(_) => panic!("it did not come; what came: {:#?}", self.spans()),
        }
    }

    fn note(&self, metadata: &tonic::metadata::MetadataMap) {
        let headers = metadata.clone().into_headers();
        let headers = headers
            .iter()
            .map(|(name, value)| format!("{name}={}", value.to_str().unwrap_or_default()));
        self.state.headers.lock().expect("sound").extend(headers);
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.note(request.metadata());
        self.take_traces(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.note(request.metadata());
        self.take_metrics(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

/// Numbers are integers, as the semantic conventions have them; ids may look like numbers.
fn check_types(span: &Span) {
    for one in &span.attributes {
        let value = one.value.as_ref().and_then(|value| value.value.as_ref());
        if let Some(Value::StringValue(text)) = value {
            let is_number =
                text.parse::<f64>().is_ok() && !one.key.ends_with("_id") && one.key != "error.type";
            assert!(
                !is_number,
                "{} of {} is the text {text:?}",
                one.key, span.name
            );
        }
    }
}

fn shown(value: Option<&opentelemetry_proto::tonic::common::v1::AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// An attribute of a span as text; empty where it has none of the name.
pub(crate) fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|one| one.key == name);
    found.map_or_else(String::new, |one| shown(one.value.as_ref()))
}

pub(crate) fn failed(span: &Span) -> bool {
    span.status
        .as_ref()
        .is_some_and(|status| status.code() == StatusCode::Error)
}
