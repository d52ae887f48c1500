"""How long threads that could run waited for a CPU, from the kernel's scheduler. Needs `perf` and root."""

import collections
import re
import subprocess

from processes import Failed, scratch

# `perf sched timehist`: time, CPU, task[tid/pid] or task[pid], wait, delay, run; the last three in ms.
LINE = re.compile(r"^\s*[\d.]+ \[\d+\]\s+(.+?)\[(\d+)(?:/(\d+))?\]\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)")


def waits(processes, drive, seconds):
    """Records while `drive` loads the `processes` (names to ids); percentiles in ms by name and thread.

    Whatever else runs meanwhile, the load generator above all, is "others".
    """
    with scratch() as directory:
        data = str(directory / "perf.data")
        command = ["perf", "sched", "record", "-o", data, "--", "sleep", str(seconds)]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        drive()
        if recorder.wait(120):
            raise Failed("perf sched failed: it needs root")
        command = ["perf", "sched", "-i", data, "timehist"]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    names = {pid: name for name, pid in processes.items()}
    delays = collections.defaultdict(list)
    for line in out.splitlines():
        if found := LINE.match(line):
            thread, tid, pid, _, delay, _ = found.groups()
            name = names.get(int(pid or tid))
            delays[f"{name}: {thread.strip()}" if name else "others"].append(float(delay))
    if not delays:
        raise Failed("perf sched saw no thread")
    return {name: percentiles(sorted(one)) for name, one in delays.items() if len(one) >= 100}


def percentiles(ordered):
    at = lambda share: ordered[min(len(ordered) - 1, int(len(ordered) * share))]
    return {"turns": len(ordered), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": ordered[-1]}
