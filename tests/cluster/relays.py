"""The relays under test."""

import os
import signal
import subprocess
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from processes import Failure, first_line, free_ports, wait_until

REQUEST_TIMEOUT_MS = 1000
START_SECONDS = 30
DRAIN_SECONDS = 40
# A relay's lanes are free this long after its last word, with some room.
LEASE_SECONDS = REQUEST_TIMEOUT_MS / 1000 + 3
CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]
FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
)


def faketime_library():
    named = os.environ.get("SEGMENT_RELAY_FAKETIME")
    found = [path for path in (named, *FAKETIME) if path and os.path.exists(path)]
    return found[0] if found else None


class Relay:
    """One relay process, behind a load balancer of its own: the port stays the same."""

    def __init__(self, run, number, settings):
        self.run, self.number, self.settings = run, number, settings
        self.name = f"relay-{number}"
        (self.port,) = free_ports(1)
        self.process = None
        # Starts that the harness did not ask for.
        self.expected_to_run = False

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def channel(self):
        return grpc.insecure_channel(self.address, options=CHANNEL)

    def start(self, clock_seconds=0, wait=True, **settings):
        """Starts it, with its clock off and with other settings where given."""
        env = {**self.settings, "SEGMENT_RELAY__SERVER__LISTEN": self.address}
        env |= {f"SEGMENT_RELAY__{name.upper()}": str(value) for name, value in settings.items()}
        if clock_seconds:
            env |= {
                "LD_PRELOAD": faketime_library(),
                "FAKETIME": f"{clock_seconds:+d}s",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
        command = [os.environ["SEGMENT_RELAY"], "serve"]
        self.process = self.run.start(self.name, command, env, stdout=subprocess.PIPE)
        self.expected_to_run = True
        if wait:
            self.wait_ready()

    def wait_ready(self):
        try:
            first_line(self.process, START_SECONDS, self.name)
            wait_until(f"{self.name} serves", self.is_serving, START_SECONDS)
        except Failure as error:
            raise Failure(f"{error}\n{self.run.log_tail(self.name)}") from error

    def health(self):
        try:
            with self.channel() as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except grpc.RpcError as error:
            return error.code().name

    def is_serving(self):
        return self.health() == "SERVING"

    def kill(self):
        self.expected_to_run = False
        self.process.kill()
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def drain(self):
        """SIGTERM; returns the exit code and the seconds it took."""
        self.expected_to_run = False
        begun = time.monotonic()
        self.process.terminate()
        try:
            code = self.process.wait(timeout=DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = f"none within {DRAIN_SECONDS} s"
        return code, time.monotonic() - begun

    def has_died(self):
        """Whether it ended by itself; its exit code."""
        code = self.process.poll() if self.process else None
        return code if self.expected_to_run else None


def common_settings(run, sink_ports, outbox):
    """The environment of every relay."""
    key = run.directory / "relay.key"
    if not key.exists():
        printed = subprocess.run(
            [os.environ["SEGMENT_RELAY"], "key"], capture_output=True, text=True, check=True
        )
        key.write_text(printed.stdout)
    names = {
        "SECRETS__KEY_FILE": key,
        "SEGMENT__ENDPOINTS__NON_EU": f"http://127.0.0.1:{sink_ports['non_eu']}/v1/batch",
        "SEGMENT__ENDPOINTS__EU": f"http://127.0.0.1:{sink_ports['eu']}/v1/batch",
        "SEGMENT__REQUEST_TIMEOUT_MS": REQUEST_TIMEOUT_MS,
        "DELIVERY__MAX_EVENTS_PER_SECOND": 1000000,
        "DELIVERY__BURST_EVENTS": 1000000,
        "DELIVERY__RETRY_BASE_MS": 50,
        "DELIVERY__RETRY_MAX_MS": 500,
        "LOG__FILTER": os.environ.get("SEGMENT_RELAY_CLUSTER_LOG", "info"),
        **outbox,
    }
    return {f"SEGMENT_RELAY__{name}": str(value) for name, value in names.items()}


def postgres_outbox(url):
    return {
        "OUTBOX__KIND": "postgres",
        "POSTGRES__URLS": url,
        "POSTGRES__REQUIRE_SYNCHRONOUS_STANDBY": "true",
    }


def init_outbox(run, settings):
    """`segment-relay outbox init`: creates the schema."""
    file = run.directory / "relay.toml"
    file.touch()
    done = subprocess.run(
        [os.environ["SEGMENT_RELAY"], "outbox", "init", "--config", str(file)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        raise Failure(f"outbox init: exit {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout.strip()
