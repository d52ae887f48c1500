"""Callers: unary calls, batches and streams, from several threads.

Each user's captures are sent one after the other: the next one when the former is
acknowledged. A call whose outcome is unknown is repeated with the same capture_id, at
the next relay.
"""

import hashlib
import queue
import random
import threading
import time

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from jebbit.segmentrelay.v1 import (
    capture_pb2,
    dead_letter_service_pb2,
    dead_letter_service_pb2_grpc,
    integration_pb2,
    integration_service_pb2,
    integration_service_pb2_grpc,
    segment_relay_pb2,
    segment_relay_pb2_grpc,
)

INTEGRATIONS = [f"acme-{number}" for number in range(4)]
REGIONS = {"non_eu": capture_pb2.DATA_REGION_NON_EU, "eu": capture_pb2.DATA_REGION_EU}
OWNERS = [(name, region) for name in INTEGRATIONS for region in REGIONS]
CALL_SECONDS = 4
RETRIED = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
# Of a stream, in any case: CANCELLED and UNKNOWN where its connection is reset.
RETRIED_STREAM = RETRIED | {"CANCELLED", "UNKNOWN"}
# Every so many captures of a user the endpoint refuses for good.
POISON_EVERY = 97


def write_key(name, region):
    return f"key-of-{name}-{region}"


def key_of():
    """The endpoint and write key of each owner."""
    return {f"{name}/{region}": (region, write_key(name, region)) for name, region in OWNERS}


def integration(name):
    credentials = [
        integration_pb2.Credential(data_region=number, write_key=write_key(name, region))
        for region, number in REGIONS.items()
    ]
    return integration_pb2.Integration(
        integration_id=name,
        credentials=credentials,
        mappings=[integration_pb2.FieldMapping(attribute_id="owner")],
    )


def create_integration(channel, name):
    stub = integration_service_pb2_grpc.IntegrationServiceStub(channel)
    request = integration_service_pb2.CreateIntegrationRequest(integration=integration(name))
    return stub.CreateIntegration(request, timeout=20)


def dead_letters(channel):
    """Message ids of all dead letters."""
    stub = dead_letter_service_pb2_grpc.DeadLetterServiceStub(channel)
    ids, token = set(), ""
    while True:
        request = dead_letter_service_pb2.ListDeadLettersRequest(page_size=1000, page_token=token)
        page = stub.ListDeadLetters(request, timeout=20)
        ids.update(one.event.message_id for one in page.dead_letters)
        token = page.next_page_token
        if not token:
            return ids


class User:
    """One person, whose captures belong to one integration and region."""

    def __init__(self, name, number):
        self.name = name
        self.integration, self.region = OWNERS[number % len(OWNERS)]
        self.sent = 0
        self.pending = None
        digest = hashlib.sha256(f"{name}@example.com".encode()).hexdigest()
        self.shard = int(digest[:2], 16) % 4

    def next_capture(self):
        """The capture that is to be acknowledged next; the same until it is."""
        if self.pending is None:
            self.sent += 1
            self.pending = capture_pb2.Capture(
                capture_id=f"{self.name}-{self.sent}",
                email=f"{self.name}@example.com",
                campaign_id="cluster",
                campaign_name="poisoned" if self.sent % POISON_EVERY == 11 else "fine",
                session_id=f"{self.name}-{self.sent}",
                occur_time=Timestamp(seconds=1700000000 + self.sent),
                data_region=REGIONS[self.region],
            )
            owner = self.pending.attributes["owner"]
            owner.string_value = f"{self.integration}/{self.region}"
        return self.pending


class Caller(threading.Thread):
    """One thread with its users, at one relay until a call fails."""

    def __init__(self, load, number, users):
        super().__init__(daemon=True)
        self.load, self.ledger, self.users = load, load.ledger, users
        self.at = number
        self.calls = 0

    @property
    def relay(self):
        return self.load.stubs[self.at % len(self.load.stubs)]

    def run(self):
        while not self.load.ended.is_set():
            if not self.load.runs.wait(0.2):
                continue
            self.load.enter(self)
            try:
                self.turn()
            finally:
                self.load.leave(self)
            self.calls += 1
            if self.calls % 10 == 0:
                self.go_elsewhere()

    def go_elsewhere(self):
        """Another relay by chance, so that callers stay spread over all of them."""
        self.at += random.randrange(1, len(self.load.stubs))

    def failed(self, error, retried=frozenset(RETRIED)):
        code = error.code().name
        self.ledger.failed(code, error.details(), code in retried)
        self.go_elsewhere()
        time.sleep(0.1)

    def acknowledge(self, user, result, begin):
        self.ledger.acknowledge(user.name, user.pending, result, begin)
        user.pending = None

    def refused(self, result):
        """Takes note of a capture that was refused in a batch or stream."""
        code = grpc_code(result.error)
        self.ledger.failed(code, str(result.error), code in RETRIED)


