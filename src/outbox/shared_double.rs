//! A shared outbox for tests: an embedded one that several registries and services use at
//! once, each as a relay does. Tests make it fail, and have other relays be faster.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};

use super::{
    Backlog, Claim, DeadLetter, DeadLetterCount, DeadLetterFilter, Erasure, FoundSubject, LaneKey,
    LeaseBudget, LeaseScope, LeasedCapture, NewCapture, Outbox, OutboxError, Quota, Receipt,
    Selection, Settlement, Signals, SqliteOptions, SqliteOutbox, StoredIntegration, SubjectQuery,
    Submitted, Taken, conformance::LIMITS,
};
use crate::{
    integration::{IntegrationId, revision_number},
    metrics::Metrics,
    notice::Notice,
    proto::ErasureReceipt,
    status::CaptureRecord,
    time::UnixMillis,
    vault::Vault,
};

pub(crate) struct SharedDouble {
    inner: SqliteOutbox,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    _directory: tempfile::TempDir,
}

#[derive(Default)]
struct State {
    /// Etags of what is stored.
    etags: BTreeMap<String, String>,
    claim: Option<(u64, [u8; 16])>,
    /// What other relays store just before the next submissions and changes.
    meanwhile: VecDeque<(Option<u64>, StoredIntegration)>,
    /// What the next calls of a name end with.
    faults: HashMap<&'static str, VecDeque<Option<OutboxError>>>,
    /// Until when the answers to the next submissions are held back.
    held: VecDeque<oneshot::Receiver<()>>,
    /// Calls of each name.
    calls: HashMap<&'static str, usize>,
}

impl SharedDouble {
    pub(crate) fn new() -> Arc<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let options = SqliteOptions {
            directory: directory.path().to_owned(),
            limits: LIMITS,
            group_commit_max: 64,
            remember: Duration::from_secs(3_600),
            encrypt_payloads: false,
            metrics: Metrics::off(),
        };
        let vault = Arc::new(Vault::forgetful().expect("random"));
        Arc::new(Self {
            inner: SqliteOutbox::open(&options, &vault).expect("opens"),
            state: Mutex::default(),
            changes: watch::Sender::new(0),
            _directory: directory,
        })
    }

    /// What it keeps, past all that tests make of it.
    pub(crate) fn inner(&self) -> &SqliteOutbox {
        &self.inner
    }

    /// Another relay stores an integration just before the next submission or change; each
    /// of them takes one.
    pub(crate) fn meanwhile(&self, integration: StoredIntegration) {
        self.state().meanwhile.push_back((None, integration));
    }

    /// The same of a relay with a newer configuration file.
    pub(crate) fn meanwhile_claims(&self, version: u64, integration: StoredIntegration) {
        let next = (Some(version), integration);
        self.state().meanwhile.push_back(next);
    }

    /// Holds the answer to the next submission back until the sender goes.
    pub(crate) fn hold(&self) -> oneshot::Sender<()> {
        let (release, held) = oneshot::channel();
        self.state().held.push_back(held);
        release
    }

    /// The next call of a name fails, behind those that were told before how they end.
    pub(crate) fn fail(&self, call: &'static str, error: OutboxError) {
        let mut state = self.state();
        state.faults.entry(call).or_default().push_back(Some(error));
    }

    /// The next call of a name does not fail.
    pub(crate) fn pass(&self, call: &'static str) {
        self.state().faults.entry(call).or_default().push_back(None);
    }

    /// Calls of a name so far.
    pub(crate) fn calls(&self, call: &'static str) -> usize {
        self.state().calls.get(call).copied().unwrap_or_default()
    }

    /// Relays hear that integrations have changed.
    pub(crate) fn notify(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, name: &'static str) -> Result<(), OutboxError> {
        let mut state = self.state();
        *state.calls.entry(name).or_default() += 1;
        let fault = state.faults.get_mut(name).and_then(VecDeque::pop_front);
        fault.flatten().map_or(Ok(()), Err)
    }

    async fn let_others_be_faster(&self) -> Result<(), OutboxError> {
        let next = self.state().meanwhile.pop_front();
        let Some((version, integration)) = next else {
            return Ok(());
        };
        if let Some(version) = version {
            self.state().claim = Some((version, [0; 16]));
        }
        self.put(integration).await
    }

    async fn put(&self, integration: StoredIntegration) -> Result<(), OutboxError> {
        let (id, etag) = (&integration.integration_id, &integration.etag);
        self.state().etags.insert(id.clone(), etag.clone());
        self.inner.put_integration(integration, None).await
    }

    fn compare(&self, id: &str, replaces: Option<&str>) -> Result<(), OutboxError> {
        let state = self.state();
        if state.etags.get(id).map(String::as_str) == replaces {
            return Ok(());
        }
        let id = IntegrationId::new(id).expect("a valid id");
        Err(OutboxError::Changed(id))
    }

    fn is_stale(&self, capture: &NewCapture) -> bool {
        let state = self.state();
        let etag = state.etags.get(capture.integration_id.name());
        etag.is_none_or(|etag| revision_number(etag) != capture.revision)
    }
}

