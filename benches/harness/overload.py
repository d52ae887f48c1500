"""(f) Overload: more is offered than can be taken. Goodput, latency of what is accepted, memory, and the time to refuse."""

import load
from processes import say, world

FACTORS = (1, 2, 5)
# Delivery allows 4 integrations 5,000 events/s each: 10,000 captures/s.
DELIVERY_CAPACITY = 10_000


def run(tools, quick):
    seconds = 3 if quick else 8
    return {"by_machine": machine(tools, seconds), "by_delivery": delivery(tools, seconds)}


def machine(tools, seconds):
    """The machine is the limit: batches come faster than they can be handled."""
    # Few calls at once bound the wait of each; the default lets as many in as memory has room for.
    settings = {"SERVER__MAX_CALLS_IN_FLIGHT": 32}
    rows = []
    with world(tools, settings) as (sandbox, relay):
        settled = load.Settled(sandbox)
        words = load.MODES["batches of 100, 16 in flight"]
        capacity = load.run(tools, relay, words, seconds, settle=settled)["accepted_per_second"]
        for factor in FACTORS:
            say(f"  {factor} x {capacity:,.0f} captures/s, limited by the machine")
            rate = capacity * factor
            measured = load.run(tools, relay, open_loop(rate), seconds, settle=settled)
            rows.append({"factor": factor, "offered_per_second": rate, **measured})
    return {"capacity_per_second": capacity, "rows": rows}


def open_loop(rate):
    return ["--mode", "batch", "--batch", "100", "--in-flight", "512", "--rate", rate]


def delivery(tools, seconds):
    """Segment is the limit: the backlog is full, and takes what delivery makes room for."""
    settings = {
        "DELIVERY__MAX_EVENTS_PER_SECOND": DELIVERY_CAPACITY * 2 // 4,
        "DELIVERY__BURST_EVENTS": 2_500,
        "OUTBOX__MAX_EVENTS": 40_000,
    }
    rows = []
    with world(tools, settings) as (sandbox, relay):
        settled = load.Settled(sandbox)
        # What delivery takes keeps a backlog as it is: empty, or full.
        for factor, full in ((1, False), (1, True), *((factor, False) for factor in FACTORS[1:])):
            say(f"  {factor} x {DELIVERY_CAPACITY:,} captures/s, limited by delivery")
            if full:
                fill = load.run(tools, relay, open_loop(DELIVERY_CAPACITY * 2), 3)
                settled.expected += 2 * fill["accepted_ever"]
            rate = DELIVERY_CAPACITY * factor
            # The warm-up fills the backlog.
            measured = load.run(tools, relay, open_loop(rate), seconds, warm_up=4, settle=settled)
            rows.append({"factor": factor, "full": full, "offered_per_second": rate, **measured})
    return {"capacity_per_second": DELIVERY_CAPACITY, "rows": rows}