def grpc_code(error):
    """The name of the status of one refused capture."""
    by_number = {code.value[0]: code.name for code in grpc.StatusCode}
    return by_number.get(error.code, str(error.code))


class Unary(Caller):
    """Capture, for one user after the other."""

    def turn(self):
        for user in self.users:
            begin = time.monotonic()
            request = segment_relay_pb2.CaptureRequest(
                integration_id=user.integration, capture=user.next_capture()
            )
            try:
                answer = self.relay.Capture(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                self.failed(error)
                continue
            self.acknowledge(user, answer.result, begin)
        time.sleep(self.load.pause)


class Batch(Caller):
    """CaptureBatch with one capture of each user; all belong to one integration."""

    def turn(self):
        begin = time.monotonic()
        request = segment_relay_pb2.CaptureBatchRequest(
            integration_id=self.users[0].integration,
            captures=[user.next_capture() for user in self.users],
        )
        try:
            answer = self.relay.CaptureBatch(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            self.failed(error)
            return
        for user, result in zip(self.users, answer.results, strict=True):
            if result.HasField("error"):
                self.refused(result)
            else:
                self.acknowledge(user, result, begin)
        time.sleep(self.load.pause * 4)


class Stream(Caller):
    """CaptureStream: each user has one capture in flight."""

    ROUNDS = 40

    def turn(self):
        requests = queue.SimpleQueue()
        begun, left = {}, {user.name: self.ROUNDS for user in self.users}
        by_name = {user.name: user for user in self.users}

        def send(user):
            begun[user.name] = time.monotonic()
            requests.put(
                segment_relay_pb2.CaptureStreamRequest(
                    correlation_id=user.name,
                    integration_id=user.integration,
                    capture=user.next_capture(),
                )
            )

        for user in self.users:
            send(user)
        try:
            call = self.relay.CaptureStream(iter(requests.get, None), timeout=20)
            for answer in call:
                user = by_name[answer.correlation_id]
                if answer.result.HasField("error"):
                    self.refused(answer.result)
                    left[user.name] = 1
                    time.sleep(0.1)
                else:
                    self.acknowledge(user, answer.result, begun[user.name])
                left[user.name] -= 1
                if left[user.name] > 0 and self.load.runs.is_set():
                    time.sleep(self.load.pause / len(self.users))
                    send(user)
                else:
                    del left[user.name]
                if not left:
                    break
            requests.put(None)
            # The end of the call.
            for _ in call:
                pass
        except grpc.RpcError as error:
            requests.put(None)
            self.failed(error, frozenset(RETRIED_STREAM))


class Load:
    """All callers; can be paused, so that all that was acknowledged is known."""

    def __init__(self, ledger, relays, pause=0.4):
        self.ledger, self.pause = ledger, pause
        self.channels = [relay.channel() for relay in relays]
        self.stubs = [segment_relay_pb2_grpc.SegmentRelayStub(one) for one in self.channels]
        self.runs, self.ended = threading.Event(), threading.Event()
        self.busy, self.changed = set(), threading.Condition()
        self.callers = self.make_callers()
        for caller in self.callers:
            caller.start()

    def make_callers(self):
        callers, numbers = [], iter(range(10_000))

        def users(kind, count, step=1):
            """Users of consecutive owners, or with the step of one integration alone."""
            first = next(numbers) * step
            return [
                User(f"{kind}{len(callers)}-{index}", first + index % (2 if step > 1 else 8))
                for index in range(count)
            ]

        for _ in range(6):
            callers.append(Unary(self, len(callers), users("unary", 2)))
        for _ in range(3):
            callers.append(Batch(self, len(callers), users("batch", 16, step=2)))
        for _ in range(3):
            callers.append(Stream(self, len(callers), users("stream", 8)))
        return callers

    def enter(self, caller):
        with self.changed:
            self.busy.add(caller)

    def leave(self, caller):
        with self.changed:
            self.busy.discard(caller)
            self.changed.notify_all()

    def resume(self):
        self.runs.set()

    def stop(self, seconds=60):
        """No more calls; waits for those that are under way."""
        self.runs.clear()
        with self.changed:
            return self.changed.wait_for(lambda: not self.busy, seconds)

    def end(self):
        self.stop()
        self.ended.set()
