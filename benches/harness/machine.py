"""What the figures were measured on."""

import os
import pathlib
import platform
import subprocess
import time

import pure

# A machine whose speed changes by more than this meanwhile is not the same one any more.
DRIFT = 0.15


def speed(tools):
    """Captures a second that the pure path's reference does just now: how fast the machine is at this moment."""
    return pure.rates(tools, "--quick")["reference_per_second"]


def drifted(speeds):
    """What to say of a machine that was faster or slower at the end than at the beginning; None where it was not."""
    before, after = speeds
    if abs(after / before - 1) <= DRIFT:
        return None
    return (
        f"the machine's speed changed meanwhile: the reference did {before:,.0f} captures/s before, {after:,.0f} after. "
        "Absolute figures of this part say little; run it again on a quieter machine."
    )


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
