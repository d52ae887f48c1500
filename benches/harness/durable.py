"""(c) Durable end to end: accept, fsync, deliver, settle, against the raw limits of disk and store."""

import re
import subprocess

import load
import pure
from processes import Failed, say, scratch, world

# Captures that share an fsync: one alone, a small group, and the relay's largest.
GROUPS = (1, 64, 512)
SUSTAINED = ("batches of 100, 16 in flight", "16 streams")


def run(tools, quick):
    minute = 5 if quick else 60
    seconds = 1 if quick else 4
    event_bytes = pure.event_bytes(tools)
    limits = raw_limits(tools, event_bytes, seconds)
    sustained = {}
    for mode in SUSTAINED:
        say(f"  sustained for {minute} s: {mode}")
        with world(tools) as (sandbox, relay):
            sustained[mode] = sustain(tools, sandbox, relay, load.MODES[mode], minute)
    return {"bytes_per_capture": event_bytes, "limits": limits, "sustained": sustained}


def raw_limits(tools, event_bytes, seconds):
    say("  raw limits of disk and store")
    words = ["--bytes", event_bytes, "--seconds", seconds]
    found = {"disk": [], "store": []}
    with scratch() as directory:
        words += ["--directory", directory]
        for group in GROUPS:
            found["disk"].append(tools.ask("disk", *words, "--group", group))
        for remember in ([], ["--remember"]):
            for group in GROUPS[1:]:
                found["store"].append(tools.ask("store", *words, "--group", group, *remember))
    found["outbox"] = outbox(tools, 50_000 * seconds)
    return found


def outbox(tools, captures):
    """The outbox alone, without gRPC and delivery: submit, lease and settle. Calls of 64, up to 17 of them waiting."""
    with scratch() as directory:
        command = [tools.outbox, str(captures), "64", "4096", str(directory)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout
    found = re.search(r"accepted and settled in [\d.]+ s: (\d+) captures/s", out)
    if found is None:
        raise Failed(f"the outbox benchmark said:\n{out}")
    return {"captures": captures, "captures_per_second": int(found[1])}


def sustain(tools, sandbox, relay, words, seconds):
    settled = load.Settled(sandbox)
    before = sandbox.events()
    sandbox_cpu = sandbox.cpu()
    measured = load.run(tools, relay, words, seconds, warm_up=0, settle=settled)
    # Everything was delivered `took` after the last answer: no backlog was built up if that is short.
    took = settled.took_seconds
    measured["delivered_events"] = sandbox.events() - before
    measured["delivered_after_seconds"] = took
    measured["delivered_events_per_second"] = measured["delivered_events"] / (seconds + took)
    measured["sandbox_cpu_seconds"] = sandbox.cpu() - sandbox_cpu
    measured["disk_bytes_after"] = relay.disk_bytes()
    return measured
