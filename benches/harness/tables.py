"""Results as Markdown tables: the same on standard output and in docs/performance.md."""

import statistics

from load import against, median, of_whole

MIB = 1024 * 1024


def render(name, result):
    return "\n".join(["", *RENDERERS[name](result), ""])


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return lines


def count(figure):
    return f"{figure:,.0f}"


def ms(figure):
    return f"{figure:,.2f}" if figure < 10 else f"{figure:,.0f}"


def mib(figure):
    return f"{figure / MIB:,.0f}"


def percentiles(latency, names=("p50", "p99", "p999")):
    return " / ".join(ms(latency[name]) for name in names) if latency else "-"


def middle(rounds, of="latency_ms"):
    """The latencies of the median round, by p99."""
    found = sorted((one[of] for one in rounds if one[of]), key=lambda latency: latency["p99"])
    return found[len(found) // 2] if found else None


def pure(result):
    rates, counts = result["rates"], result["allocations"]
    relay, reference = rates["relay_per_second"], rates["reference_per_second"]
    rows = [
        ["relay: decode, validate, map, serialise", count(relay), f"{relay / reference:.2f}", allocations(counts["relay"])],
        ["typed serde: decode, serialise", count(reference), "1.00", allocations(counts["reference"])],
        ["relay: decode alone", count(rates["relay_decode_per_second"]), "", allocations(counts["relay_decode"])],
        ["prost: decode alone", count(rates["reference_decode_per_second"]), "", ""],
    ]
    lines = table(["one core", "captures/s", "ratio", "allocations (bytes) a capture"], rows)
    return [*lines, "", f"A request has {rates['request_bytes']} bytes, its two events {rates['event_bytes']}."]


def allocations(one):
    return f"{one['count']} ({one['bytes']:,})"


def served(result):
    rows = []
    for mode, servers in result["modes"].items():
        bare, relay = servers["bare"], servers["relay"]
        rates = [median(one, "accepted_per_second") for one in (bare, relay)]
        costs = [median(one, "cpu_us_per_capture") for one in (bare, relay)]
        for name, one, rate, cost in zip(("bare tonic", "relay"), (bare, relay), rates, costs, strict=True):
            rows.append(
                [
                    f"{mode}: {name}",
                    count(rate),
                    f"{against(one, bare, 'accepted_per_second'):.2f}",
                    percentiles(middle(one)),
                    f"{cost:.1f}",
                    mib(max(run["peak_rss_bytes"] for run in one)),
                    refusals(one),
                ]
            )
    head = ["", "captures/s", "ratio", "p50 / p99 / p99.9 ms", "CPU µs a capture", "peak RSS MiB", "refused"]
    return table(head, rows)


def refusals(rounds):
    return count(sum(sum(one["refused"].values()) for one in rounds))


def durable(result):
    limits = result["limits"]
    rows = [
        [
            f"{mode}, {one['seconds']:.0f} s",
            count(one["accepted_per_second"]),
            count(one["delivered_events_per_second"]),
            f"{one['delivered_after_seconds']:.1f}",
            percentiles(one["latency_ms"]),
            f"{one['cpu_us_per_capture']:.1f}",
            f"{one['sandbox_cpu_seconds'] * 1e6 / max(one['delivered_events'], 1):.1f}",
            mib(one["peak_rss_bytes"]),
        ]
        for mode, one in result["sustained"].items()
    ]
    head = ["sustained", "accepted captures/s", "delivered events/s", "all delivered s after", "p50 / p99 / p99.9 ms"]
    lines = table([*head, "CPU µs a capture", "sandbox µs an event", "peak RSS MiB"], rows)
    rows = [
        [f"file, {one['group']} a group", count(one["captures_per_second"]), percentiles(one["sync_ms"])]
        for one in limits["disk"]
    ]
    for one in limits["store"]:
        what = "queue and remembered ids" if one["remember"] else "queue alone"
        rate = count(one["captures_per_second"])
        rows.append([f"SQLite, {what}, {one['group']} a group", rate, percentiles(one["transaction_ms"])])
    rows.append(["the outbox, calls of 64, up to 512 a group", count(limits["outbox"]["captures_per_second"]), "-"])
    return [*lines, "", *table(["limit", "captures/s", "sync or transaction p50 / p99 / p99.9 ms"], rows)]


def latency(result):
    sync = median(result["sync_ms"], "p50")
    rows = []
    for name, rounds in result["servers"].items():
        still = result["stalls"].get(name)
        rows.append(
            [
                name,
                count(median(rounds, "accepted_per_second")),
                percentiles(middle(rounds)),
                f"{middle(rounds)['p99'] / sync:.0f}",
                f"{still['ms_a_second']:.1f} / {ms(still['longest_ms'])}" if still else "-",
            ]
        )
    head = ["half load", "calls/s", "p50 / p99 / p99.9 ms", "p99 in fdatasyncs", "machine still: ms a second / longest ms"]
    lines = table(head, rows)
    lines += ["", f"An fdatasync of one capture's bytes takes {ms(sync)} ms (p50; p99 {ms(median(result['sync_ms'], 'p99'))} ms)."]
    for what, threads in (result["waits"] or {}).items():
        rows = [[name, count(one["turns"]), *(ms(one[at]) for at in ("p50", "p99", "p999", "max"))] for name, one in sorted(threads.items())]
        lines += ["", *table([f"half load, waits for {what}", "times", "p50 ms", "p99 ms", "p99.9 ms", "longest ms"], rows)]
    return lines


def peers(result):
    rows = []
    groups = [(name, rounds) for name, rounds in result["peers"].items()]
    groups += [(f"segment-relay, {mode}", rounds) for mode, rounds in result["relay"].items()]
    for name, rounds in groups:
        cost = median(rounds, "cpu_seconds_per_million_events")
        peak = statistics.median(one["peak_rss_bytes"] for one in rounds)
        rows.append([name, count(median(rounds, "events_per_second")), f"{cost:.1f}", mib(peak)])
    head = ["", "events/s", "CPU s a million events", "peak RSS MiB"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [*table(head, rows), "", f"{versions}. The SDKs have no network hop before them and no disk behind them."]


def backlog(result):
    rows = [
        [
            count(one["events"]),
            count(one["fill_captures_per_second"]),
            f"{mib(one['rss_filled_bytes'])} / {mib(one['peak_rss_filling_bytes'])}",
            f"{one['serves_after_seconds']:.2f} / {one['accepts_after_seconds']:.2f}",
            f"{one['drain_seconds']:.0f} ({count(one['drain_events_per_second'])})",
            mib(one["peak_rss_draining_bytes"]),
            f"{mib(one['disk_filled_bytes'])} / {mib(one['disk_drained_bytes'])}",
        ]
        for one in result["rows"]
    ]
    head = ["waiting events", "fill captures/s", "RSS MiB now / peak", "s after SIGKILL to serve / accept"]
    return table([*head, "drain s (events/s)", "peak RSS MiB draining", "disk MiB full / drained"], rows)


def overload(result):
    shared, own, delivery = (result[limit] for limit in ("by_machine", "by_own_cpus", "by_delivery"))
    lines = []
    for limit, groups in (
        ("the machine", [(f"{factor} x", rounds) for factor, rounds in shared["rounds"].items()]),
        ("its own CPUs", [(f"{factor} x", rounds) for factor, rounds in own["rounds"].items()]),
        ("delivery", [(f"{case['factor']} x" + (", full backlog" if case["full"] else ""), case["rounds"]) for case in delivery["cases"]]),
    ):
        head = [f"limited by {limit}", "offered captures/s", "accepted/s", "of capacity", "accepted p50 / p99 / p99.9 ms"]
        head += ["refused ms", "refused/s", "unsent/s", "cores: relay / generator", "peak RSS MiB"]
        lines += [*table(head, [overloaded(name, rounds) for name, rounds in groups]), ""]
    return lines[:-1]


def overloaded(name, rounds):
    return [
        name,
        count(median(rounds, "offered_per_second")),
        count(median(rounds, "accepted_per_second")),
        f"{of_whole(rounds, 'accepted_per_second', 'capacity_per_second'):.2f}",
        percentiles(middle(rounds)),
        percentiles(middle(rounds, "refused_latency_ms")),
        count(statistics.median(sum(one["refused"].values()) / one["seconds"] for one in rounds)),
        count(statistics.median(one["unsent"] / one["seconds"] for one in rounds)),
        " / ".join(f"{of_whole(rounds, used, 'whole_seconds'):.2f}" for used in ("cpu_seconds", "generator_cpu_seconds")),
        mib(median(rounds, "peak_rss_bytes")),
    ]


def tracing(result):
    rows = []
    for mode, settings in result["modes"].items():
        without = settings["no export"]
        for name, rounds in settings.items():
            # Pair by pair, since the machine's speed drifts.
            pairs = list(zip(rounds, without, strict=True))
            rates = [one["accepted_per_second"] / other["accepted_per_second"] for one, other in pairs]
            costs = [one["cpu_us_per_capture"] / other["cpu_us_per_capture"] for one, other in pairs]
            rows.append(
                [
                    f"{mode}: {name}",
                    count(median(rounds, "accepted_per_second")),
                    f"{statistics.median(rates):.2f}",
                    f"{median(rounds, 'cpu_us_per_capture'):.1f}",
                    f"{statistics.median(costs):.2f}",
                    percentiles(middle(rounds)),
                    mib(max(one["peak_rss_bytes"] for one in rounds)),
                ]
            )
    head = ["", "captures/s", "ratio", "CPU µs a capture", "ratio", "p50 / p99 / p99.9 ms", "peak RSS MiB"]
    return table(head, rows)


def profile(result):
    lines = []
    for mode, servers in result["modes"].items():
        bare, relay = kinds_of(servers["bare"]), kinds_of(servers["relay"])
        threads = servers["relay"]["threads"]
        totals = {thread: sum(kinds.values()) for thread, kinds in threads.items()}
        # Threads that do next to nothing are left out.
        columns = [thread for thread in sorted(totals, key=totals.get, reverse=True) if totals[thread] >= 1]
        scale = servers["relay"]["cpu_us_per_capture"] / 100
        rows = [["all", f"{sum(bare.values()):.1f}", f"{sum(relay.values()):.1f}", *(f"{totals[one] * scale:.1f}" for one in columns)]]
        for kind in sorted(relay, key=relay.get, reverse=True):
            own = (f"{threads[one].get(kind, 0) * scale:.1f}" for one in columns)
            rows.append([kind, f"{bare.get(kind, 0):.1f}", f"{relay[kind]:.1f}", *own])
        lines += [*table([f"CPU µs a capture: {mode}", "bare tonic", "relay", *columns], rows), ""]
    return lines[:-1]


def kinds_of(server):
    """CPU µs a capture of each kind of work, over all threads."""
    sums = {}
    for kinds in server["threads"].values():
        for kind, share in kinds.items():
            sums[kind] = sums.get(kind, 0) + share * server["cpu_us_per_capture"] / 100
    return sums


RENDERERS = {
    "profile": profile,
    "pure": pure,
    "served": served,
    "durable": durable,
    "latency": latency,
    "peers": peers,
    "backlog": backlog,
    "overload": overload,
    "tracing": tracing,
}
