"""What the figures are held against, each with what was measured."""

from load import against, median, of_whole
from tables import MIB, count, middle, table

UNARY = "unary, 256 in flight"
BATCHES = "batches of 100, 16 in flight"
STREAMS = "16 streams"
HEAD = ["part", "what", "target", "measured", "met"]


def render(results, others=()):
    """All of them as a table; `others` are rows of parts that were measured before."""
    rows = {part: [row for row in others if row[0] == part] for part in CHECKS}
    for part in (part for part in CHECKS if part in results):
        rows[part] = [[part, what, target, found, "yes" if met else "**no**"] for what, target, found, met in CHECKS[part](results[part])]
    return ["", *table(HEAD, [row for part in rows.values() for row in part]), ""]


def least(what, figure, target, form=count):
    return what, f"at least {form(target)}", form(figure), figure >= target


def most(what, figure, target, form=count):
    return what, f"at most {form(target)}", form(figure), figure <= target


def ratio(figure):
    return f"{figure:.2f}"


def pure(result):
    yield least("pure path, captures/s on one core", result["rates"]["relay_per_second"], 400_000)
    yield most("pure path, allocations a capture", result["allocations"]["relay"]["count"], 20)


def served(result):
    servers = result["modes"][UNARY]
    got = against(servers["relay"], servers["bare"], "accepted_per_second")
    yield least(f"{UNARY}: share of a bare tonic server's calls/s", got, 0.55, ratio)


def durable(result):
    for mode in (BATCHES, STREAMS):
        one = result["sustained"][mode]
        yield least(f"{mode}, sustained: accepted captures/s", one["accepted_per_second"], 80_000)
        yield least(f"{mode}, sustained: delivered events/s", one["delivered_events_per_second"], 160_000)
    limits = result["limits"]
    # Calls of 64 meet in commits of up to 512, so the larger group is the measure.
    for store in (one for one in limits["store"] if one["group"] == 512):
        what = "SQLite that also remembers ids" if store["remember"] else "SQLite as a plain queue"
        share = limits["outbox"]["captures_per_second"] / store["captures_per_second"]
        yield least(f"the outbox against {what}, groups of 512", share, 0.85, ratio)


def latency(result):
    p99 = middle(result["servers"]["relay"])["p99"]
    syncs = median(result["sync_ms"], "p50")
    yield most("accept p99 at half load, in median fdatasyncs of that disk", p99 / syncs, 10, ratio)
    without = result["servers"].get("relay, database in memory")
    if without:
        share = against(result["servers"]["relay"], without, "latency_ms", "p99")
        yield most("the store's tail: accept p99 at half load, of that with SQLite's files in memory", share, 1.25, ratio)


def peers(result):
    cost = "cpu_seconds_per_million_events"
    node = min(median(rounds, cost) for name, rounds in result["peers"].items() if "node" in name)
    for mode, share in ((UNARY, 5), (BATCHES, 8)):
        ours = median(result["relay"][mode], cost)
        what = f"{mode}: CPU an event, of the Node SDK's at its best"
        yield what, f"at most 1/{share}", f"1/{node / ours:.1f}", ours * share <= node


def backlog(result):
    largest = result["rows"][-1]
    what = f"{largest['events']:,} events waiting"
    peaks = ("peak_rss_filling_bytes", "rss_after_start_bytes", "peak_rss_draining_bytes")
    yield most(f"{what}: MiB of memory at the most", max(largest[peak] for peak in peaks) / MIB, 300)
    yield most(f"{what}: s from the start after SIGKILL to an accepted capture", largest["accepts_after_seconds"], 2, ratio)
    left = largest["disk_drained_bytes"] / largest["disk_filled_bytes"]
    yield most(f"{what}: share of the disk still used after the drain", left, 0.25, ratio)


def overload(result):
    for limit, what in (("by_machine", "the machine takes"), ("by_own_cpus", "its own CPUs take")):
        rounds = result[limit]["rounds"]
        for factor in list(rounds)[1:]:
            yield from overloaded(f"{factor} x what {what}", rounds[factor], "1 x", rounds["1"])
    cases = result["by_delivery"]["cases"]
    # A full backlog takes memory whatever comes; a flat one is no more than that.
    (full,) = (case["rounds"] for case in cases if case["full"])
    for case in (case for case in cases if case["factor"] > 1):
        yield from overloaded(f"{case['factor']} x what delivery takes", case["rounds"], "1 x, with a full backlog", full)


def overloaded(what, rounds, at_first, first):
    goodput = of_whole(rounds, "accepted_per_second", "capacity_per_second")
    yield least(f"{what}: goodput of capacity", goodput, 0.9, ratio)
    yield most(f"{what}: accept p99, ms", (middle(rounds) or {"p99": 1e9})["p99"], 1_000)
    yield most(f"{what}: refusal p99, ms", (middle(rounds, "refused_latency_ms") or {"p99": 0})["p99"], 100)
    yield most(f"{what}: peak memory, of that at {at_first}", against(rounds, first, "peak_rss_bytes"), 1.5, ratio)


CHECKS = {
    "pure": pure,
    "served": served,
    "durable": durable,
    "latency": latency,
    "peers": peers,
    "backlog": backlog,
    "overload": overload,
}
