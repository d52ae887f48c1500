"""How long threads waited for a CPU and for the disk, as the kernel saw it. Needs `perf` and root."""

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


# `perf trace`: time, (duration), thread/tid, call; in two lines where others' calls came between.
SYNC = re.compile(r"^\s*[\d.]+ \(\s*([\d.]+) ms\): (.+?)/\d+\s+(?:\.\.\. \[continued\]: )?(f(?:data)?sync)\(")


def syncs(pid, drive, seconds):
    """Records the syncs of a process while `drive` loads it; percentiles in ms by thread and call."""
    with scratch() as directory:
        out = directory / "trace"
        command = ["perf", "trace", "-p", str(pid), "-e", "fdatasync,fsync", "-o", str(out), "--", "sleep", str(seconds)]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        drive()
        if recorder.wait(120):
            raise Failed("perf trace failed: it needs root")
        lines = out.read_text().splitlines()
    taken = collections.defaultdict(list)
    for line in lines:
        if found := SYNC.match(line):
            duration, thread, call = found.groups()
            taken[f"relay: {thread.strip()}, {call}"].append(float(duration))
    return {name: percentiles(sorted(one)) for name, one in taken.items()}


def percentiles(ordered):
    at = lambda share: ordered[min(len(ordered) - 1, int(len(ordered) * share))]
    return {"turns": len(ordered), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": ordered[-1]}
