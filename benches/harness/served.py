"""(b) The served path, durable and delivering, against a bare tonic server in the same run."""

import load
from processes import Bare, say, world

CONCURRENCY = (1, 4, 16, 64, 256, 1024)


def run(tools, quick):
    rounds, seconds = (1, 2) if quick else (9, 4)
    sweep_seconds = 1 if quick else 2
    results = {mode: {"bare": [], "relay": []} for mode in load.MODES}
    with Bare(tools) as bare, world(tools) as (sandbox, relay):
        settled = load.Settled(sandbox)
        for number in range(rounds):
            for mode, words in load.MODES.items():
                say(f"  round {number + 1} of {rounds}: {mode}")
                results[mode]["bare"].append(load.run(tools, bare, words, seconds))
                measured = load.run(tools, relay, words, seconds, settle=settled)
                measured["delivered_after_seconds"] = settled.took_seconds
                results[mode]["relay"].append(measured)
        say("  unary over concurrency")
        sweep = []
        for calls in CONCURRENCY:
            words = ["--mode", "unary", "--in-flight", calls]
            of_bare = load.run(tools, bare, words, sweep_seconds, warm_up=0.5)
            of_relay = load.run(tools, relay, words, sweep_seconds, warm_up=0.5, settle=settled)
            sweep.append({"in_flight": calls, "bare": of_bare, "relay": of_relay})
    return {"seconds": seconds, "modes": results, "sweep": sweep}
