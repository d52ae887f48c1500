"""The programs under measurement as processes, with their CPU time and memory from /proc."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
BENCH = TARGET / "bench"
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE_SECONDS = 120


class Failed(Exception):
    """A benchmark can't go on."""


class Tools:
    """Paths of the programs."""

    def __init__(self, relay, load, pure, allocations, outbox):
        self.relay, self.load, self.pure, self.allocations, self.outbox = relay, load, pure, allocations, outbox

    @classmethod
    def build(cls, skip):
        known = BENCH / "tools.json"
        if not (skip and known.exists()):
            known.write_text(json.dumps(build()))
        return cls(**json.loads(known.read_text()))

    def ask(self, *words, timeout=PATIENCE_SECONDS):
        """Runs the load tool to its end and returns what it prints."""
        done = subprocess.run([self.load, *map(str, words)], stdout=subprocess.PIPE, timeout=timeout, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def build():
    """Builds all programs with the release profile and returns their paths."""
    subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
    paths = {"relay": str(TARGET / "release" / "segment-relay")}
    command = ["cargo", "bench", "--no-run", "--locked", "--message-format=json-render-diagnostics"]
    names = ["load", "pure", "allocations", "outbox"]
    for name in names:
        command += ["--bench", name]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    for line in out.splitlines():
        message = json.loads(line)
        target = message.get("target", {})
        if message.get("executable") and target.get("kind") == ["bench"] and target["name"] in names:
            paths[target["name"]] = message["executable"]
    return paths


class Process:
    """A program that serves until it is stopped; its first line ends in (or holds) its address."""

    def __init__(self, command, environment=None):
        self.started = time.monotonic()
        # Inherited variables of the relay would change what is measured.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SEGMENT_RELAY__")}
        self.popen = subprocess.Popen(
            [str(word) for word in command],
            env=inherited | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first_line = self.popen.stdout.readline().strip()
        if not self.first_line:
            raise Failed(f"{command[0]} did not start")
        self.serves_after_seconds = time.monotonic() - self.started

    def cpu(self):
        """CPU seconds so far, user and system."""
        fields = pathlib.Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self, field="VmRSS"):
        """Resident bytes: VmRSS now, VmHWM at the most since reset_peak."""
        for line in pathlib.Path(f"/proc/{self.popen.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise Failed(f"no {field}")

    def reset_peak(self):
        # A container may forbid it; then the peak is that of the whole life.
        with contextlib.suppress(OSError):
            pathlib.Path(f"/proc/{self.popen.pid}/clear_refs").write_text("5")

    def stop(self, how=signal.SIGTERM):
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Sandbox(Process):
    """`segment-relay sandbox`, which checks every event as Segment does, or only counts them."""

    def __init__(self, tools, checks=True):
        words = ["sandbox", "--quiet", "--keep", "0", "--listen", "127.0.0.1:0", "--eu-listen", "127.0.0.1:0"]
        super().__init__([tools.relay, *words, *([] if checks else ["--count-only"])])
        self.url, self.eu_url = [word for word in self.first_line.split() if word.startswith("http://")]

    def stats(self):
        with urllib.request.urlopen(f"{self.url}/stats", timeout=30) as answer:
            return json.load(answer)

    def events(self):
        return self.stats()["events_accepted"]

    def control(self, rule):
        """Sets a rule of misbehaviour, or removes them all."""
        method = "DELETE" if rule is None else "PUT"
        body = None if rule is None else json.dumps(rule).encode()
        request = urllib.request.Request(f"{self.url}/control", data=body, method=method)
        urllib.request.urlopen(request, timeout=30).close()

    def wait_for_events(self, events, timeout=PATIENCE_SECONDS):
        """Waits until so many events were taken; returns how long it took."""
        start = time.monotonic()
        while (seen := self.events()) < events:
            if time.monotonic() - start > timeout:
                raise Failed(f"only {seen} of {events} events arrived within {timeout} s")
            time.sleep(0.05)
        return time.monotonic() - start


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Relay(Process):
    """`segment-relay serve` with its outbox in `directory`, delivering to a sandbox at any rate."""

    def __init__(self, tools, sandbox, directory, settings=None, port=0):
        directory = pathlib.Path(directory)
        self.outbox = directory / "outbox"
        values = {
            "SERVER__LISTEN": f"127.0.0.1:{port}",
            "OUTBOX__PATH": self.outbox,
            "SECRETS__KEY_FILE": directory / "key",
            "SEGMENT__ENDPOINTS__NON_EU": f"{sandbox.url}/v1/batch",
            "SEGMENT__ENDPOINTS__EU": f"{sandbox.eu_url}/v1/batch",
            "DELIVERY__MAX_EVENTS_PER_SECOND": 10_000_000,
            "DELIVERY__BURST_EVENTS": 10_000_000,
            "LIMITS__CALLER_CAPTURES_PER_SECOND": 10_000_000,
            "LIMITS__CALLER_BURST_CAPTURES": 10_000_000,
            "LIMITS__INTEGRATION_CAPTURES_PER_SECOND": 10_000_000,
            "LIMITS__INTEGRATION_BURST_CAPTURES": 10_000_000,
            "LOG__FILTER": "error",
        } | (settings or {})
        environment = {f"SEGMENT_RELAY__{name}": str(value) for name, value in values.items()}
        super().__init__([tools.relay, "serve"], environment)
        self.address = self.first_line.rsplit(" ", 1)[1]

    def disk_bytes(self):
        return sum(file.stat().st_blocks * 512 for file in self.outbox.iterdir())


class Bare(Process):
    """A tonic server that decodes the relay's requests and does nothing."""

    def __init__(self, tools):
        super().__init__([tools.load, "bare"])
        self.address = self.first_line.rsplit(" ", 1)[1]


class Collector(Process):
    """Takes traces and metrics, and drops them."""

    def __init__(self, tools):
        super().__init__([tools.load, "collector"])
        self.address = self.first_line.rsplit(" ", 1)[1]


@contextlib.contextmanager
def scratch(parent=BENCH):
    """A directory on the disk that target/ is on, where nothing else is wanted: /tmp may be memory."""
    parent.mkdir(parents=True, exist_ok=True)
    path = tempfile.mkdtemp(dir=parent, prefix="segment-relay-bench-")
    try:
        yield pathlib.Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def halves():
    """The CPUs that may be used, in two halves."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Failed("this needs two CPUs at the least")
    return cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]


@contextlib.contextmanager
def on_cpus(cpus):
    """What is started meanwhile runs on these CPUs alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def places(apart):
    """CPUs for the server and for all that loads it: the same, or each a half of them."""
    return halves() if apart else (os.sched_getaffinity(0),) * 2


@contextlib.contextmanager
def bare(tools, apart=False):
    """A bare server, with half of the CPUs to itself if wanted."""
    own, others = places(apart)
    with on_cpus(own):
        server = Bare(tools)
    with server, on_cpus(others):
        yield server


@contextlib.contextmanager
def journal_below(parent, outbox):
    """Has a new outbox keep its journal elsewhere, below `parent`."""
    with scratch(parent) as directory:
        outbox.mkdir(mode=0o700)
        for number in range(3):
            (outbox / f"relay.journal-{number}").symlink_to(directory / f"journal-{number}")
        yield
        # Under other names the journal would be where the database is, and nobody would see it.
        if not all(file.is_symlink() and file.exists() for file in outbox.glob("*journal*")):
            raise Failed("the relay's journal is not where it was to be: its files have other names")


@contextlib.contextmanager
def world(tools, settings=None, integrations=4, checks=False, apart=False, parent=BENCH, journal=None):
    """A sandbox and a relay with integrations and its outbox below `parent`, its journal below `journal` if that is
    elsewhere; it has half of the CPUs to itself if wanted."""
    own, others = places(apart)
    with scratch(parent) as directory, contextlib.ExitStack() as stack, on_cpus(others), Sandbox(tools, checks) as sandbox:
        if journal not in (None, parent):
            stack.enter_context(journal_below(journal, directory / "outbox"))
        with on_cpus(own):
            relay = Relay(tools, sandbox, directory, settings)
        with relay:
            tools.ask("setup", "--address", relay.address, "--integrations", integrations)
            yield sandbox, relay


def say(text):
    print(text, file=sys.stderr, flush=True)
