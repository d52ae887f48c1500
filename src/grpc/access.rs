//! What every call passes first: who calls, may they, and is there room.

use std::sync::Arc;

use http::Request;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Gate, Peer, RelayError, Throttle, Usage,
    body::{CallGuards, HeldBytes, Meter},
    gate::Place,
    rpcs::{Need, Rpc},
    usage::CallerPermit,
};
use crate::{
    audit::Audit,
    auth::Authenticator,
    metrics::Metrics,
    permission::{Caller, Permission},
    trace::Traces,
};

/// Calls at once on a connection of those that anybody may make: there are few
/// services to watch the health of.
const MAX_OPEN_CALLS: usize = 16;

/// Lets calls through that may pass.
pub struct Access {
    authenticator: Authenticator,
    gate: Arc<Gate>,
    usage: Arc<Usage>,
    audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) traces: Traces,
}

/// What a service is told of a call that was let in, among its extensions.
#[derive(Clone)]
pub(super) struct Pass {
    /// Who calls.
    pub(super) caller: Arc<Caller>,
    /// The place of a call with captures, whose bytes may be many.
    pub(super) place: Option<Place>,
    /// Its turn among those of its caller, where few may be at work at once. A change that is
    /// carried to its end keeps it, also when the caller has gone.
    pub(super) turn: Option<Arc<CallerPermit>>,
    /// What it holds until its answer has left.
    pub(super) bytes: Arc<HeldBytes>,
    /// Until when it has to be answered.
    pub(super) deadline: Instant,
}

/// What comes of a call that may pass.
pub(super) struct Admission {
    /// Nothing where anybody may call.
    pub(super) pass: Option<Pass>,
    pub(super) guards: CallGuards,
    /// Counts the bytes of its body.
    pub(super) meter: Option<Meter>,
}

impl Access {
    /// With these parts.
    #[must_use]
    pub fn new(
        authenticator: Authenticator,
        gate: Arc<Gate>,
        usage: Arc<Usage>,
        audit: Audit,
        metrics: Metrics,
        traces: Traces,
    ) -> Self {
        Self {
            authenticator,
            gate,
            usage,
            audit,
            metrics,
            traces,
        }
    }

    /// Keeps the keys of the tokens' issuer fresh until `stop`.
    pub async fn refresh_keys(&self, stop: CancellationToken) {
        self.authenticator.refresh_keys(stop).await;
    }

    /// Lets a call in, before any of its body is read.
    pub(super) async fn admit<B>(
        &self,
        rpc: Rpc,
        request: &Request<B>,
        peer: &Peer,
        deadline: Instant,
    ) -> Result<Admission, RelayError> {
        let activity = peer.activity.begin();
        if rpc.need == Need::Nothing {
            let open = peer.activity.begin_open(MAX_OPEN_CALLS);
            return Ok(Admission {
                pass: None,
                guards: CallGuards::open(activity, open.ok_or(Throttle::OPEN_CALLS)?),
                meter: None,
            });
        }
        let caller = self.known(rpc, request, peer).await?;
        let permit = self.usage.enter(&caller)?;
        // Before it has a place among those of all callers.
        let turn = self.usage.turn(&caller, rpc.cost()).await.map(Arc::new);
        let place = match rpc.need {
            Need::Permission(Permission::Capture) => Some(self.gate.enter(turn.clone())?),
            _ => None,
        };
        let guards = CallGuards::new(activity, permit, turn.clone());
        let (usage, bytes) = (Arc::clone(&self.usage), Arc::clone(guards.bytes()));
        Ok(Admission {
            pass: Some(Pass {
                caller,
                place,
                bytes: Arc::clone(&bytes),
                turn,
                deadline,
            }),
            guards,
            meter: Some(Meter::new(usage, bytes, rpc.streams_requests())),
        })
    }

    async fn known<B>(
        &self,
        rpc: Rpc,
        request: &Request<B>,
        peer: &Peer,
    ) -> Result<Arc<Caller>, RelayError> {
        let (headers, path) = (request.headers(), request.uri().path());
        let names = &peer.certificate_names;
        let known = self.authenticator.authenticate(headers, names).await;
        let caller = known.map_err(|error| {
            let error = RelayError::Unauthenticated(error);
            self.note_refusal(None, peer, path, &error);
            error
        })?;
        match rpc.need {
            Need::Permission(permission) if !caller.may(permission) => {
                let error = RelayError::PermissionMissing(permission);
                self.note_refusal(Some(&caller), peer, path, &error);
                Err(error)
            }
            _ => Ok(caller),
        }
    }

    /// Notes a call that was refused for who called.
    pub(super) fn note_refusal(
        &self,
        caller: Option<&Caller>,
        peer: &Peer,
        path: &str,
        error: &RelayError,
    ) {
        let name = caller.map(|caller| caller.name.as_str());
        self.audit.refused(name, peer.address, path, error.reason());
    }
}
