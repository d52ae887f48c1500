"""plots.py RESULTS DIRECTORY: draws the plots of docs/performance.md as small SVGs."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
# Text stays text, and the same results give the same bytes.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "segment-relay", "font.size": 9, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}

from matplotlib import pyplot  # noqa: E402

MIB = 1024 * 1024


def main():
    results = json.loads(pathlib.Path(sys.argv[1]).read_text())
    directory = pathlib.Path(sys.argv[2])
    for name, part, draw in (
        ("throughput", "served", throughput),
        ("latency", "served", latency),
        ("backlog", "backlog", backlog),
        ("peers", "peers", peers),
    ):
        if part in results:
            figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
            draw(axes, results[part])
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
    if "profile" in results:
        flames(directory / "flames.svg", results["profile"]["stacks"])


def throughput(axes, served):
    calls = [one["in_flight"] for one in served["sweep"]]
    for server, label in (("bare", "bare tonic server"), ("relay", "relay, durable and delivering")):
        rates = [one[server]["accepted_per_second"] for one in served["sweep"]]
        axes.plot(calls, rates, marker="o", markersize=4, label=label)
    axes.set(xscale="log", xlabel="unary calls in flight", ylabel="calls/s", ylim=(0, None))
    axes.set_xticks(calls, [str(one) for one in calls])
    axes.minorticks_off()
    axes.legend()


def latency(axes, served):
    for mode in ("unary, 64 in flight", "unary, 256 in flight"):
        for server, style in (("bare", "--"), ("relay", "-")):
            rounds = sorted(served["modes"][mode][server], key=lambda one: one["latency_ms"]["p99"])
            curve = rounds[len(rounds) // 2]["latency_ms"]["curve"]
            # 1 / (1 - share): each nine is as far from the next.
            axes.plot([1 / (1 - share) for share, _ in curve], [ms for _, ms in curve], style, label=f"{server}, {mode}")
    axes.set(xscale="log", yscale="log", xlabel="percentile", ylabel="ms")
    shares = (0.5, 0.9, 0.99, 0.999, 0.9999)
    axes.set_xticks([1 / (1 - share) for share in shares], [f"{share * 100:g}" for share in shares])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def backlog(axes, result):
    row = result["rows"][-1]
    for phase in ("filling", "draining"):
        thin = row[phase][:: max(1, len(row[phase]) // 60)]
        axes.plot([waiting / 1e6 for waiting, _ in thin], [rss / MIB for _, rss in thin], label=phase)
    axes.axhline(300, color="grey", linestyle=":", label="target")
    axes.set(xlabel="million events waiting", ylabel="resident MiB", ylim=(0, None))
    axes.legend()


def peers(axes, result):
    groups = {**result["peers"], **{f"segment-relay, {mode}": rounds for mode, rounds in result["relay"].items()}}
    names = list(groups)
    costs = [sorted(one["cpu_seconds_per_million_events"] for one in rounds)[len(rounds) // 2] for rounds in groups.values()]
    bars = axes.barh(names, costs, color=["tab:grey"] * len(result["peers"]) + ["tab:blue"] * len(result["relay"]))
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="CPU seconds for a million events")
    axes.grid(axis="y", visible=False)


def flames(path, tree):
    """A flame graph: callers stand below what they call, and are as wide as the CPU time spent in both."""
    figure, axes = pyplot.subplots(figsize=(12, 6.5), layout="constrained")
    colours = matplotlib.colormaps["YlOrRd"]
    total = tree[1]

    def draw(node, left, depth):
        name, count, children = node
        width = count / total
        # The colour only tells neighbours apart: the same name has the same one everywhere.
        colour = colours(0.15 + 0.45 * (sum(name.encode()) % 16) / 16)
        axes.broken_barh([(left, width)], (depth, 0.95), facecolors=[colour], edgecolors="white", linewidth=0.3)
        room = int(width * 200)
        if room >= 4:
            axes.text(left + 0.001, depth + 0.45, name[:room], fontsize=6, va="center", clip_on=True)
        for child in children:
            draw(child, left, depth + 1)
            left += child[1] / total

    draw(tree, 0.0, 0)
    axes.set(xlim=(0, 1), xticks=[], yticks=[], title="unary, 256 in flight: the relay's CPU time")
    axes.set_frame_on(False)
    axes.grid(visible=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


main()
