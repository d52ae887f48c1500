//! The process itself, where the system has `/proc`.

use std::{fs, time::Instant};

use opentelemetry::metrics::Meter;

/// Linux tells computing time in hundredths of a second, on every machine.
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) fn observe(meter: &Meter) {
    let started = Instant::now();
    meter
        .f64_observable_gauge("process.uptime")
        .with_unit("s")
        .with_description("Since the start of the process")
        .with_callback(move |gauge| gauge.observe(started.elapsed().as_secs_f64(), &[]))
        .build();
    meter
        .i64_observable_up_down_counter("process.memory.usage")
        .with_unit("By")
        .with_description("Memory that is resident")
        .with_callback(|counter| {
            if let Some(kib) = resident_kib() {
                counter.observe(kib.saturating_mul(1_024), &[]);
            }
        })
        .build();
    meter
        .i64_observable_up_down_counter("process.unix.file_descriptor.count")
        .with_unit("{file_descriptor}")
        .with_description("Files and connections that are open")
        .with_callback(|counter| {
            if let Ok(open) = fs::read_dir("/proc/self/fd") {
                counter.observe(i64::try_from(open.count()).unwrap_or(i64::MAX), &[]);
            }
        })
        .build();
    meter
        .f64_observable_counter("process.cpu.time")
        .with_unit("s")
        .with_description("Computing time that was used")
        .with_callback(|counter| {
            if let Some(ticks) = cpu_ticks() {
                counter.observe(f64::from(ticks) / TICKS_PER_SECOND, &[]);
            }
        })
        .build();
}

fn resident_kib() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// In user and in kernel mode, of all threads (proc(5), fields 14 and 15).
fn cpu_ticks() -> Option<u32> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in brackets that may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let kernel: u32 = fields.next()?.parse().ok()?;
    user.checked_add(kernel)
}
