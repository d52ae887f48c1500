"""(d) What people use instead: Segment's own SDKs, sending the same pairs to the same sandbox.

Neither has a network hop before it or a disk behind it. The events are counted at the sandbox: callbacks come late.
"""

import json
import pathlib
import subprocess
import sys
import time

import load
from processes import BENCH, Failed, Process, Sandbox, say, world

SOURCES = pathlib.Path(__file__).resolve().parents[1] / "peers"


def run(tools, quick):
    pairs = 10_000 if quick else 50_000
    rounds = 1 if quick else 3
    node, python = install()
    # As they come, and with the largest requests that they take.
    commands = {
        "@segment/analytics-node, 15 events a request (its default)": [*node, "15"],
        "@segment/analytics-node, 500 events a request": [*node, "500"],
        "segment-analytics-python, 100 events a request (its default)": [*python, "100"],
        "segment-analytics-python, 400 events a request": [*python, "400"],
    }
    rows = {name: [] for name in commands}
    modes = {name: words for name, words in load.MODES.items() if name != "unary, 64 in flight"}
    relay_rows = {name: [] for name in modes}
    for number in range(rounds):
        for name, command in commands.items():
            say(f"  round {number + 1} of {rounds}: {name}")
            with Sandbox(tools) as sandbox:
                rows[name].append(peer(sandbox, command, pairs))
        for name, words in modes.items():
            say(f"  round {number + 1} of {rounds}: segment-relay, {name}")
            with world(tools, checks=True) as (sandbox, relay):
                relay_rows[name].append(ours(tools, sandbox, relay, words, pairs))
    return {"pairs": pairs, "versions": versions(), "peers": rows, "relay": relay_rows}


def install():
    """Installs both below target/ and returns the commands."""
    npm = BENCH / "npm"
    npm.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "node.mjs"):
        source, copy = SOURCES / name, npm / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.write_bytes(source.read_bytes())
    subprocess.run(["npm", "ci", "--silent", "--no-fund", "--no-audit"], cwd=npm, check=True)
    python = venv(SOURCES / "requirements.txt", BENCH / "python")
    return ["node", str(npm / "node.mjs")], [python, str(SOURCES / "client.py")]


def venv(requirements, path):
    """A virtual environment with what a file requires; returns its Python."""
    python = path / "bin" / "python"
    done = path / "installed"
    wanted = requirements.read_text()
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(path)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        done.write_text(wanted)
    return str(python)


def versions():
    lock = json.loads((SOURCES / "package-lock.json").read_text())
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "@segment/analytics-node": lock["packages"]["node_modules/@segment/analytics-node"]["version"],
        "node": node.removeprefix("v"),
        "segment-analytics-python": (SOURCES / "requirements.txt").read_text().split("==")[1].split()[0],
        "python": sys.version.split()[0],
    }


def peer(sandbox, command, pairs):
    """From the first event to the moment at which the sandbox has them all."""
    with Process([*command, sandbox.url, str(pairs)]) as process:
        # It has said that it is ready; now it sends.
        start, cpu = time.monotonic(), process.cpu()
        sandbox.wait_for_events(2 * pairs, timeout=300)
        took, used = time.monotonic() - start, process.cpu() - cpu
        peak = process.memory("VmHWM")
        stats = sandbox.stats()
    if stats["events_duplicate"] or stats["events_dropped"] or stats["events_accepted"] != 2 * pairs:
        raise Failed(f"{command}: the sandbox has {stats}")
    return figures(2 * pairs, took, used, peak)


def ours(tools, sandbox, relay, words, pairs):
    settled = load.Settled(sandbox)
    start = time.monotonic()
    measured = load.run(tools, relay, [*words, "--captures", pairs], 120, warm_up=0, settle=settled)
    took = time.monotonic() - start
    return figures(2 * measured["accepted_ever"], took, measured["cpu_seconds"], measured["peak_rss_bytes"])


def figures(events, seconds, cpu, peak):
    return {
        "events": events,
        "events_per_second": events / seconds,
        "cpu_seconds_per_million_events": cpu * 1e6 / events,
        "peak_rss_bytes": peak,
    }
