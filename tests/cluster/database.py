"""PostgreSQL under Patroni: etcd, three nodes, one synchronous standby."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

from processes import Failure, free_ports, process_tree, say, signal_all, wait_until

# Seconds. A leader that is gone is replaced after TTL; Patroni looks every LOOP_WAIT.
TTL = 10
LOOP_WAIT = 2
RETRY_TIMEOUT = 3
START_SECONDS = 90
# A cluster that is complete later than this needs a hand.
STUCK_SECONDS = 25
STREAMING = "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'"

PARAMETERS = {
    "max_connections": 200,
    "jit": "off",
    "max_wal_senders": 10,
    "wal_keep_size": "256MB",
    # A standby that is silent for so long is no longer waited for.
    "wal_sender_timeout": "5s",
    "wal_receiver_timeout": "5s",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] ",
}


def start_etcd(run, program):
    client, peer = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    run.start(
        "etcd",
        [program, "--name=one", f"--data-dir={run.folder('etcd', of_server=True)}"]
        + [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        + [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        + [f"--initial-cluster=one={peer}", "--log-level=warn", "--logger=zap"],
        as_server=True,
    )
    wait_until("etcd answers", lambda: get(f"{client}/health"), START_SECONDS)
    return client.removeprefix("http://")


def get(url):
    """The JSON of an answer with any status; None if there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.loads(error.read() or b"null")
    except (OSError, ValueError):
        return None


