"""What goes wrong, one thing after the other."""

import signal
import subprocess
import time

import grpc
from jebbit.segmentrelay.v1 import integration_service_pb2, integration_service_pb2_grpc

import load as callers
from changes import changes
from database import Cluster
from processes import Failure, wait_until
from relays import LEASE_SECONDS, faketime_library

# Captures that nobody can have stored twice must not be acknowledged for so long.
NO_STANDBY_SECONDS = 15
STALL_SECONDS = LEASE_SECONDS + 4
CLOCK_SECONDS = 300
# Until then relays have found a primary that serves.
HEALTHY_SECONDS = 15
# Until then relays have noticed that the database is another one.
NOTICE_SECONDS = 20
# Relays that differ: the lease of one that waits long must not be judged by another's time.
TIMEOUTS_MS = (800, 3000, 10000)
SLOW_MS = 7000


def quiet(h):
    """Nothing goes wrong."""
    h.round("nothing goes wrong", lambda: None, hold=5)


def kill_relay(h, number, **start):
    relay = h.relays[number % len(h.relays)]
    h.round(f"kill -9 of {relay.name}", relay.kill, lambda: relay.start(**start))


def pause_relay(h, number):
    relay = h.relays[number % len(h.relays)]
    h.round(
        f"{relay.name} paused past its lease", relay.pause, relay.resume, hold=LEASE_SECONDS + 2
    )


def kill_primary(h, number):
    """In turns a power loss of the node, and the end of the server's processes alone."""
    primary = h.cluster.wait_primary()
    whole = number % 2 == 0

    def repair():
        # Without a fail-over it would only have been a restart.
        h.cluster.wait_primary(other_than=primary)
        if whole:
            primary.start()
        h.cluster.wait_complete()

    what = "node" if whole else "server"
    fault = primary.kill if whole else primary.kill_server
    h.round(f"kill -9 of the primary ({what})", fault, repair)


def pause_primary(h):
    """The node hangs: its connections stay open, and nothing is answered."""
    primary = h.cluster.wait_primary()

    def note(_):
        # Some list the node that hangs before the one that serves.
        away = [relay.name for relay in h.relays if not becomes_healthy(relay)]
        if away:
            h.violation(f"{primary.name} hangs, another serves: {away} do not find it")
        return f"without a database meanwhile: {len(away)}"

    def repair():
        h.cluster.wait_primary(other_than=primary)
        # Fenced, as a watchdog does: a leader that comes to itself takes its lock in etcd
        # back from the new one (Patroni 3.0.2), and acknowledged writes are lost.
        primary.kill()
        primary.start()
        h.cluster.wait_complete()

    h.round("the primary hangs", lambda: primary.signal(signal.SIGSTOP), repair, note=note)


def becomes_healthy(relay):
    try:
        return wait_until(relay.name, relay.is_serving, HEALTHY_SECONDS)
    except Failure:
        return False


def standby_down(h):
    standby = wait_until("a synchronous standby", h.cluster.synchronous, 30)

    def repair():
        standby.start()
        h.cluster.wait_complete()

    h.round("the synchronous standby is down", standby.kill, repair)


def no_standby(h):
    """Without a synchronous standby nothing is acknowledged: refused, not weakened."""
    primary = h.cluster.wait_primary()
    standbys = [node for node in h.cluster.nodes if node is not primary]

    def fault():
        for node in standbys:
            node.kill()

    def note(moment):
        weak = [one for one in h.ledger.acks if one.begin > moment]
        if weak:
            h.violation(f"{len(weak)} captures acknowledged without a synchronous standby")
        states = {relay.name: relay.health() for relay in h.relays}
        return f"acknowledged meanwhile: {len(weak)}; health {sorted(set(states.values()))}"

    def repair():
        for node in standbys:
            node.start()
        h.cluster.wait_complete()

    h.round(
        f"no standby for {NO_STANDBY_SECONDS} s",
        fault,
        repair,
        hold=NO_STANDBY_SECONDS,
        measure_after=True,
        note=note,
    )


