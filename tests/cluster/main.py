"""Three relays on PostgreSQL with fail-over, under load, while things go wrong.

main.py [--short] [--keep] [--only ROUND]...
"""

import argparse
import signal
import sys
import time

import rounds
from harness import Harness
from processes import Failure, Run, complain, say


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="each round once or twice")
    parser.add_argument("--keep", action="store_true", help="keep logs and data at the end")
    names = sorted({name for name, _ in rounds.all_rounds(False)})
    parser.add_argument("--only", action="append", choices=names, help="this round; repeatable")
    return parser.parse_args()


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run, harness, begun = Run(options.keep), None, time.monotonic()
    failed = True
    try:
        harness = Harness(run)
        rounds.play(harness, options.short, options.only)
        failed = bool(harness.violations)
    except Failure as error:
        complain(str(error))
    finally:
        if harness:
            harness.print_table()
            harness.write_ledger()
            for text in harness.violations:
                complain(f"VIOLATION: {text}")
        if failed or options.keep:
            say(f"logs: {run.keep_logs()}")
        run.end()
    say(f"{'FAILED' if failed else 'passed'} after {time.monotonic() - begun:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
