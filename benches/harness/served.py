"""(b) The served path, durable and delivering, against a bare tonic server in the same run."""

import load
from processes import Bare, say, world


def run(tools, quick):
    rounds, seconds = (1, 2) if quick else (3, 5)
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
    return {"seconds": seconds, "modes": results}
