"""How long the machine stands still: a thread on each CPU that goes before all others and only looks at the clock.

stalls.py SECONDS CPU: prints by how many ms each turn that was late by more than half of one came too late.
"""

import json
import os
import subprocess
import sys
import time

# Between two looks at the clock.
STEP_SECONDS = 0.0005
LATE_SECONDS = 0.0005
PRIORITY = 50


def watch(drive, seconds):
    """Watches all CPUs while `drive` runs; returns ms a second on the worse one and the longest, or nothing without root."""
    if os.geteuid() != 0:
        drive()
        return None
    command = [sys.executable, __file__, str(seconds)]
    watchers = [subprocess.Popen([*command, str(cpu)], stdout=subprocess.PIPE) for cpu in sorted(os.sched_getaffinity(0))]
    measured = drive()
    late = [json.loads(watcher.communicate()[0]) for watcher in watchers]
    return {
        "ms_a_second": max(sum(one) for one in late) / seconds,
        "longest_ms": max(max(one, default=0) for one in late),
        "latency_ms": measured["latency_ms"],
    }


def main():
    seconds, cpu = float(sys.argv[1]), int(sys.argv[2])
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    late, end = [], time.monotonic() + seconds
    while (begun := time.monotonic()) < end:
        time.sleep(STEP_SECONDS)
        by = time.monotonic() - begun - STEP_SECONDS
        if by > LATE_SECONDS:
            late.append(round(by * 1e3, 2))
    print(json.dumps(late))


if __name__ == "__main__":
    main()
