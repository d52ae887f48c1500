//! `grpc.health.v1.Health`.

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_server::Health,
};

use crate::grpc::{RELAY_SERVICE, RelayError};

type Reports = BoxStream<'static, Result<HealthCheckResponse, Status>>;

/// The state of the relay and of its main service, which are one.
pub(super) struct HealthService {
    /// Whether it serves.
    pub(super) serving: watch::Receiver<bool>,
    /// Ends the streams of reports.
    pub(super) closing: CancellationToken,
}

fn is_known(service: &str) -> bool {
    ["", RELAY_SERVICE].contains(&service)
}

fn status_of(serving: bool) -> ServingStatus {
    if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    }
}

fn report(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(RelayError::UnknownService.into());
        }
        let serving = *self.serving.borrow();
        Ok(Response::new(report(status_of(serving))))
    }

    type WatchStream = Reports;

    /// Reports now and at each change. The drain ends the stream, and its last report is
    /// NOT_SERVING. A service that is not known may become known, in the protocol: the stream
    /// says SERVICE_UNKNOWN and stays.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Reports>, Status> {
        let (closing, serving) = (self.closing.clone(), self.serving.clone());
        if !is_known(&request.get_ref().service) {
            let unknown = report(ServingStatus::ServiceUnknown);
            let end = ended(closing).map(Err);
            return Ok(Response::new(
                stream::iter([Ok(unknown)]).chain(end).boxed(),
            ));
        }
        let reports = stream::unfold(Watch::new(serving, closing.clone()), Watch::next);
        let all = reports.map(|serving| Ok(report(status_of(serving))));
        Ok(Response::new(all.chain(ended(closing).map(Err)).boxed()))
    }
}

/// What a stream ends with, once the relay closes its connections.
fn ended(closing: CancellationToken) -> impl futures_util::Stream<Item = Status> + Send {
    stream::once(async move {
        closing.cancelled_owned().await;
        RelayError::Draining.into()
    })
}

struct Watch {
    serving: watch::Receiver<bool>,
    closing: CancellationToken,
    last: Option<bool>,
}

impl Watch {
    fn new(serving: watch::Receiver<bool>, closing: CancellationToken) -> Self {
        Self {
            serving,
            closing,
            last: None,
        }
    }

    /// The next state that differs from the last one; none after the last of all.
    async fn next(mut self) -> Option<(bool, Self)> {
        loop {
            let is_closing = self.closing.is_cancelled();
            let serving = *self.serving.borrow_and_update() && !is_closing;
            if self.last.replace(serving) != Some(serving) {
                return Some((serving, self));
            }
            if is_closing {
                return None;
            }
            tokio::select! {
                () = self.closing.cancelled() => {}
                changed = self.serving.changed() => if changed.is_err() {
                    // Nothing changes any more; the drain still ends the stream.
                    self.closing.cancelled().await;
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn watched(service: &str, health: &HealthService) -> Reports {
        let request = Request::new(HealthCheckRequest {
            service: service.into(),
        });
        health.watch(request).await.expect("watches").into_inner()
    }

    async fn next(reports: &mut Reports) -> Result<ServingStatus, tonic::Code> {
        let report = reports.next().await.expect("a report");
        report
            .map(|report| report.status())
            .map_err(|status| status.code())
    }

    fn health() -> (watch::Sender<bool>, HealthService) {
        let (set, serving) = watch::channel(true);
        let closing = CancellationToken::new();
        (set, HealthService { serving, closing })
    }

    #[tokio::test]
    async fn a_watch_reports_each_change_and_ends_with_not_serving() {
        let (set, health) = health();
        let mut reports = watched("", &health).await;
        assert_eq!(next(&mut reports).await, Ok(ServingStatus::Serving));
        set.send_replace(false);
        assert_eq!(next(&mut reports).await, Ok(ServingStatus::NotServing));
        set.send_replace(true);
        assert_eq!(next(&mut reports).await, Ok(ServingStatus::Serving));
        set.send_replace(true);
        health.closing.cancel();
        // Though nothing has set it so.
        assert_eq!(next(&mut reports).await, Ok(ServingStatus::NotServing));
        assert_eq!(next(&mut reports).await, Err(tonic::Code::Unavailable));
        assert!(reports.next().await.is_none());
    }

    #[tokio::test]
    async fn a_watch_of_an_unknown_service_says_so_and_stays() {
        let (set, health) = health();
        let mut reports = watched("no.such.Service", &health).await;
        assert_eq!(next(&mut reports).await, Ok(ServingStatus::ServiceUnknown));
        set.send_replace(false);
        assert!(futures_util::poll!(reports.next()).is_pending());
        health.closing.cancel();
        assert_eq!(next(&mut reports).await, Err(tonic::Code::Unavailable));
    }
}
