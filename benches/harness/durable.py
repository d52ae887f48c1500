"""(c) Durable end to end: accept, fsync, deliver, settle, against the raw limits of disk and store; latency at half load."""

import json
import re
import subprocess

import load
from processes import Bare, Failed, say, scratch, world

# Captures that share an fsync: one alone, a small group, and the relay's largest.
GROUPS = (1, 64, 512)
SUSTAINED = ("batches of 100, 16 in flight", "16 streams")


def run(tools, quick):
    minute = 5 if quick else 60
    seconds = 1 if quick else 4
    event_bytes = pure_event_bytes(tools)
    limits = raw_limits(tools, event_bytes, seconds)
    sustained = {}
    for mode in SUSTAINED:
        say(f"  sustained for {minute} s: {mode}")
        with world(tools) as (sandbox, relay):
            sustained[mode] = sustain(tools, sandbox, relay, load.MODES[mode], minute)
    half = half_load(tools, 3 if quick else 10)
    # The disk once more: it may have become slower or faster meanwhile.
    after = raw_limits(tools, event_bytes, seconds, store=False)
    return {
        "bytes_per_capture": event_bytes,
        "limits": limits,
        "disk_after": after["disk"],
        "sustained": sustained,
        "half_load": half,
    }


def pure_event_bytes(tools):
    import json

    out = subprocess.run([tools.pure, "--quick"], stdout=subprocess.PIPE, check=True, timeout=300).stdout
    return json.loads(out)["event_bytes"]


def raw_limits(tools, event_bytes, seconds, store=True):
    say("  raw limits of disk and store")
    words = ["--bytes", event_bytes, "--seconds", seconds]
    found = {"disk": [], "store": []}
    with scratch() as directory:
        words += ["--directory", directory]
        for group in GROUPS:
            found["disk"].append(tools.ask("disk", *words, "--group", group))
        if store:
            for remember in ([], ["--remember"]):
                for group in GROUPS[1:]:
                    found["store"].append(tools.ask("store", *words, "--group", group, *remember))
    if store:
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


def half_load(tools, seconds):
    """Latency of accepting one capture while half of what is possible comes in."""
    say("  latency at half load")
    words = load.MODES["unary, 256 in flight"]
    with world(tools) as (sandbox, relay):
        settled = load.Settled(sandbox)
        full = load.run(tools, relay, words, max(2, seconds / 2), settle=settled)
        rate = full["accepted_per_second"] / 2
        open_loop = ["--mode", "unary", "--in-flight", "4096", "--rate", rate]
        half = load.run(tools, relay, open_loop, seconds, settle=settled)
    # What the generator, the network and the scheduler take of it.
    with Bare(tools) as server:
        bare = load.run(tools, server, open_loop, seconds)
    return {"capacity_per_second": full["accepted_per_second"], "rate": rate, "half": half, "bare": bare}
