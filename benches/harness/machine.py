"""What the figures were measured on."""

import os
import pathlib
import platform
import subprocess
import time


def describe():
    cpu = ""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, check=False)
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=False)
    return {
        "cores": os.cpu_count(),
        "cpu": cpu,
        "kernel": platform.release(),
        "rustc": " ".join(rustc.stdout.split()[:2]),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        # Work of others on the machine: about 0 where there was none.
        "load_before": round(os.getloadavg()[2], 2),
    }