class Node:
    """One server and its Patroni."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number
        self.name = f"{cluster.scope}-{number}"
        self.port, self.api = free_ports(2)
        self.folder = cluster.run.folder(self.name, of_server=True)
        self.patroni = None

    @property
    def data(self):
        return self.folder / "data"

    def start(self, bootstrap=None):
        settings = self.settings(bootstrap or {})
        file = self.folder / "patroni.yml"
        # JSON is YAML.
        file.write_text(json.dumps(settings, indent=1))
        self.patroni = self.cluster.run.start(
            self.name,
            [*self.cluster.programs.patroni, file],
            env={"PATH": f"{self.cluster.programs.postgres}:{os.environ['PATH']}"},
            as_server=True,
        )

    def settings(self, bootstrap):
        address = "127.0.0.1"
        dynamic = {
            "ttl": TTL,
            "loop_wait": LOOP_WAIT,
            "retry_timeout": RETRY_TIMEOUT,
            "maximum_lag_on_failover": 1 << 30,
            "synchronous_mode": True,
            "synchronous_mode_strict": True,
            "master_start_timeout": 0,
            "primary_start_timeout": 0,
            "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": PARAMETERS},
        }
        return {
            "scope": self.cluster.scope,
            "name": self.name,
            "restapi": {
                "listen": f"{address}:{self.api}",
                "connect_address": f"{address}:{self.api}",
            },
            "etcd3": {"hosts": self.cluster.etcd},
            "bootstrap": {
                "dcs": dynamic,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}],
                **bootstrap,
            },
            "postgresql": {
                "listen": f"{address}:{self.port}",
                "connect_address": f"{address}:{self.port}",
                "data_dir": str(self.data),
                "bin_dir": str(self.cluster.programs.postgres),
                "pgpass": str(self.folder / "pgpass"),
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "replicator"},
                },
                "parameters": {"unix_socket_directories": ""},
                "pg_hba": [
                    "host replication all 127.0.0.1/32 trust",
                    "host all all 127.0.0.1/32 trust",
                ],
                "basebackup": [{"checkpoint": "fast"}],
            },
        }

    def server_processes(self):
        """The postmaster and its children."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            return []
        return process_tree(pid) if str(self.data).encode() in command else []

    def kill(self):
        """A power loss: Patroni and all of the server at once."""
        self.signal(signal.SIGKILL)
        self.patroni.wait()

    def signal(self, number):
        """Sends a signal to Patroni and to all of the server."""
        signal_all([self.patroni.pid, *self.server_processes()], number)

    def kill_server(self):
        """The server's processes alone; Patroni lives on."""
        signal_all(self.server_processes(), signal.SIGKILL)

    def execute(self, statement, database="postgres"):
        done = subprocess.run(
            [self.cluster.programs.postgres / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1"]
            + ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", database]
            + ["-c", statement],
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise Failure(f"{self.name}: {statement}: {done.stderr.strip()}")
        return done.stdout.strip()


class Programs:
    """Where the programs are, as tests/setup.sh found them."""

    def __init__(self):
        self.postgres = Path(os.environ["SEGMENT_RELAY_POSTGRES_BIN"])
        self.patroni = os.environ["SEGMENT_RELAY_PATRONI"].split()
        self.etcd = os.environ["SEGMENT_RELAY_ETCD"]


class Cluster:
    """Nodes of one Patroni scope."""

    def __init__(self, run, programs, etcd, scope="main", count=3):
        self.run, self.programs, self.etcd, self.scope = run, programs, etcd, scope
        self.nodes = [Node(self, number) for number in range(count)]

    def start(self, bootstrap=None):
        for node in self.nodes:
            node.start(bootstrap)
        self.wait_complete()

    def members(self):
        """What the first Patroni that answers knows, by name."""
        for node in self.nodes:
            if node.patroni and node.patroni.poll() is None:
                answer = get(f"http://127.0.0.1:{node.api}/cluster")
                if answer and answer.get("members"):
                    return {one["name"]: one for one in answer["members"]}
        return {}

    def node_with_role(self, *roles):
        names = [name for name, one in self.members().items() if one.get("role") in roles]
        return next((node for node in self.nodes if node.name in names), None)

    def primary(self):
        """The node that takes writes by its own word."""
        for node in self.nodes:
            if node.patroni and node.patroni.poll() is None:
                answer = get(f"http://127.0.0.1:{node.api}/patroni") or {}
                role, state = answer.get("role"), answer.get("state")
                if role in ("master", "primary") and state == "running":
                    return node
        return None

    def synchronous(self):
        return self.node_with_role("sync_standby")

    def wait_primary(self, other_than=None):
        def check():
            found = self.primary()
            return found if found is not other_than else None

        return wait_until("a primary", check, START_SECONDS)

    def is_complete(self):
        """A leader, and all others stream from it, one of them synchronously."""
        members = self.members()
        roles = sorted(one.get("role", "") for one in members.values())
        states = {one.get("state") for one in members.values()}
        timelines = {one.get("timeline") for one in members.values()}
        return (
            len(members) == len(self.nodes)
            and states <= {"running", "streaming"}
            and roles.count("sync_standby") == 1
            and len(timelines) == 1
            and self.is_replicated()
        )

    def is_replicated(self):
        """The same by the primary's word; Patroni's is as old as its last look."""
        primary = self.primary()
        try:
            states = primary.execute(STREAMING).split() if primary else []
        except Failure:
            return False
        return len(states) == len(self.nodes) - 1 and "sync" in states

    def wait_complete(self):
        restart_at = time.monotonic() + STUCK_SECONDS

        def check():
            nonlocal restart_at
            if time.monotonic() > restart_at:
                restart_at += STUCK_SECONDS
                self.restart_patroni()
            return self.is_complete()

        try:
            wait_until("all nodes stream", check, START_SECONDS, 0.3)
        except Failure as error:
            state = json.dumps(self.members(), indent=1)
            tails = "\n".join(
                f"--- {node.name}\n{self.run.log_tail(node.name)}" for node in self.nodes
            )
            raise Failure(f"{error}: {state}\n{tails}") from error

    def restart_patroni(self):
        """Patroni 3.0 can stick to an old version of its synchronous key in etcd."""
        leader = self.primary()
        if leader:
            say(f"{leader.name}: Patroni is started again, since the nodes are not complete")
            leader.patroni.kill()
            leader.patroni.wait()
            leader.start()

    def url(self, ports, database="relay"):
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"postgresql://relay@{hosts}/{database}?target_session_attrs=read-write"

    def create_database(self):
        primary = self.wait_primary()
        primary.execute("CREATE ROLE relay LOGIN")
        primary.execute("CREATE DATABASE relay OWNER relay")

    def stop(self):
        for node in self.nodes:
            if node.patroni:
                node.kill()


if __name__ == "__main__":
    # Shows that a cluster starts and fails over by itself: python database.py
    from processes import Run

    run = Run()
    try:
        programs = Programs()
        begun = time.monotonic()
        cluster = Cluster(run, programs, start_etcd(run, programs.etcd))
        cluster.start()
        cluster.create_database()
        say(f"complete after {time.monotonic() - begun:.1f} s")
        for number in range(int(os.environ.get("FAILOVERS", "2"))):
            primary = cluster.primary()
            killed = time.monotonic()
            (primary.kill if number % 2 == 0 else primary.kill_server)()
            other = cluster.wait_primary(other_than=primary)
            say(f"{primary.name} -> {other.name} after {time.monotonic() - killed:.1f} s")
            if number % 2 == 0:
                primary.start()
            cluster.wait_complete()
            say(f"complete again {time.monotonic() - killed:.1f} s after the kill")
    finally:
        run.end()
