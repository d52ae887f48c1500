"""One run of the load generator against a server, with what both used meanwhile."""

import resource
import statistics
import time

MODES = {
    "unary, 64 in flight": ["--mode", "unary", "--in-flight", "64"],
    "unary, 256 in flight": ["--mode", "unary", "--in-flight", "256"],
    "batches of 100, 16 in flight": ["--mode", "batch", "--batch", "100", "--in-flight", "16"],
    "16 streams": ["--mode", "stream", "--in-flight", "16", "--window", "256"],
}


def run(tools, server, words, seconds, warm_up=1, settle=None):
    """Loads a server. `settle` waits until accepted captures are delivered: that work is the server's too."""
    server.reset_peak()
    cpu, others, begun = server.cpu(), ended_children(), time.monotonic()
    words = ["run", "--address", server.address, *words, "--seconds", seconds, "--warm-up", warm_up]
    result = tools.ask(*words, timeout=seconds + warm_up + 120)
    result["generator_cpu_seconds"] = ended_children() - others
    if settle is not None:
        settle(result["accepted_ever"])
    used = server.cpu() - cpu
    result["cpu_seconds"] = used
    result["cpu_us_per_capture"] = used * 1e6 / max(result["accepted_ever"], 1)
    result["whole_seconds"] = time.monotonic() - begun
    result["peak_rss_bytes"] = server.memory("VmHWM")
    return result


def ended_children():
    """CPU seconds of processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Settled:
    """Waits until a sandbox has both events of everything that was accepted, or says how many are missing."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        self.expected = sandbox.events()
        self.took_seconds = 0.0

    def __call__(self, accepted):
        self.expected += 2 * accepted
        self.took_seconds = self.sandbox.wait_for_events(self.expected)


def median(rounds, *path):
    """The median over rounds of a figure below `path`."""
    figures = []
    for figure in rounds:
        for key in path:
            figure = figure[key]
        figures.append(figure)
    return statistics.median(figures)


def against(rounds, others, *path):
    """The median over rounds of a figure against that of the other server in the same round: the machine's speed drifts."""
    pairs = zip(rounds, others, strict=True)
    return statistics.median(median([one], *path) / median([other], *path) for one, other in pairs)


def of_whole(rounds, figure, whole):
    """The median over rounds of a figure's share of another one of the same round."""
    return statistics.median(one[figure] / one[whole] for one in rounds)
