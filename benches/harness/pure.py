"""(a) The pure path: decode -> validate -> map -> serialise, on one core."""

import json
import subprocess


def run(tools, quick):
    flags = ["--quick"] if quick else []
    rates = json.loads(subprocess.run([tools.pure, *flags], stdout=subprocess.PIPE, check=True, timeout=300).stdout)
    counts = json.loads(subprocess.run([tools.allocations], stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    return {"rates": rates, "allocations": counts}
