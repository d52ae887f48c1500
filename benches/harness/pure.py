"""(a) The pure path: decode -> validate -> map -> serialise, on one core."""

import json
import subprocess


def run(tools, quick):
    flags = ["--quick"] if quick else []
    rates = json.loads(subprocess.run([tools.pure, *flags], stdout=subprocess.PIPE, check=True, timeout=300).stdout)
    counts = json.loads(subprocess.run([tools.allocations], stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    return {"rates": rates, "allocations": counts}


def event_bytes(tools):
    """Bytes of a capture's two events."""
    out = subprocess.run([tools.pure, "--quick"], stdout=subprocess.PIPE, check=True, timeout=300).stdout
    return json.loads(out)["event_bytes"]
