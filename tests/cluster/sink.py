"""An HTTP server in Segment's place that records every request.

sink.py FILE: the first line of output is the ports, {"non_eu": .., "eu": ..}. Each request
becomes a line of FILE when it ends: when it is answered, or when its client is gone.
Command: {"delay_ms": .., "status": .., "share": .., "lost_share": ..}. `share` of the
requests gets `status`; of `lost_share` the events are taken, but the answer is lost.
"""

import asyncio
import base64
import gzip
import itertools
import json
import random
import sys
import time

import control

# A request with an event that holds this is refused for good.
POISON = b"poisoned"
MAX_HEAD = 65536


class Behaviour:
    """What the endpoints do at the moment."""

    def __init__(self):
        self.delay_ms, self.status, self.share, self.lost_share = 15, 503, 0.0, 0.0
        # Some are slow, so that a fault finds requests under way.
        self.slow_ms, self.slow_share = 400, 0.15

    def delay_seconds(self):
        is_slow = random.random() < self.slow_share
        return max(self.delay_ms, self.slow_ms if is_slow else 0) / 1000

    def change(self, command):
        for name, value in command.items():
            if not hasattr(self, name):
                raise KeyError(name)
            setattr(self, name, value)
        return vars(self)


class Request:
    """One request to an endpoint, from its last byte to its end."""

    numbers = itertools.count()

    def __init__(self, region, key, body):
        self.region, self.key = region, key
        self.number, self.begin = next(self.numbers), time.monotonic()
        self.refused = POISON in body
        batch = json.loads(body)
        self.events = [
            [event["messageId"], event["userId"], event["type"], owner(event)]
            for event in batch["batch"]
        ]

    def record(self, status, taken):
        return {
            "number": self.number,
            "begin": self.begin,
            "end": time.monotonic(),
            "region": self.region,
            "key": self.key,
            "status": status,
            "taken": taken,
            "events": self.events,
        }


def owner(event):
    """The integration and region that the load wrote into the event."""
    answers = event.get("traits") or event.get("properties", {}).get("questions", {})
    return answers.get("owner")


class Endpoint(asyncio.Protocol):
    """One connection: HTTP/1.1 with Content-Length, one request after the other."""

    def __init__(self, region, behaviour, file):
        self.region, self.behaviour, self.file = region, behaviour, file
        self.buffer, self.head, self.request, self.timer = b"", None, None, None

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        if self.request is None:
            self.take()

    def take(self):
        if self.head is None:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                if len(self.buffer) > MAX_HEAD:
                    self.transport.abort()
                return
            lines = head.decode("latin-1").split("\r\n")[1:]
            pairs = (line.split(":", 1) for line in lines)
            self.head = {name.strip().lower(): text.strip() for name, text in pairs}
            self.buffer = rest
        length = int(self.head["content-length"])
        if len(self.buffer) < length:
            return
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        if self.head.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        word = self.head["authorization"].split()[1]
        key = base64.b64decode(word).decode().rstrip(":")
        self.head, self.request = None, Request(self.region, key, body)
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(self.behaviour.delay_seconds(), self.answer)

    def answer(self):
        behaviour = self.behaviour
        status = 400 if self.request.refused else 200
        if random.random() < behaviour.share:
            status = behaviour.status
        is_lost = status == 200 and random.random() < behaviour.lost_share
        self.end(0 if is_lost else status, taken=status == 200)
        if is_lost:
            self.transport.abort()
            return
        answer = f"HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}"
        self.transport.write(answer.encode())
        if self.buffer:
            self.take()

    def end(self, status, taken):
        self.file.write(json.dumps(self.request.record(status, taken)) + "\n")
        self.request = None

    def connection_lost(self, _):
        if self.request is not None:
            # Segment may have taken the events of a request that was cut off.
            self.timer.cancel()
            self.end(0, taken=False)


async def main(path):
    behaviour = Behaviour()
    loop = asyncio.get_running_loop()
    with open(path, "w", buffering=1, encoding="utf-8") as file:
        ports = {}
        for region in ("non_eu", "eu"):
            server = await loop.create_server(
                lambda region=region: Endpoint(region, behaviour, file), "127.0.0.1", 0
            )
            ports[region] = server.sockets[0].getsockname()[1]
        control.say(ports)
        await control.serve(behaviour.change)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
