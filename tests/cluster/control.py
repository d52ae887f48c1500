"""Helpers as processes of their own: a JSON value a line, each answered by one."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

from processes import Failure, first_line


class Helper:
    """A helper process; `ask` sends it a command and returns its answer."""

    def __init__(self, run, name, file, *arguments):
        self.name = name
        self.lock = threading.Lock()
        self.process = run.start(
            name,
            [sys.executable, Path(__file__).with_name(file), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ready = json.loads(first_line(self.process, 20, name))

    def ask(self, **command):
        with self.lock:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise Failure(f"{self.name} has ended")
        return json.loads(line)


def say(value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def serve(handle):
    """Answers commands on standard input until it ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        say(handle(json.loads(line)))
