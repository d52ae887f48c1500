"""What callers know, what the sink saw, and whether both agree."""

import collections
import json
import threading
import time

SHARDS = 4

Ack = collections.namedtuple("Ack", "time begin user capture_id ids poisoned number")


class Ledger:
    """Acknowledged captures, by user in the order of their acknowledgement."""

    def __init__(self):
        self.lock = threading.Lock()
        self.acks = []
        self.by_user = collections.defaultdict(list)
        self.codes = collections.Counter()
        self.unexpected = []
        self.duplicates = 0

    def acknowledge(self, user, capture, result, begin):
        ids = tuple(event.message_id for event in result.events)
        with self.lock:
            ack = Ack(
                time.monotonic(), begin, user, capture.capture_id, ids,
                capture.campaign_name == "poisoned", len(self.acks),
            )
            self.acks.append(ack)
            self.by_user[user].append(ack)
            self.duplicates += result.duplicate
            if len(ids) != 2:
                self.unexpected.append(f"{capture.capture_id}: {len(ids)} events in the answer")

    def failed(self, code, details, expected):
        with self.lock:
            self.codes[code] += 1
            if not expected and len(self.unexpected) < 100:
                self.unexpected.append(f"{code}: {details}")

    def count(self):
        return len(self.acks)

    def first_after(self, moment):
        """The first acknowledgement of a call that began after the moment."""
        for ack in reversed(self.acks[-50_000:]):
            if ack.time < moment:
                break
        later = [ack.time for ack in self.acks[-50_000:] if ack.begin > moment]
        return min(later, default=None)


class Deliveries:
    """The sink's record, read as it grows."""

    def __init__(self, path, key_of):
        self.file = open(path, encoding="utf-8")
        self.rest = ""
        self.key_of = key_of
        # When each event was taken first.
        self.taken = {}
        # Place of each event by the begin of the first request that may have delivered it.
        self.places = {}
        self.lanes = collections.defaultdict(list)
        self.statuses = collections.Counter()
        self.repeats = 0
        self.wrong_keys = []

    def read(self):
        """Reads what has been added."""
        text = self.rest + self.file.read()
        *lines, self.rest = text.split("\n")
        for line in lines:
            self.add(json.loads(line))

    def add(self, request):
        self.statuses[request["status"]] += 1
        shards = set()
        for index, (message_id, user_id, _, owner) in enumerate(request["events"]):
            shards.add(int(user_id[:2], 16) % SHARDS)
            if self.key_of.get(owner) != (request["region"], request["key"]):
                self.wrong_keys.append((message_id, owner, request["region"], request["key"]))
            if request["status"] in (0, 200):
                place = (request["number"], index)
                self.places[message_id] = min(self.places.get(message_id, place), place)
            if request["taken"]:
                self.repeats += message_id in self.taken
                self.taken.setdefault(message_id, request["end"])
        for shard in shards:
            lane = (request["region"], request["key"], shard)
            self.lanes[lane].append((request["begin"], request["end"], request["number"]))

    def overlaps(self):
        """Pairs of requests of one lane that were under way at once."""
        found = []
        for lane, requests in self.lanes.items():
            last = None
            for one in sorted(requests):
                if last and one[0] < last[1]:
                    found.append((lane, last, one))
                last = one if not last or one[1] > last[1] else last
        return found


def order_violations(ledger, deliveries):
    """Users whose events arrived in another order than their captures were acknowledged."""
    found = []
    with ledger.lock:
        by_user = {user: list(acks) for user, acks in ledger.by_user.items()}
    for user, acks in by_user.items():
        last = None
        for ack in acks:
            for message_id in ack.ids:
                place = deliveries.places.get(message_id)
                if place is None:
                    continue
                if last and place < last[0]:
                    found.append((user, last[1], message_id))
                last = max(last or (place, message_id), (place, message_id))
    return found


def unsettled(acks, deliveries, dead):
    """Message ids of these acknowledged captures that are neither taken nor dead letters."""
    return [
        message_id
        for ack in acks
        for message_id in ack.ids
        if message_id not in deliveries.taken and message_id not in dead
    ]
