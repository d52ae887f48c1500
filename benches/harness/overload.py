"""(f) Overload: more is offered than can be taken. Goodput, latency of what is accepted, memory, and the time to refuse."""

import load
from processes import say, world

FACTORS = (1, 2, 5)
# Delivery allows 4 integrations 5,000 events/s each: 10,000 captures/s.
DELIVERY_CAPACITY = 10_000


def run(tools, quick):
    rounds, seconds = (1, 2) if quick else (5, 4)
    return {
        "by_machine": machine(tools, rounds, seconds, apart=False),
        # The generator's work for refused calls takes nothing from a relay that has its own CPUs.
        "by_own_cpus": machine(tools, rounds, seconds, apart=True),
        "by_delivery": delivery(tools, rounds, seconds),
    }


def machine(tools, rounds, seconds, apart):
    """The machine is the limit: batches come faster than they can be handled.

    What it can take is measured before and after each overload: it drifts, and a store that grows costs more.
    """
    # Few calls at once bound the wait of each; the default lets as many in as memory has room for.
    settings = {"SERVER__MAX_CALLS_IN_FLIGHT": 32}
    found = {str(factor): [] for factor in FACTORS}
    with world(tools, settings, apart=apart) as (sandbox, relay):
        settled = load.Settled(sandbox)

        def capacity():
            words = load.MODES["batches of 100, 16 in flight"]
            return load.run(tools, relay, words, seconds, settle=settled)["accepted_per_second"]

        before = capacity()
        for number in range(rounds):
            for factor in FACTORS:
                say(f"  round {number + 1} of {rounds}: {factor} x {before:,.0f} captures/s, limited by {'its own CPUs' if apart else 'the machine'}")
                rate = before * factor
                measured = load.run(tools, relay, open_loop(rate), seconds, settle=settled)
                after = capacity()
                measured["capacity_per_second"] = (before + after) / 2
                found[str(factor)].append({"offered_per_second": rate, **measured})
                before = after
    return {"rounds": found}


def open_loop(rate):
    return ["--mode", "batch", "--batch", "100", "--in-flight", "512", "--rate", rate]


def delivery(tools, rounds, seconds):
    """Segment is the limit: the backlog is full, and takes what delivery makes room for."""
    settings = {
        "DELIVERY__MAX_EVENTS_PER_SECOND": DELIVERY_CAPACITY * 2 // 4,
        "DELIVERY__BURST_EVENTS": 2_500,
        "OUTBOX__MAX_EVENTS": 40_000,
    }
    # What delivery takes keeps a backlog as it is: empty, or full.
    cases = [{"factor": factor, "full": full, "rounds": []} for factor, full in ((1, False), (1, True), *((factor, False) for factor in FACTORS[1:]))]
    for number in range(rounds):
        with world(tools, settings) as (sandbox, relay):
            settled = load.Settled(sandbox)
            for case in cases:
                say(f"  round {number + 1} of {rounds}: {case['factor']} x {DELIVERY_CAPACITY:,} captures/s, limited by delivery")
                if case["full"]:
                    fill = load.run(tools, relay, open_loop(DELIVERY_CAPACITY * 2), 3)
                    settled.expected += 2 * fill["accepted_ever"]
                rate = DELIVERY_CAPACITY * case["factor"]
                # The warm-up fills the backlog.
                measured = load.run(tools, relay, open_loop(rate), seconds, warm_up=4, settle=settled)
                about = {"offered_per_second": rate, "capacity_per_second": DELIVERY_CAPACITY}
                case["rounds"].append({**about, **measured})
    return {"cases": cases}
