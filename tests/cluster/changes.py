"""Changes at one relay, and captures at another right after the answer."""

import collections

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from jebbit.segmentrelay.v1 import (
    delivery_pb2,
    integration_pb2,
    integration_service_pb2,
    integration_service_pb2_grpc,
    segment_relay_pb2,
)

import load as callers

CHANGES = 20
CALL_SECONDS = 10


class Visitor:
    """The stubs of one relay."""

    def __init__(self, relay):
        self.channel = relay.channel()
        self.captures = callers.segment_relay_pb2_grpc.SegmentRelayStub(self.channel)
        self.integrations = integration_service_pb2_grpc.IntegrationServiceStub(self.channel)

    def capture(self, user):
        request = segment_relay_pb2.CaptureRequest(
            integration_id=user.integration, capture=user.next_capture()
        )
        user.pending = None
        return self.captures.Capture(request, timeout=CALL_SECONDS).result

    def update(self, name, **fields):
        integration = integration_pb2.Integration(integration_id=name, **fields)
        request = integration_service_pb2.UpdateIntegrationRequest(
            integration=integration, update_mask=FieldMask(paths=list(fields))
        )
        self.integrations.UpdateIntegration(request, timeout=CALL_SECONDS)


def attempt(wrong, what, call):
    """Counts a failure under the name of what was tried."""
    try:
        return call()
    except grpc.RpcError as error:
        wrong[f"{what}: {error.code().name}"] += 1
        return None


def try_changes(h):
    """Counts what a capture at another relay did not know of the change before it."""
    wrong = collections.Counter()
    visitors = [Visitor(relay) for relay in h.relays]
    for number in range(CHANGES):
        one, other, third = (visitors[(number + step) % 3] for step in range(3))
        name = f"change-{number}"
        user = callers.User(f"user-of-{name}", 0)
        user.integration, user.region = name, "non_eu"
        h.deliveries.key_of[f"{name}/non_eu"] = ("non_eu", callers.write_key(name, "non_eu"))
        attempt(wrong, "create", lambda: callers.create_integration(one.channel, name))
        attempt(wrong, "capture after a creation", lambda: other.capture(user))
        attempt(wrong, "update without an etag", lambda: other.update(name, enabled=False))
        result = attempt(wrong, "capture after an update", lambda: third.capture(user))
        skipped = delivery_pb2.DELIVERY_STATE_SKIPPED
        if result and any(event.state != skipped for event in result.events):
            wrong["capture after enabled = false was not skipped"] += 1
        attempt(wrong, "update without an etag", lambda: one.update(name, display_name="other"))
    for visitor in visitors:
        visitor.channel.close()
    return wrong


def changes(h):
    def fault():
        wrong = try_changes(h)
        if wrong:
            h.violation(f"{CHANGES} changes at one relay, captures at another: {dict(wrong)}")

    h.round("changes hold at every relay at once", fault)
