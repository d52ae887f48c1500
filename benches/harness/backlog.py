"""(e) A large backlog: memory, the start after a crash, the drain, and the space given back."""

import signal
import threading
import time

import load
from processes import Failed, Relay, Sandbox, free_port, say, scratch

EVENTS = (1_000_000, 10_000_000)
QUICK_EVENTS = (100_000, 400_000)
STEPS = 20
# Longest wait for the file to shrink after the drain.
SHRINK_SECONDS = 300
# It is over when nothing has changed for so long.
QUIET_SECONDS = 45


def run(tools, quick):
    return {"rows": [one(tools, events) for events in (QUICK_EVENTS if quick else EVENTS)]}


class Sampler:
    """Memory while a backlog drains, twice a second: pairs of waiting events and resident bytes."""

    def __init__(self, relay, sandbox, events):
        self.samples, self.stopped = [], threading.Event()
        self.thread = threading.Thread(target=self.sample, args=(relay, sandbox, events), daemon=True)
        self.thread.start()

    def sample(self, relay, sandbox, events):
        while not self.stopped.wait(0.5):
            self.samples.append((events - sandbox.events(), relay.memory()))

    def stop(self):
        self.stopped.set()
        self.thread.join()
        return self.samples


def one(tools, events):
    captures = events // 2
    port = free_port()
    # Tries go on every second at least, so that the drain begins when the outage ends.
    settings = {"DELIVERY__RETRY_MAX_MS": 1_000, "OUTBOX__MAX_EVENTS": 2 * events}
    with scratch() as directory, Sandbox(tools, checks=False) as sandbox:
        sandbox.control({"status": 503})
        with Relay(tools, sandbox, directory, settings, port) as relay:
            tools.ask("setup", "--address", relay.address, "--integrations", 4)
            say(f"  {events:,} events: filling")
            row = fill(tools, relay, captures)
            relay.stop(signal.SIGKILL)
        say("  starting after SIGKILL")
        start = time.monotonic()
        with Relay(tools, sandbox, directory, settings, port) as relay:
            row["serves_after_seconds"] = relay.serves_after_seconds
            tools.ask("ready", "--address", relay.address)
            row["accepts_after_seconds"] = time.monotonic() - start
            row["rss_after_start_bytes"] = relay.memory()
            say("  draining")
            # With the one that showed that it accepts.
            row |= drain(sandbox, relay, (row["accepted"] + 1) * 2)
    say(f"  filled at {row['fill_captures_per_second']:,.0f} captures/s, drained in {row['drain_seconds']:,.0f} s")
    return {"events": events, **row}


def fill(tools, relay, captures):
    """Fills in steps, with a look at the memory after each."""
    accepted, peak, samples, seconds = 0, 0, [(0, relay.memory())], 0.0
    for _ in range(STEPS):
        words = ["--mode", "batch", "--in-flight", "16", "--captures", captures // STEPS]
        start = time.monotonic()
        result = load.run(tools, relay, words, 300, warm_up=0)
        seconds += time.monotonic() - start
        if result["refused"]:
            raise Failed(f"captures were refused: {result['refused']}")
        accepted += result["accepted_ever"]
        peak = max(peak, result["peak_rss_bytes"])
        samples.append((2 * accepted, relay.memory()))
    return {
        "accepted": accepted,
        "fill_captures_per_second": accepted / seconds,
        "rss_filled_bytes": relay.memory(),
        "peak_rss_filling_bytes": peak,
        "disk_filled_bytes": relay.disk_bytes(),
        "filling": samples,
    }


def drain(sandbox, relay, events):
    relay.reset_peak()
    sampler = Sampler(relay, sandbox, events)
    cpu = relay.cpu()
    sandbox.control(None)
    # A drain at a twentieth of the target has failed.
    took = sandbox.wait_for_events(events, timeout=60 + events / 8_000)
    used = relay.cpu() - cpu
    start = time.monotonic()
    sizes = [relay.disk_bytes()]
    while time.monotonic() - start < SHRINK_SECONDS:
        time.sleep(1)
        sizes.append(relay.disk_bytes())
        # Maintenance begins some time after the drain, and works in pieces.
        if len(sizes) > QUIET_SECONDS and len(set(sizes[-QUIET_SECONDS:])) == 1:
            break
    return {
        "drain_seconds": took,
        "drain_events_per_second": events / took,
        "drain_cpu_us_per_event": used * 1e6 / events,
        "peak_rss_draining_bytes": relay.memory("VmHWM"),
        "disk_drained_bytes": sizes[-1],
        "shrunk_after_seconds": round(time.monotonic() - start, 1),
        "draining": sampler.stop(),
    }
