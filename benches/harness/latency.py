"""Latency of accepting one capture at half load, and what it is made of: what the load and a server that does nothing
take, CPUs that are shared with the load, the disk under the journal and under the database, and how long threads that
could run wait for a CPU."""

import contextlib
import pathlib
import shutil

import load
import pure
import scheduler
import stalls
from processes import BENCH, bare, say, scratch, world

# A file system in memory; where there is none, servers that need it are left out.
MEMORY = pathlib.Path("/dev/shm")

UNARY = load.MODES["unary, 256 in flight"]
# Name: whether it is the relay, has CPUs of its own, and what of its outbox is in memory.
SERVERS = {
    "relay": (True, False, ()),
    "relay, database in memory": (True, False, ("database",)),
    "relay, journal in memory": (True, False, ("journal",)),
    "relay, outbox in memory": (True, False, ("database", "journal")),
    "bare tonic": (False, False, ()),
    "relay, CPUs of its own": (True, True, ()),
    "bare tonic, CPUs of its own": (False, True, ()),
}


def run(tools, quick):
    rounds, seconds = (1, 2) if quick else (5, 5)
    rates = {apart: half(tools, apart, 2 if quick else 5) for apart in (False, True)}
    servers = {name: how for name, how in SERVERS.items() if MEMORY.is_dir() or not how[2]}
    found = {name: [] for name in servers}
    event_bytes = pure.event_bytes(tools)
    syncs = []
    for number in range(rounds):
        syncs.append(sync(tools, event_bytes))
        for name, how in servers.items():
            apart = how[1]
            say(f"  round {number + 1} of {rounds}: {name}, {rates[apart]:,.0f} calls/s")
            with server(tools, *how) as (one, settle):
                found[name].append(drive(tools, one, rates[apart], seconds, settle))
    return {
        "rates": {"shared": rates[False], "apart": rates[True]},
        "servers": found,
        "sync_ms": syncs,
        "stalls": {name: still(tools, name, rates[False], seconds) for name, (_, apart, _) in servers.items() if not apart},
        "waits": waits(tools, rates[False]),
    }


def half(tools, apart, seconds):
    """Half of what the relay takes, in calls a second."""
    with world(tools, apart=apart) as (sandbox, relay):
        return load.run(tools, relay, UNARY, seconds, settle=load.Settled(sandbox))["accepted_per_second"] / 2


@contextlib.contextmanager
def server(tools, is_relay, apart, in_memory):
    """The server, and what waits until it has delivered everything."""
    if not is_relay:
        with bare(tools, apart) as one:
            yield one, None
        return
    database, journal = (MEMORY if part in in_memory else BENCH for part in ("database", "journal"))
    with world(tools, apart=apart, parent=database, journal=journal) as (sandbox, relay):
        yield relay, load.Settled(sandbox)


def still(tools, name, rate, seconds):
    """How long the machine stands still under this load."""
    say(f"  the machine's stalls: {name}")
    with server(tools, *SERVERS[name]) as (one, settle):
        drive(tools, one, rate, 1, settle)
        return stalls.watch(lambda: drive(tools, one, rate, seconds, settle), seconds)


def waits(tools, rate):
    """How long threads wait for a CPU and for the disk; nothing without perf."""
    if not shutil.which("perf"):
        return None
    say("  waits for CPU and disk")
    with world(tools) as (sandbox, relay):
        settled = load.Settled(sandbox)
        pids = {"relay": relay.popen.pid, "sandbox": sandbox.popen.pid}
        drive(tools, relay, rate, 2, settled)
        cpu = scheduler.waits(pids, lambda: drive(tools, relay, rate, 3, settled), 2)
        disk = scheduler.syncs(relay.popen.pid, lambda: drive(tools, relay, rate, 6, settled), 6)
    return {"a CPU": cpu, "the disk": disk}


def drive(tools, server, rate, seconds, settle=None):
    words = ["--mode", "unary", "--in-flight", "4096", "--rate", rate]
    return load.run(tools, server, words, seconds, settle=settle)


def sync(tools, event_bytes):
    """An fdatasync of one capture's bytes."""
    with scratch() as directory:
        words = ["--bytes", event_bytes, "--seconds", 2, "--directory", directory, "--group", 1]
        return tools.ask("disk", *words)["sync_ms"]
