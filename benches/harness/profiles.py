"""Where CPU time goes, in the relay and in a bare tonic server, by threads and kinds of work; and the relay's stacks.

Needs `perf`; without it this part is left out.
"""

import collections
import re
import shutil
import subprocess

import flames
import load
from processes import Bare, Failed, say, scratch, world

MODES = ("unary, 256 in flight", "batches of 100, 16 in flight")
# The first that fits: where a sample is, by program or library and symbol.
KINDS = (
    ("kernel: network", r"^\[kernel.*(tcp|skb|sock|inet|ip_|net_|loopback|epoll|ep_poll)"),
    ("kernel: files and disk", r"^\[kernel.*(ext4|xfs|btrfs|jbd2|folio|filemap|copy_to_iter|copy_from_iter|iov|blk|bio|virtblk|nvme|vfs|fsync|page)"),
    ("kernel: other", r"^\[kernel"),
    ("allocator", r"_rjem_|\[\.\] (arena|tcache|edata|emap|extent|ecache|eset|rtree|tsd|pac|pai|psset|large|bin)_\w+$|malloc|cfree|realloc|calloc|_int_free|unlink_chunk|__rdl_|__rust_"),
    ("copying and comparing memory", r"__mem(move|cpy|set|cmp)"),
    ("gRPC: tonic, h2, hyper, tower", r"\b(tonic|h2|hyper|hyper_util|tower|http|http_body)\w*::"),
    ("protobuf: prost", r"\bprost\w*::"),
    ("JSON: serde_json", r"\b(serde|serde_json|serde_core|ryu|itoa|zmij)::"),
    ("hashing: SHA-2, CRC-32, hex", r"\b(sha2|hex|crc32fast)::|digest::"),
    ("runtime and locks: tokio, pthread", r"\b(tokio|mio|tokio_util|futures_\w+)::|pthread|futex"),
    ("relay and rusqlite", r"segment_relay::|rusqlite::"),
    # What has no Rust path in the program itself is C, and that is SQLite.
    ("SQLite", r"^segment-relay \[\.\] [^:]+$"),
    ("other", r""),
)
ONLY_CPU = ("-e", "cpu-clock")


def run(tools, quick):
    if shutil.which("perf") is None:
        raise Failed("perf is missing: install linux-perf, or leave `profile` out")
    seconds = 2 if quick else 6
    modes = {}
    for mode in MODES:
        with Bare(tools) as server:
            bare = profile(tools, mode, seconds, server)
        with world(tools) as (sandbox, relay):
            modes[mode] = {"bare": bare, "relay": profile(tools, mode, seconds, relay, load.Settled(sandbox))}
    with world(tools) as (sandbox, relay):
        say(f"  stacks: {MODES[0]}")
        stacks = flames.record(lambda: drive(tools, MODES[0], 3, relay, load.Settled(sandbox)), relay.popen.pid, 3)
    return {"modes": modes, "stacks": stacks}


def drive(tools, mode, seconds, server, settle=None):
    return load.run(tools, server, load.MODES[mode], seconds, warm_up=0.5, settle=settle)


def profile(tools, mode, seconds, server, settle=None):
    """CPU µs a capture, and how they are shared by threads and kinds of work, in per cent."""
    say(f"  {mode}: {type(server).__name__.lower()}")
    with scratch() as directory:
        data = str(directory / "perf.data")
        command = ["perf", "record", *ONLY_CPU, "-F", "999", "-o", data, "-p", str(server.popen.pid)]
        recorder = subprocess.Popen([*command, "--", "sleep", str(seconds)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        measured = drive(tools, mode, seconds, server, settle)
        if recorder.wait(60):
            raise Failed("perf record failed: it needs root, or kernel.perf_event_paranoid of 1 or less")
        command = ["perf", "report", "-i", data, "--stdio", "-t", "\t", "-F", "overhead,comm,dso,symbol"]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    shares = collections.defaultdict(lambda: collections.defaultdict(float))
    for line in out.splitlines():
        if line.startswith("#") or "\t" not in line:
            continue
        share, thread, *place = (word.strip() for word in line.split("\t"))
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, " ".join(place)))
        shares[thread][kind] += float(share.rstrip("%"))
    return {"cpu_us_per_capture": measured["cpu_us_per_capture"], "threads": shares}