def network(h, mode, relay):
    """One relay without the database, or (None) all of them."""
    who = "all relays" if relay is None else h.relays[relay].name
    h.round(
        f"network {mode} for {STALL_SECONDS:.0f} s: {who}",
        lambda: h.network(mode, relay),
        lambda: h.network("pass", relay),
        hold=STALL_SECONDS,
        measure_after=relay is None,
    )


def restart_all(h, each=None):
    """Drains and starts one relay after the other."""
    for number, relay in enumerate(h.relays):
        code, seconds = relay.drain()
        if code != 0:
            h.violation(f"{relay.name}: exit {code} after SIGTERM, {seconds:.1f} s")
        relay.start(**(each[number] if each else {}))


def rolling_restart(h):
    h.round("rolling restart", lambda: restart_all(h))


def clocks(h):
    """Two relays with clocks five minutes off, one of them killed, the other paused."""
    if faketime_library() is None:
        raise Failure("libfaketime.so.1 is missing: install your system's libfaketime package")
    off = [{"clock_seconds": CLOCK_SECONDS}, {"clock_seconds": -CLOCK_SECONDS}, {}]
    h.round("clocks 300 s ahead and behind", lambda: restart_all(h, off), hold=3)
    kill_relay(h, 0, **off[0])
    pause_relay(h, 1)
    kill_relay(h, 1, **off[1])
    h.round("clocks right again", lambda: restart_all(h))


def different_settings(h):
    """A paused relay's slow requests outlive what its neighbours would wait for."""
    each = [{"segment__request_timeout_ms": one} for one in TIMEOUTS_MS]

    def fault():
        restart_all(h, each)
        time.sleep(2)
        h.sink.ask(delay_ms=SLOW_MS)
        time.sleep(2)
        h.relays[2].pause()
        time.sleep(6)
        h.relays[2].resume()
        time.sleep(2)

    def repair():
        h.sink.ask(delay_ms=15)

    h.round(f"request_timeout_ms of {TIMEOUTS_MS}", fault, repair, measure_after=True)
    h.round("the same settings again", lambda: restart_all(h))


def failing_endpoint(h):
    """Segment answers 503 to half and loses the answers to some."""
    h.round(
        "half of the requests fail, answers are lost",
        lambda: h.sink.ask(share=0.5, lost_share=0.1),
        lambda: h.sink.ask(share=0.0, lost_share=0.0),
        hold=5,
        measure_after=True,
    )