#[async_trait]
impl Outbox for SharedDouble {
    async fn submit(&self, captures: Vec<NewCapture>) -> Result<Receipt, OutboxError> {
        self.call("submit")?;
        self.let_others_be_faster().await?;
        let stale: Vec<bool> = captures.iter().map(|one| self.is_stale(one)).collect();
        let fresh = captures.into_iter().zip(&stale);
        let fresh: Vec<_> = fresh.filter(|(_, stale)| !**stale).collect();
        let fresh: Vec<_> = fresh.into_iter().map(|(capture, _)| capture).collect();
        let submitted = match fresh.is_empty() {
            true => Vec::new(),
            false => self.inner.submit(fresh).await?.wait().await?,
        };
        let mut submitted = submitted.into_iter();
        let answers = stale.into_iter().map(|stale| match stale {
            true => Submitted::Stale,
            false => submitted.next().expect("one answer each"),
        });
        let answers: Vec<_> = answers.collect();
        let (reply, answer) = oneshot::channel();
        let held = self.state().held.pop_front();
        tokio::spawn(async move {
            if let Some(held) = held {
                let _ = held.await;
            }
            let _ = reply.send(Ok(answers));
        });
        Ok(Receipt(answer))
    }

    async fn lease(
        &self,
        lane: &LaneKey,
        budget: LeaseBudget,
        scope: LeaseScope,
    ) -> Result<Vec<LeasedCapture>, OutboxError> {
        self.inner.lease(lane, budget, scope).await
    }

    async fn settle(&self, settlement: Arc<Settlement>) -> Result<(), OutboxError> {
        self.inner.settle(settlement).await
    }

    async fn find(
        &self,
        integration_id: &IntegrationId,
        capture_id: &str,
    ) -> Result<Option<CaptureRecord>, OutboxError> {
        self.inner.find(integration_id, capture_id).await
    }

    async fn waiting_lanes(&self) -> Result<Vec<LaneKey>, OutboxError> {
        self.inner.waiting_lanes().await
    }

    async fn backlog(&self, integration_id: &IntegrationId) -> Result<Backlog, OutboxError> {
        self.inner.backlog(integration_id).await
    }

    async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: i64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, OutboxError> {
        self.inner.dead_letters(filter, after, limit).await
    }

    async fn count_dead_letters(
        &self,
        selection: Selection,
        older_than: UnixMillis,
    ) -> Result<DeadLetterCount, OutboxError> {
        self.inner.count_dead_letters(selection, older_than).await
    }

    async fn replay(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> Result<Result<Taken, Quota>, OutboxError> {
        self.call("replay")?;
        self.inner.replay(selection, now).await
    }

    async fn discard(&self, selection: Selection) -> Result<Taken, OutboxError> {
        self.call("discard")?;
        self.inner.discard(selection).await
    }

    async fn find_subject(&self, subject: SubjectQuery) -> Result<FoundSubject, OutboxError> {
        self.inner.find_subject(subject).await
    }

    async fn erase(&self, erasure: Erasure) -> Result<ErasureReceipt, OutboxError> {
        self.inner.erase(erasure).await
    }

    async fn erasure_receipts(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<ErasureReceipt>, OutboxError> {
        self.inner.erasure_receipts(before, limit).await
    }

    async fn integrations(&self) -> Result<Vec<StoredIntegration>, OutboxError> {
        self.call("integrations")?;
        self.inner.integrations().await
    }

    async fn integration(
        &self,
        id: &IntegrationId,
    ) -> Result<Option<StoredIntegration>, OutboxError> {
        let id = id.clone();

        self.call("integration")?;
        // A store answers later: concurrent readers have asked by then.
        tokio::task::yield_now().await;
        self.inner.integration(&id).await
    }

    async fn put_integration(
        &self,
        integration: StoredIntegration,
        replaces: Option<String>,
    ) -> Result<(), OutboxError> {
        self.call("put_integration")?;
        self.let_others_be_faster().await?;
        self.compare(&integration.integration_id, replaces.as_deref())?;
        self.put(integration).await
    }

    async fn delete_integration(
        &self,
        id: &IntegrationId,
        replaces: String,
    ) -> Result<(), OutboxError> {
        let id = id.clone();

        self.call("delete_integration")?;
        self.let_others_be_faster().await?;
        self.compare(id.name(), Some(&replaces))?;
        self.state().etags.remove(id.name());
        self.inner.delete_integration(&id, replaces).await
    }

    async fn last_incarnation(&self, name: &IntegrationId) -> Result<u32, OutboxError> {
        self.inner.last_incarnation(name).await
    }

    async fn claim_configuration(
        &self,
        version: u64,
        digest: [u8; 16],
    ) -> Result<Claim, OutboxError> {
        self.call("claim_configuration")?;
        let claim = &mut self.state().claim;
        match *claim {
            Some((stored, _)) if stored > version => Ok(Claim::Older { stored }),
            Some((stored, other)) if stored == version && other != digest => Ok(Claim::Conflict),
            _ => {
                *claim = Some((version, digest));
                Ok(Claim::Apply)
            }
        }
    }

    fn integration_changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.changes.subscribe())
    }

    async fn put_notice(&self, notice: Notice) -> Result<(), OutboxError> {
        self.inner.put_notice(notice).await
    }

    async fn notices(&self, limit: usize) -> Result<Vec<Notice>, OutboxError> {
        self.inner.notices(limit).await
    }

    async fn delete_notice(&self, id: &str) -> Result<(), OutboxError> {
        self.inner.delete_notice(id).await
    }

    fn signals(&self) -> &Signals {
        self.inner.signals()
    }

    async fn close(&self) {
        self.inner.close().await
    }
}
