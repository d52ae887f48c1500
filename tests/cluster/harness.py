"""The whole setup, and what holds after every round."""

import collections
import json
import time

import grpc

import load as callers
from control import Helper
from database import Cluster, Programs, start_etcd
from ledger import Deliveries, Ledger, order_violations, unsettled
from processes import Failure, complain, say, wait_until
from relays import Relay, common_settings, init_outbox, postgres_outbox

RELAYS = 3
NODES = 3
# Longest wait for acknowledgements and deliveries to go on.
PATIENCE_SECONDS = 90
# What is acknowledged so long after a fault shows how long lanes stand still.
SETTLED_SPAN_SECONDS = 1
# How many findings of one kind are printed.
SHOWN = 5

Row = collections.namedtuple("Row", "name acknowledged delivered dead accepting settled note")


class Harness:
    """Three nodes, three relays, a sink and the load."""

    def __init__(self, run):
        self.run = run
        self.violations, self.rows = [], []
        self.programs = Programs()
        self.etcd = start_etcd(run, self.programs.etcd)
        self.cluster = Cluster(run, self.programs, self.etcd, count=NODES)
        self.cluster.start()
        self.cluster.create_database()
        say("PostgreSQL: three nodes, one synchronous standby")
        record = run.directory / "sink.jsonl"
        self.sink = Helper(run, "sink", "sink.py", record)
        self.proxy = Helper(run, "proxy", "proxy.py", RELAYS * NODES)
        self.connect(self.cluster)
        self.relays = [self.make_relay(number) for number in range(RELAYS)]
        init_outbox(run, self.relays[0].settings)
        for relay in self.relays:
            relay.start()
        with self.relays[0].channel() as channel:
            for name in callers.INTEGRATIONS:
                callers.create_integration(channel, name)
        say("three relays serve")
        self.ledger = Ledger()
        self.deliveries = Deliveries(record, callers.key_of())
        # Acknowledged captures that are not settled yet, as far as is known.
        self.open, self.seen = [], 0
        self.reported = set()
        self.load = callers.Load(self.ledger, self.relays)

    # The database's side.

    def links(self, relay=None, node=None):
        relays = range(RELAYS) if relay is None else [relay]
        nodes = range(NODES) if node is None else [node]
        return [one * NODES + other for one in relays for other in nodes]

    def connect(self, cluster):
        """The same addresses lead to this cluster from now on."""
        for number, node in enumerate(cluster.nodes):
            self.proxy.ask(links=self.links(node=number), upstream=node.port)

    def network(self, mode, relay=None):
        self.proxy.ask(links=self.links(relay), mode=mode)

    # The relays' side.

    def make_relay(self, number):
        ports = [self.proxy.ready[link] for link in self.links(relay=number)]
        # Each begins with another node.
        ports = ports[number:] + ports[:number]
        outbox = postgres_outbox(self.cluster.url(ports))
        return Relay(self.run, number, common_settings(self.run, self.sink.ready, outbox))

    def any_channel(self):
        for relay in self.relays:
            if relay.expected_to_run and relay.is_serving():
                return relay.channel()
        return None

    def dead_letters(self):
        channel = self.any_channel()
        if channel is None:
            return set()
        with channel:
            try:
                return callers.dead_letters(channel)
            except grpc.RpcError as error:
                say(f"ListDeadLetters: {error.code().name}")
                return set()

    # What holds.

    def violation(self, text):
        self.violations.append(text)
        complain(f"VIOLATION: {text}")

    def refresh_open(self):
        """Takes what is settled off the list of open captures."""
        self.deliveries.read()
        acks = self.ledger.acks
        count = len(acks)
        self.open.extend(acks[self.seen : count])
        self.seen = count
        self.open = [one for one in self.open if unsettled([one], self.deliveries, ())]

    def wait_accepting(self, since):
        """Seconds until a call that began after the moment was acknowledged."""
        found = wait_or_none(lambda: self.ledger.first_after(since))
        if found is None:
            self.violation(f"nothing is acknowledged within {PATIENCE_SECONDS} s")
            return None
        return found - since

    def wait_settled(self, until, since=None):
        """Seconds until all that was acknowledged before the moment is settled."""

        def check():
            self.refresh_open()
            left = [one for one in self.open if one.time <= until]
            if any(one.poisoned for one in left):
                dead = self.dead_letters()
                self.open = [one for one in self.open if unsettled([one], self.deliveries, dead)]
                left = [one for one in left if unsettled([one], self.deliveries, dead)]
            return not left

        if wait_or_none(check, interval=0.2) is None:
            left = [one for one in self.open if one.time <= until]
            dead = self.dead_letters()
            lost = unsettled(left, self.deliveries, dead)
            left = [one for one in left if unsettled([one], self.deliveries, dead)]
            shown = [(one.capture_id, one.ids) for one in left[:SHOWN]]
            self.violation(
                f"{len(lost)} acknowledged events are neither delivered nor dead letters after "
                f"{PATIENCE_SECONDS} s: {shown}"
            )
            # Said once.
            self.open = [one for one in self.open if one.time > until]
            return None
        return time.monotonic() - (since or until)

    def check(self):
        """What has to hold at any time."""
        self.deliveries.read()
        self.report("wrong key", self.deliveries.wrong_keys)
        self.report("requests of one lane at once", self.deliveries.overlaps())
        self.report("out of order", order_violations(self.ledger, self.deliveries))
        self.report("unexpected answer", self.ledger.unexpected)
        for relay in self.relays:
            code = relay.has_died()
            if code is not None:
                tail = self.run.log_tail(relay.name, 5)
                self.violation(f"{relay.name} ended by itself, exit {code}: {tail}")
                relay.start()

    def report(self, what, found):
        """Each finding counts once."""
        new = [one for one in found if (what, repr(one)) not in self.reported]
        self.reported.update((what, repr(one)) for one in new)
        if new:
            self.violation(f"{what}: {len(new)} times: {new[:SHOWN]}")

    # Rounds.

    def round(self, name, fault, repair=None, hold=0, measure_after=False, note=None):
        """A fault, how long it stops what, its repair, and what holds afterwards.

        With measure_after the seconds count from the repair instead of from the fault.
        """
        before = self.counts()
        fault()
        moment = time.monotonic()
        accepting = settled = None
        if not measure_after:
            accepting, settled = self.measure(moment)
        time.sleep(max(0, moment + hold - time.monotonic()))
        text = note(moment) if note else ""
        if repair:
            repair()
        repaired = time.monotonic()
        if measure_after:
            accepting, settled = self.measure(repaired)
        else:
            self.wait_settled(repaired)
        self.check()
        after = self.counts()
        changes = [new - old for new, old in zip(after, before)]
        self.rows.append(Row(name, *changes, accepting, settled, text))
        say(describe(self.rows[-1]))

    def measure(self, since):
        """Seconds until calls are answered again, and until deliveries go on in every lane."""
        accepting = self.wait_accepting(since)
        time.sleep(max(0, since + SETTLED_SPAN_SECONDS - time.monotonic()))
        return accepting, self.wait_settled(since + SETTLED_SPAN_SECONDS, since)

    def counts(self):
        self.deliveries.read()
        return self.ledger.count(), len(self.deliveries.taken), len(self.dead_letters())

    def finish(self):
        """The end of the load, and the last reconciliation."""
        if not self.load.stop():
            self.violation("calls are under way 60 s after the end of the load")
        self.wait_settled(time.monotonic())
        self.check()
        dead = self.dead_letters()
        both = [one for one in dead if one in self.deliveries.taken]
        if both:
            self.violation(f"delivered and dead letters: {both[:SHOWN]}")
        fine = [
            one.capture_id
            for one in self.ledger.acks
            if not one.poisoned and any(message_id in dead for message_id in one.ids)
        ]
        if fine:
            self.violation(f"dead letters, though the sink never refused them: {fine[:SHOWN]}")

    def write_ledger(self):
        with open(self.run.directory / "ledger.jsonl", "w", encoding="utf-8") as file:
            for ack in self.ledger.acks:
                file.write(json.dumps(ack._asdict()) + "\n")

    def print_table(self):
        self.deliveries.read()
        print(f"\n{'round':44} {'acked':>7} {'events':>7} {'dead':>5} {'accept':>8} {'settled':>8}")
        for row in self.rows:
            print(describe(row))
        print(
            f"\n{self.ledger.count()} captures acknowledged ({self.ledger.duplicates} as "
            f"duplicates), {len(self.deliveries.taken)} events delivered, "
            f"{self.deliveries.repeats} repeated; failed calls: {dict(self.ledger.codes)}; "
            f"answers of the sink: {dict(self.deliveries.statuses)}"
        )


def describe(row):
    seconds = [f"{one:7.1f}s" if one is not None else "       -" for one in row[4:6]]
    counts = f"{row.acknowledged:7} {row.delivered:7} {row.dead:5}"
    return f"{row.name:44} {counts} {' '.join(seconds)} {row.note}".rstrip()


def wait_or_none(check, interval=0.1):
    try:
        return wait_until("", check, PATIENCE_SECONDS, interval)
    except Failure:
        return None
