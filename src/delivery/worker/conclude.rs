//! What an answer says of the endpoint and of the source.

use super::{Sent, Worker};
use crate::{
    delivery::{
        Condition,
        breaker::{Admission, Sign},
        classify::classify,
    },
    notice::{Happening, Notice},
    outbox::{LaneKey, SHARDS},
    segment::Answer,
    time::UnixMillis,
};

impl Worker {
    pub(super) fn note(&self, admission: &Admission<'_>, answer: &Answer) {
        let id = &self.key.integration_id;
        self.parts.vitals.note(id, answer);
        let changed = admission.note(id, Sign::of(classify(answer)));
        if let Some(answers) = changed {
            self.parts.metrics.breaker(self.key.region, !answers);
        }
        match changed {
            Some(true) => tracing::info!(region = %self.key.region, "the endpoint answers again"),
            Some(false) => tracing::error!(
                region = %self.key.region,
                "the endpoint does not answer; it is tried with one request at a time"
            ),
            None => {}
        }
    }

    /// Notes what a request says of the source, once it is durable: other lanes go by it,
    /// and people are told when the source stops working, or works again.
    pub(super) async fn conclude(&self, sent: &Sent) {
        let (now, set_aside) = (UnixMillis::now(), self.lane.set_aside());
        let sources = &self.parts.sources;
        let change = sources.note(&self.key, sent.request, sent.finding, set_aside, now);
        if change.recovered {
            let lanes = (0..SHARDS).map(|shard| LaneKey {
                shard,
                ..self.key.clone()
            });
            self.parts.outbox.signals().wake_lanes(lanes);
        }
        if let Some(condition) = change.condition {
            self.tell(condition, Some(&sent.answer)).await;
        }
    }

    pub(super) async fn tell(&self, condition: Condition, answer: Option<&Answer>) {
        let (id, region) = (&self.key.integration_id, self.key.region);
        let now = UnixMillis::now();
        let happening = match condition {
            Condition::Healthy => Happening::Healthy,
            Condition::Parked => Happening::Parked,
            Condition::Suspended => Happening::Suspended,
            Condition::Broken => Happening::Broken,
        };
        tracing::warn!(integration = %id, %region, ?condition, "the source's condition has changed");
        let facts = [
            ("data_region", region.to_string().into()),
            ("http_status", answer.map_or(0, Answer::http_status).into()),
            (
                "error",
                answer.map(Answer::error).unwrap_or_default().into(),
            ),
        ];
        let notice = Notice::new(happening, id, &facts, now);
        self.parts.notices.tell(notice).await;
    }
}