def client(h, program, *arguments):
    """A client program of PostgreSQL at the primary."""
    command = [h.programs.postgres / program, "-h", "127.0.0.1"]
    done = subprocess.run(
        [*command, *(str(one) for one in arguments)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise Failure(f"{program}: {done.stderr}")


class Backup:
    """A backup that is taken while captures arrive and wait."""

    def __init__(self, h, kind):
        self.h, self.kind = h, kind
        self.path = h.run.folder(f"backup-{kind}", of_server=True)
        primary = h.cluster.wait_primary()
        h.sink.ask(share=1.0)
        time.sleep(2)
        # What was acknowledged until here is in the backup.
        self.moment = time.monotonic()
        at = ["-p", primary.port, "-U", "postgres"]
        if kind == "dump":
            client(h, "pg_dump", *at, "-Fc", "-d", "relay", "-f", self.path / "relay.dump")
        else:
            client(h, "pg_basebackup", *at, "-X", "stream", "-c", "fast", "-D", self.path / "data")
            own(h, self.path / "data")
        h.sink.ask(share=0.0)

    def bootstrap(self):
        """How Patroni makes the first node of the new cluster."""
        if self.kind == "dump":
            return {}
        copy = {
            # Patroni adds --scope and --datadir: $0 and $1 of the script.
            "command": f"/bin/sh -c 'cp -a {self.path}/data \"${{1#--datadir=}}\"'",
            "recovery_conf": {
                "recovery_target_action": "promote",
                "recovery_target_timeline": "latest",
                "restore_command": "/bin/false",
            },
        }
        return {"method": "copy", "copy": copy}

    def load_into(self, cluster):
        if self.kind == "dump":
            cluster.create_database()
            at = ["-p", cluster.primary().port, "-U", "postgres"]
            client(self.h, "pg_restore", *at, "-d", "relay", self.path / "relay.dump")


def own(h, path):
    if h.run.user:
        ids = f"{h.run.user.pw_uid}:{h.run.user.pw_gid}"
        subprocess.run(["chown", "-R", ids, str(path)], check=True)


def knows(relay, name):
    with relay.channel() as channel:
        stub = integration_service_pb2_grpc.IntegrationServiceStub(channel)
        request = integration_service_pb2.GetIntegrationRequest(integration_id=name)
        try:
            stub.GetIntegration(request, timeout=5)
            return "known"
        except grpc.RpcError as error:
            return error.code().name


def restore(h, kind):
    """The cluster is lost; a backup of it takes its place behind the same addresses."""
    old, backup = h.cluster, Backup(h, kind)
    name = f"after-the-{kind}"
    with h.relays[0].channel() as channel:
        callers.create_integration(channel, name)
    time.sleep(3)
    new = Cluster(h.run, h.programs, h.etcd, scope=f"restored-{kind}")

    noticed = []

    def fault():
        lost_from = backup.moment
        old.stop()
        # Answers that were under way are noted late.
        time.sleep(2)
        lost_to = time.monotonic()
        new.start(backup.bootstrap())
        backup.load_into(new)
        # What was acknowledged since the backup is lost with the old cluster.
        h.refresh_open()
        h.open = [one for one in h.open if not lost_from < one.time <= lost_to]
        h.cluster = new
        h.connect(new)
        # Changes count on from the backup: a count that was there before says other things now.
        create_when_up(h, f"since-the-{kind}")
        noticed.append(wait_noticed(h, name, f"since-the-{kind}"))

    def note(_):
        return noticed[0]

    h.round(f"restore of a backup ({kind})", fault, note=note)


def create_when_up(h, name):
    def check():
        try:
            with h.relays[0].channel() as channel:
                callers.create_integration(channel, name)
            return True
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.ALREADY_EXISTS

    wait_until("an integration is created", check, 60)


def wait_noticed(h, old, new):
    """Until all relays know what the restored database holds, and nothing else."""
    begun, states = time.monotonic(), {}
    while time.monotonic() < begun + NOTICE_SECONDS:
        states = {relay.name: (knows(relay, old), knows(relay, new)) for relay in h.relays}
        if set(states.values()) == {("NOT_FOUND", "known")}:
            return f"noticed after {time.monotonic() - begun:.1f} s"
        time.sleep(0.2)
    h.violation(f"{old} is not in the backup, {new} was created since; relays say {states}")
    return "not noticed"


def all_rounds(short):
    """Name and function of each round."""
    kills, pauses, failovers, hangs = (2, 1, 2, 1) if short else (20, 10, 10, 3)
    relays = (1, None) if short else (0, 1, 2, None)
    rounds = [("quiet", quiet), ("changes", changes)]
    rounds += [("kill-relay", lambda h, n=n: kill_relay(h, n)) for n in range(kills)]
    rounds += [("pause-relay", lambda h, n=n: pause_relay(h, n + 2)) for n in range(pauses)]
    rounds += [("kill-primary", lambda h, n=n: kill_primary(h, n)) for n in range(failovers)]
    rounds += [("pause-primary", pause_primary)] * hangs
    rounds += [("standby-down", standby_down), ("no-standby", no_standby)]
    rounds += [("failing-endpoint", failing_endpoint)]
    for mode in ("stall", "cut"):
        rounds += [(mode, lambda h, m=mode, one=one: network(h, m, one)) for one in relays]
    rounds += [("rolling-restart", rolling_restart), ("clocks", clocks)]
    rounds += [("different-settings", different_settings)]
    rounds += [("restore-dump", lambda h: restore(h, "dump"))]
    if not short:
        rounds += [("restore-basebackup", lambda h: restore(h, "basebackup"))]
    return rounds


def play(h, short, only):
    h.load.resume()
    for name, one in all_rounds(short):
        if not only or name in only:
            one(h)
    h.finish()
