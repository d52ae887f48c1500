"""Fills docs/performance.md, between its markers, and draws its plots."""

import pathlib
import re
import subprocess

import tables
import targets
from processes import BENCH, ROOT, Failed, say

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
TITLES = (
    ("throughput", "served", "Calls a second over calls in flight"),
    ("latency", "served", "Latency by percentile"),
    ("backlog", "backlog", "Memory over the backlog"),
    ("flames", "profile", "The relay's CPU time as a flame graph: unary, 256 in flight"),
    ("peers", "peers", "CPU seconds for a million events"),
)
HERE = pathlib.Path(__file__).resolve().parent


def write(results, source):
    text = PAGE.read_text()
    for name, result in results.items():
        images = [f"![{title}](performance/{plot}.svg)" for plot, part, title in TITLES if part == name]
        text = fill(text, name, "\n".join([tables.render(name, result), *images]))
    text = fill(text, "targets", "\n".join(targets.render(results)))
    text = fill(text, "machine", "\n\n".join(machines(results)))
    PAGE.write_text(text)
    PLOTS.mkdir(exist_ok=True)
    from peers import venv

    python = venv(HERE / "requirements.txt", BENCH / "plots")
    subprocess.run([python, str(HERE / "plots.py"), str(source), str(PLOTS)], check=True)
    say(f"{PAGE.relative_to(ROOT)} and {PLOTS.relative_to(ROOT)}/*.svg are written")


def fill(text, name, content):
    begin, end = f"<!-- {name}: written by benches/run --docs -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise Failed(f"{PAGE.name} has no markers for {name}")
    return pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", text)


def machines(results):
    """One line for each state of the machine and the code; one in all where everything was measured in one run."""
    parts = {}
    for name, result in results.items():
        about = result["machine"]
        line = (
            f"{about['cores']} cores ({about['cpu']}), Linux {about['kernel']}, {about['rustc']}, release with fat LTO, "
            f"commit {about['commit']}, {about['date']}"
        )
        parts.setdefault(line, []).append(f"{name} ({about['load_before']:.1f})")
    for line, names in parts.items():
        yield f"{line}. Load average of the 15 minutes before each part, the benchmark's own parts included: {', '.join(names)}."
