"""(g) What traces and metrics cost: the same load on relays with and without a collector, in turns."""

import contextlib

import load
from processes import Collector, say, world

# Without an export, and with one of 1 % and of all calls.
RATIOS = {"no export": None, "1 % of the calls": 0.01, "all calls": 1}
MODES = ("unary, 256 in flight", "batches of 100, 16 in flight")


def run(tools, quick):
    rounds, seconds = (1, 2) if quick else (5, 4)
    results = {mode: {name: [] for name in RATIOS} for mode in MODES}
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(Collector(tools))
        relays = {}
        for name, ratio in RATIOS.items():
            settings = {"METRICS__LISTEN": "127.0.0.1:0"}
            if ratio is not None:
                settings |= {
                    "OTLP__ENDPOINT": f"http://{collector.address}",
                    "TRACES__SAMPLE_RATIO": ratio,
                    # None is dropped: what is measured is the cost of all of them.
                    "TRACES__MAX_QUEUED_SPANS": 1_000_000,
                }
            sandbox, relay = stack.enter_context(world(tools, settings))
            relays[name] = (relay, load.Settled(sandbox))
        for number in range(rounds):
            for mode in MODES:
                say(f"  round {number + 1} of {rounds}: {mode}")
                for name, (relay, settled) in relays.items():
                    measured = load.run(tools, relay, load.MODES[mode], seconds, settle=settled)
                    results[mode][name].append(measured)
    return {"seconds": seconds, "modes": results}
