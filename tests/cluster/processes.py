"""Processes that end with the harness, and waiting with a bound."""

import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# In the environment of every process of one run, so that the guardian finds them.
MARK = "SEGMENT_RELAY_CLUSTER_RUN"


class Failure(Exception):
    """The harness cannot go on."""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(what, check, seconds, interval=0.1):
    """Polls until the check returns something true; returns it."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(interval)


def server_user():
    """The user that runs PostgreSQL, which refuses root; None: the current one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Failure("running as root, and there is no user postgres or nobody")


def process_tree(pid):
    """The process and all its descendants."""
    found = [pid]
    for parent in found:
        try:
            text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found.extend(int(word) for word in text.split())
    return found


def signal_all(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def marked(directory):
    """All processes of the run in this directory."""
    mark = f"{MARK}={directory}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if mark in environment or f"{directory}/".encode() in command:
            found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def guard(pipe, directory, keep):
    """Waits for the end of the harness, however it comes; ends what it has left."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(pipe, 1)
    # A server may have started another in between: until none is left.
    for _ in range(50):
        left = marked(directory)
        if not left:
            break
        signal_all(left, signal.SIGKILL)
        time.sleep(0.1)
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)


class Run:
    """The directory and the processes of one run."""

    def __init__(self, keep=False):
        self.directory = Path(tempfile.mkdtemp(prefix="segment-relay-cluster-"))
        self.directory.chmod(0o755)
        reading, self.pipe = os.pipe()
        self.guardian = os.fork()
        if self.guardian == 0:
            os.close(self.pipe)
            try:
                guard(reading, self.directory, keep)
            finally:
                os._exit(0)
        os.close(reading)
        os.environ[MARK] = str(self.directory)
        self.user = server_user()

    def folder(self, name, of_server=False):
        path = self.directory / name
        path.mkdir(exist_ok=True)
        if of_server and self.user:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        return path

    def start(self, name, command, env=None, as_server=False, **more):
        """Starts a process; its output goes to a log in the run's directory."""
        # Dies with this process; what it starts itself is left to the guardian.
        setpriv = ["setpriv", "--pdeathsig=KILL"]
        if as_server and self.user:
            setpriv += [f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}"]
            setpriv += ["--clear-groups"]
        with open(self.directory / f"{name}.log", "ab") as log:
            more.setdefault("stdin", subprocess.DEVNULL)
            more.setdefault("stdout", log)
            return subprocess.Popen(
                [*setpriv, "--", *(str(word) for word in command)],
                env={**os.environ, **(env or {})},
                stderr=log,
                cwd=self.directory,
                **more,
            )

    def log_tail(self, name, lines=20):
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def keep_logs(self):
        """Copies the logs to a folder that outlives the run."""
        kept = Path(tempfile.mkdtemp(prefix="segment-relay-cluster-logs-"))
        for log in self.directory.glob("*.log"):
            shutil.copy(log, kept)
        for record in self.directory.glob("*.jsonl"):
            shutil.copy(record, kept)
        return kept

    def end(self):
        """Ends everything, and waits until it is gone."""
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None
            os.waitpid(self.guardian, 0)


def first_line(process, seconds, what):
    """The first line of its output."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if ready else b""
    if not line:
        raise Failure(f"{what} printed nothing within {seconds} s")
    return line.decode().strip()


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def complain(text):
    print(f"tests/cluster: {text}", file=sys.stderr, flush=True)
