//! `load run`: a closed loop (so many calls in flight), or an open one (so many captures
//! a second, whatever the answers).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use tonic::transport::Endpoint;

use crate::{
    call,
    plan::{Mode, RunArgs, Shared},
    record::{Record, Window},
    stream,
    template::{Numbers, Template},
};

/// How often an open loop sends what has become due.
const TICK: Duration = Duration::from_millis(1);
/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn run(args: RunArgs) -> serde_json::Value {
    assert!(args.address.ip().is_loopback(), "loopback alone");
    let url = format!("http://{}", args.address);
    let mut channels = Vec::new();
    for _ in 0..args.connections {
        let endpoint = Endpoint::from_shared(url.clone()).expect("a URL");
        channels.push(endpoint.connect().await.expect("connects"));
    }
    let template = |id: usize| {
        let id = format!("bench-{id}");
        match args.mode {
            Mode::Unary => Template::unary(id),
            Mode::Batch => Template::batch(id, args.batch),
            Mode::Stream => Template::stream(id),
        }
    };
    let path = match args.mode {
        Mode::Unary => "Capture",
        Mode::Batch => "CaptureBatch",
        Mode::Stream => "CaptureStream",
    };
    let seconds = Duration::from_secs_f64;
    let shared = Arc::new(Shared {
        channels,
        templates: (0..args.integrations).map(template).collect(),
        numbers: Numbers::new(),
        record: Record::new(Window::new(seconds(args.warm_up), seconds(args.seconds))),
        path: call::path(path),
    });
    match (args.mode, args.rate) {
        (Mode::Stream, _) => stream::run(&args, &shared).await,
        (_, None) => closed(&args, &shared).await,
        (_, Some(rate)) => open(&args, &shared, rate).await,
    }
    shared.record.to_json()
}

async fn closed(args: &RunArgs, shared: &Arc<Shared>) {
    let share = args.captures.map(|all| all / args.in_flight as u64);
    let tasks: Vec<_> = (0..args.in_flight)
        .map(|place| tokio::spawn(caller(Arc::clone(shared), place, share)))
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
}

/// Sends one call after the other until the window ends, or so many captures were answered.
async fn caller(shared: Arc<Shared>, place: usize, share: Option<u64>) {
    let mut client = call::client(shared.channel(place));
    let template = shared.template(place);
    let mut answered = 0;
    while Instant::now() < shared.record.window.to && share.is_none_or(|share| answered < share) {
        let request = template.fill(&shared.numbers);
        let start = Instant::now();
        let answer = call::unary(&mut client, shared.path.clone(), request).await;
        shared
            .record
            .ended(place, start, template.captures, &answer);
        answered += template.captures as u64;
    }
}

/// Sends at the times at which calls are due, and counts those for which there is no place.
async fn open(args: &RunArgs, shared: &Arc<Shared>, rate: f64) {
    let places = Arc::new(Semaphore::new(args.in_flight));
    let all = u32::try_from(args.in_flight).expect("fits");
    let (start, mut sent) = (Instant::now(), 0_usize);
    let gap = Duration::from_secs_f64(shared.templates[0].captures as f64 / rate);
    let mut ticks = tokio::time::interval(TICK);
    while Instant::now() < shared.record.window.to {
        ticks.tick().await;
        let now = Instant::now();
        loop {
            let due = start + gap.mul_f64(sent as f64);
            if due > now {
                break;
            }
            let place = sent;
            sent += 1;
            let Ok(permit) = Arc::clone(&places).try_acquire_owned() else {
                shared.record.unsent(shared.templates[0].captures);
                continue;
            };
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                let template = shared.template(place);
                let request = template.fill(&shared.numbers);
                let mut client = call::client(shared.channel(place));
                let answer = call::unary(&mut client, shared.path.clone(), request).await;
                shared.record.ended(place, due, template.captures, &answer);
                drop(permit);
            });
        }
    }
    // Answers that come too late are counted as accepted_ever alone.
    let _ = tokio::time::timeout(PATIENCE, places.acquire_many(all)).await;
}
