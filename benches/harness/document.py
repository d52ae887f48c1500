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
    # What was not measured again keeps its rows and its line.
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section(text, "targets").splitlines() if line]
    text = fill(text, "targets", "\n".join(targets.render(results, rows)))
    text = fill(text, "machine", "\n\n".join([*earlier(section(text, "machine"), results), *machines(results)]))
    PAGE.write_text(text)
    PLOTS.mkdir(exist_ok=True)
    from peers import venv

    python = venv(HERE / "requirements.txt", BENCH / "plots")
    subprocess.run([python, str(HERE / "plots.py"), str(source), str(PLOTS)], check=True)
    say(f"{PAGE.relative_to(ROOT)} and {PLOTS.relative_to(ROOT)}/*.svg are written")


def fill(text, name, content):
    section(text, name)
    begin, end = markers(name)
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content.strip()}\n{end}", text, flags=re.DOTALL)


def section(text, name):
    """What stands between the markers."""
    begin, end = markers(name)
    found = re.search(f"{begin}(.*?){end}", text, re.DOTALL)
    if not found:
        raise Failed(f"{PAGE.name} has no markers for {name}")
    return found[1]


def markers(name):
    return f"<!-- {name}: written by benches/run --docs -->", f"<!-- end of {name} -->"


def earlier(lines, results):
    """The lines of earlier runs, with the parts that are not measured again."""
    for line in filter(None, lines.splitlines()):
        about, _, parts = line.rpartition(": ")
        kept = [part for part in parts.rstrip(".").split(", ") if part.split(" ")[0] not in results]
        if kept:
            yield f"{about}: {', '.join(kept)}."


def machines(results):
    """One line for each state of the machine and the code; one in all where everything was measured in one run."""
    parts = {}
    for name, result in results.items():
        about = result["machine"]
        line = (
            f"{about['cores']} cores ({about['cpu']}), Linux {about['kernel']}, {about['rustc']}, release with fat LTO, "
            f"commit {about['commit']}, {about['date']}"
        )
        speeds = "/".join(f"{speed / 1000:.0f}k" for speed in about.get("speeds", [])) or "not measured"
        parts.setdefault(line, []).append(f"{name} ({about['load_before']:.1f}; {speeds})")
    for line, names in parts.items():
        yield (
            f"{line}. Load average of the 15 minutes before each part, the benchmark's own parts included, and how fast the machine "
            f"was before and after it, in captures/s of the pure path's reference: {', '.join(names)}."
        )
