//! CaptureStream: so many streams, each with a window of captures that wait for their answer.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;
use tonic::Request;

use crate::{
    call::{self, Answer, Answers, RawCodec, StreamAnswer},
    plan::{RunArgs, Shared},
};

/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn run(args: &RunArgs, shared: &Arc<Shared>) {
    let share = args.captures.map(|all| all / args.in_flight as u64);
    let share = share.unwrap_or(u64::MAX);
    let tasks: Vec<_> = (0..args.in_flight)
        .map(|place| tokio::spawn(one(Arc::clone(shared), place, args.window, share)))
        .collect();
    for task in tasks {
        let _ = tokio::time::timeout_at((shared.record.window.to + PATIENCE).into(), task).await;
    }
}

/// One stream: a free slot is a capture that may be sent; its answer frees it.
async fn one(shared: Arc<Shared>, place: usize, window: usize, share: u64) {
    let starts = Arc::new(Mutex::new(vec![Instant::now(); window]));
    let (free, slots) = mpsc::channel(window);
    for slot in 0..window {
        free.try_send(slot).expect("room for all");
    }
    let requests = requests(
        Arc::clone(&shared),
        place,
        Arc::clone(&starts),
        slots,
        share,
    );
    let mut client = call::client(shared.channel(place));
    client.ready().await.expect("a connection");
    let codec = RawCodec::<StreamAnswer>::default();
    let request = Request::new(requests);
    let answers = client.streaming(request, call::path("CaptureStream"), codec);
    let mut answers = match answers.await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return shared.record.ended(place, Instant::now(), 1, &Err(status)),
    };
    loop {
        let answer = match answers.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return,
            Err(status) => return shared.record.ended(place, Instant::now(), 1, &Err(status)),
        };
        let slot: usize = answer.correlation_id.parse().expect("a slot");
        let start = starts.lock().expect("sound")[slot];
        let results: Vec<Answer> = answer.result.into_iter().collect();
        let answer = Ok(Answers { results });
        shared.record.ended(place, start, 1, &answer);
        // The sender has gone once the window is over.
        let _ = free.try_send(slot);
    }
}

/// The requests of a stream, made when there is a slot for them.
fn requests(
    shared: Arc<Shared>,
    place: usize,
    starts: Arc<Mutex<Vec<Instant>>>,
    slots: mpsc::Receiver<usize>,
    share: u64,
) -> impl stream::Stream<Item = Bytes> + Send + 'static {
    stream::unfold((slots, 0), move |(mut slots, sent)| {
        let (shared, starts) = (Arc::clone(&shared), Arc::clone(&starts));
        async move {
            let slot = slots.recv().await?;
            let now = Instant::now();
            if now >= shared.record.window.to || sent >= share {
                return None;
            }
            starts.lock().expect("sound")[slot] = now;
            let request = shared.template(place).fill_slot(&shared.numbers, slot);
            Some((request, (slots, sent + 1)))
        }
    })
}
