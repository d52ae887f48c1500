"""Where the relay's CPU time goes, by threads and kinds of work. Needs `perf`; without it this part is left out."""

import collections
import re
import shutil
import subprocess

import load
from processes import Failed, say, scratch, world

MODES = ("unary, 256 in flight", "batches of 100, 16 in flight")
# The first that fits: where a sample is, by program or library and symbol.
KINDS = (
    ("kernel: network", r"^\[kernel.*(tcp|skb|sock|inet|ip_|net_|loopback|epoll|ep_poll)"),
    ("kernel: files and disk", r"^\[kernel.*(ext4|xfs|btrfs|jbd2|folio|filemap|copy_to_iter|copy_from_iter|iov|blk|bio|virtblk|nvme|vfs|fsync|page)"),
    ("kernel: other", r"^\[kernel"),
    ("allocator", r"malloc|cfree|realloc|calloc|_int_free|unlink_chunk|_mi_| mi_|__rdl_|__rust_"),
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


def run(tools, quick):
    if shutil.which("perf") is None:
        raise Failed("perf is missing: install linux-perf, or leave `profile` out")
    return {"modes": {mode: profile(tools, mode, 2 if quick else 6) for mode in MODES}}


def profile(tools, mode, seconds):
    say(f"  {mode}")
    with scratch() as directory, world(tools) as (sandbox, relay):
        data = str(directory / "perf.data")
        command = ["perf", "record", "-e", "cpu-clock", "-F", "999", "-o", data, "-p", str(relay.popen.pid)]
        recorder = subprocess.Popen([*command, "--", "sleep", str(seconds)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        load.run(tools, relay, load.MODES[mode], seconds, warm_up=0.5, settle=load.Settled(sandbox))
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
    return shares
