"""Runs the benchmarks: the parts that are named, or all of them. See benches/run."""

import argparse
import json
import signal
import sys
import time

import backlog
import document
import durable
import latency
import machine
import overload
import peers
import profiles
import pure
import served
import tables
import targets
import tracing
from processes import BENCH, Failed, Tools

PARTS = {
    "pure": pure,
    "served": served,
    "durable": durable,
    "latency": latency,
    "peers": peers,
    "backlog": backlog,
    "overload": overload,
    "tracing": tracing,
    "profile": profiles,
}


def arguments():
    parser = argparse.ArgumentParser(prog="benches/run", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; default: all")
    parser.add_argument("--quick", action="store_true", help="short runs and small backlogs: to see that it works")
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md and its plots from the results")
    parser.add_argument("--only-docs", action="store_true", help="the same from the last results, without running anything")
    parser.add_argument("--no-build", action="store_true", help="use what is built already")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.quick and (args.docs or args.only_docs):
        parser.error("figures of a quick run don't belong into the documentation")
    return args


def main():
    args = arguments()
    # Whoever stops it gets the machine back: what was started is ended on the way out.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("benches/run: stopped"))
    BENCH.mkdir(parents=True, exist_ok=True)
    path = BENCH / ("quick.json" if args.quick else "results.json")
    # Parts that are not run again keep what they have.
    results = json.loads(path.read_text()) if path.exists() else {}
    wanted = [] if args.only_docs else args.parts or list(PARTS)
    tools = Tools.build(skip=args.no_build) if wanted else None
    failures = []
    for name in wanted:
        print(f"== {name}", file=sys.stderr, flush=True)
        about, speed = machine.describe(), machine.speed(tools)
        start = time.monotonic()
        try:
            result = PARTS[name].run(tools, args.quick)
        except Failed as failure:
            # The other parts are worth having all the same.
            failures.append(f"{name}: {failure}")
            print(f"benches/run: {failures[-1]}", file=sys.stderr, flush=True)
            continue
        result["took_seconds"] = round(time.monotonic() - start, 1)
        result["machine"] = about | {"speeds": [speed, machine.speed(tools)]}
        if warning := machine.drifted(result["machine"]["speeds"]):
            print(f"benches/run: {name}: {warning}", file=sys.stderr, flush=True)
        results[name] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(tables.render(name, result), flush=True)
    print("\n".join(targets.render(results)))
    print(f"results: {path}")
    if args.docs or args.only_docs:
        document.write(results, path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
