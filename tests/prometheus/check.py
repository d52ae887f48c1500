"""The rules, the dashboard and the relay's metrics against a real Prometheus.

check.py SEGMENT_RELAY PROMETHEUS PROMTOOL

Checks the rules with promtool and runs their unit tests. Then starts a sandbox, a
relay and a Prometheus on free ports of this machine, brings some captures to every
end that they can have, and asks Prometheus: is the relay scraped, are all rules in
order, does every expression of the dashboard find something, and does every name
in a rule exist.
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PATIENCE_SECONDS = 60
# Metrics of the outbox on PostgreSQL; the relay of this check has the embedded one.
OF_POSTGRES = {"segment_relay_outbox_database_available"}

relay_bin, prometheus_bin, promtool_bin = (str(Path(arg).resolve()) for arg in sys.argv[1:4])
started = []


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(*command, env=None):
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    started.append(process)
    return process


def fetch(url, body=None, method=None):
    request = urllib.request.Request(url, data=body, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def eventually(what, check):
    """Asks again until the check finds something, for a bounded time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            found = check()
        except OSError:
            found = None
        if found:
            return found
        if time.monotonic() > deadline:
            sys.exit(f"check.py: {what}: not within {PATIENCE_SECONDS} s")
        time.sleep(0.2)


def relay(*arguments, expect=0):
    done = subprocess.run([relay_bin, *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode != expect:
        sys.exit(f"check.py: {arguments}: exit {done.returncode}: {done.stderr}")


def bring_captures(address, control):
    """Captures that are delivered, refused, given up, and such as still wait."""
    number = iter(range(1000))

    def capture(*more, email="a@example.com", expect=0):
        relay(
            "capture", "--address", address, "--integration", "acme", "--campaign-id", "c",
            "--session-id", f"s-{next(number)}", "--email", email, *more, expect=expect,
        )

    def fault(rule):
        fetch(f"http://{control}/control", json.dumps(rule).encode(), "PUT")

    for _ in range(3):
        capture("--wait", "delivered")
    capture(email="nobody", expect=1)
    refused = "refused@example.com"
    fault({"reject_containing": hashlib.sha256(refused.encode()).hexdigest(), "reject_status": 402})
    capture(email=refused)

    def is_given_up():
        # What is taken of others shows that it is the events' fault.
        capture("--wait", "delivered")
        listed = subprocess.run(
            [relay_bin, "dead-letters", "list", "--address", address],
            capture_output=True, text=True, timeout=60, check=True,
        )
        return listed.stdout.count("REQUEST_REJECTED") == 2

    eventually("a refused capture is given up", is_given_up)
    fault({"status": 503})
    for _ in range(2):
        capture()


def run(directory):
    ports = {name: free_port() for name in ("non_eu", "eu", "relay", "metrics", "prometheus")}
    control = f"127.0.0.1:{ports['non_eu']}"
    start(relay_bin, "sandbox", "--listen", control, "--eu-listen", f"127.0.0.1:{ports['eu']}", "--quiet")
    eventually("the sandbox serves", lambda: fetch(f"http://{control}/stats"))
    config = directory / "relay.toml"
    config.write_text(
        f"""
[server]
listen = "127.0.0.1:{ports['relay']}"
[metrics]
listen = "127.0.0.1:{ports['metrics']}"
[outbox]
path = "{directory}/outbox"
[secrets]
key_file = "{directory}/key"
[segment.endpoints]
non_eu = "http://{control}/v1/batch"
eu = "http://127.0.0.1:{ports['eu']}/v1/batch"
[[integrations]]
integration_id = "acme"
[[integrations.credentials]]
data_region = "non_eu"
write_key = "a-key-for-the-sandbox"
"""
    )
    serving = start(relay_bin, "serve", "--config", str(config))
    if not serving.stdout.readline():
        sys.exit("check.py: the relay did not start")
    address = f"http://127.0.0.1:{ports['relay']}"
    bring_captures(address, control)

    settings = (DEPLOY / "prometheus/prometheus.yml").read_text()
    settings = settings.replace("15s", "1s").replace("127.0.0.1:9464", f"127.0.0.1:{ports['metrics']}")
    (directory / "prometheus.yml").write_text(settings)
    (directory / "rules.yml").write_text((DEPLOY / "prometheus/rules.yml").read_text())
    start(
        prometheus_bin, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}", "--log.level=error",
    )
    base = f"http://127.0.0.1:{ports['prometheus']}/api/v1"

    def query(expression):
        answer = json.loads(fetch(f"{base}/query?{urllib.parse.urlencode({'query': expression})}"))
        return answer["data"]["result"]

    eventually("the relay is scraped", lambda: query('up{job="segment-relay"} == 1'))

    def rules_in_order():
        groups = json.loads(fetch(f"{base}/rules"))["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if rules and all(rule["health"] == "ok" for rule in rules) else None

    rules = eventually("all rules are in order", rules_in_order)
    names = set()
    for rule in rules:
        names |= set(re.findall(r"\b((?:segment_relay|http_client|rpc_server|process)_\w+)", rule["query"]))
    for name in sorted(names - OF_POSTGRES):
        eventually(f"the metric {name} of a rule exists", lambda name=name: query(f"count({name})"))

    board = json.loads((DEPLOY / "grafana/segment-relay.json").read_text())
    expressions = [one["expr"] for panel in board["panels"] for one in panel.get("targets", [])]
    for expression in expressions:
        if any(name in expression for name in OF_POSTGRES):
            continue
        asked = expression.replace("$__rate_interval", "1m")
        asked = asked.replace("$instance", ".*").replace("$integration", ".*")
        eventually(f"the dashboard's {expression} finds something", lambda asked=asked: query(asked))
    # Steady counters increase by nothing: so it was found, and is told.
    eventually(
        "the dead letters raise their alert",
        lambda: query('ALERTS{alertname="SegmentRelayDeadLetters", integration="acme"}'),
    )
    if len(expressions) < 20 or len(names) < 8:
        sys.exit(f"check.py: only {len(expressions)} expressions and {len(names)} names were found")
    print(f"prometheus: {len(rules)} rules in order, {len(expressions)} expressions of the dashboard find data")


def main():
    for command in (
        [promtool_bin, "check", "config", str(DEPLOY / "prometheus/prometheus.yml")],
        [promtool_bin, "test", "rules", str(DEPLOY / "prometheus/rules.test.yml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            sys.exit(f"check.py: {' '.join(command[1:3])}: {done.stdout}{done.stderr}")
    with tempfile.TemporaryDirectory() as directory:
        try:
            run(Path(directory))
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGKILL)
                process.wait()


main()
