"""(a) The pure path: decode -> validate -> map -> serialise, on one core."""

import json
import subprocess


def rates(tools, *flags):
    """What the pure path and its reference do just now."""
    out = subprocess.run([tools.pure, *flags], stdout=subprocess.PIPE, check=True, timeout=300).stdout
    return json.loads(out)


def run(tools, quick):
    flags = ["--quick"] if quick else []
    counts = json.loads(subprocess.run([tools.allocations], stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    return {"rates": rates(tools, *flags), "allocations": counts}


def event_bytes(tools):
    """Bytes of a capture's two events."""
    return rates(tools, "--quick")["event_bytes"]
