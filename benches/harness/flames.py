"""Stacks of a program as a flame graph's tree: how much CPU time was spent in a function and in what it called."""

import re
import subprocess

from processes import Failed, scratch

# Below this share of all samples a function is not shown.
LEAST = 0.005
# Deeper calls are not shown.
DEPTH = 22
# Through these every thread and every task comes.
WRAPPERS = re.compile(
    r"^(clone3|start_thread|Thread::new|\w+::thread_start|FnOnce::call_once.*"
    r"|.*__rust_begin_short_backtrace|raw::poll|entry_SYSCALL.*|do_syscall_64)$"
)
# So much of the stack is copied with each sample, in bytes.
STACK_BYTES = 32 * 1024


def record(drive, pid, seconds):
    """Samples `pid` while `drive` loads it; returns the pruned tree [name, samples, children]."""
    with scratch() as directory:
        data = str(directory / "perf.data")
        command = ["perf", "record", "-e", "cpu-clock", "-F", "249", "--call-graph", f"dwarf,{STACK_BYTES}", "-o", data]
        command += ["-p", str(pid), "--", "sleep", str(seconds)]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        drive()
        if recorder.wait(120):
            raise Failed("perf record failed: it needs root, or kernel.perf_event_paranoid of 1 or less")
        command = ["perf", "script", "-i", data, "--no-inline", "-F", "comm,ip,sym"]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    tree = {}
    count = 0
    for sample in out.split("\n\n"):
        lines = sample.strip().splitlines()
        if len(lines) < 2:
            continue
        thread, *frames = lines
        count += 1
        names = [short(frame.strip().split(" ", 1)[-1]) for frame in reversed(frames)]
        add(tree, [thread.strip(), *(name for name in names if not WRAPPERS.match(name))])
    if count == 0:
        raise Failed("perf saw no samples")
    return ["all", count, pruned(tree, count * LEAST)]


def short(name):
    """Type and function without generic arguments and most of the path: `<a::B<T> as c::D>::poll` is `B::poll`."""
    if name.startswith("<"):
        end = closing(name)
        # Of `<A as B>::c` the type counts, of `<impl A>::c` what is behind `impl`.
        kind = name[1:end]
        depth = 0
        for place, letter in enumerate(kind):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if depth == 0 and kind.startswith(" as ", place):
                kind = kind[:place]
                break
        name = f"{kind}::{name[end + 1:].removeprefix('::')}"
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    parts = [part for part in name.split("::") if part and not part.startswith("{")]
    return "::".join(parts[-2:]) or name


def closing(name):
    """Where the bracket closes with which a name begins."""
    depth = 0
    for place, letter in enumerate(name):
        # The arrow of a function type closes nothing.
        depth += {"<": 1, ">": 0 if name[place - 1] == "-" else -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(name)


def add(tree, names):
    last = None
    for name in names[:DEPTH]:
        # A function that only wraps another one of its name says nothing new.
        if name == last:
            continue
        last = name
        node = tree.setdefault(name, [0, {}])
        node[0] += 1
        tree = node[1]


def pruned(tree, least):
    kept = [[name, count, pruned(children, least)] for name, (count, children) in tree.items() if count >= least]
    return sorted(kept)
