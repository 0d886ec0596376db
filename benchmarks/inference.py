"""Packed networks and their layers against torch, onnxruntime and OpenVINO on the same cores.

    python benchmarks/inference.py                              # all that the JSON does not have yet; hours
    python benchmarks/inference.py --only 'conv-*' --threads 1 --batches 1
    python benchmarks/inference.py --only resnet18-224-w1a1 --seconds 5 --again --out /tmp/trial
    python benchmarks/inference.py --table                      # write the table again from the JSON

Every setting (a case, a number of threads, a batch) is a process of its own, bound to as many cores as it has threads,
in which all engines take turns (abste.bench.measure.by_turns). Each engine's output is checked first: floats against
torch's, binary networks against ours, and ours against torch with the same signs; one that is wrong, or missing, is
left out, and the table says so. Weights are random: speed does not depend on them.

A convolution is one of a chain of nine. Ours is timed node by node, packed in and out, without the ends of the chain.
Of the others counts what is best for them: a ninth of the chain, a single layer, the difference of the two over eight,
and for OpenVINO's binary layers also its own clock. A linear layer is one of a chain of three, or a single one, for
ours too. Memory is the rise of the peak of resident memory from imports to the first answer, each engine with its own
file, in a new process. Writes OUT.json, setting by setting, and OUT.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "results" / "inference"
PACKAGES = ("abste", "numpy", "torch", "onnx", "onnxruntime", "openvino")
MEMORY = "memory-resnet18-32-w1a1"


@dataclass
class Target:
    """Something that is promised of some cases.

    Attributes:
        what: in words.
        cases: which, with wildcards.
        kind: which of our engines, as in ``W1A1``. A network's ``W1A8`` has all of its float layers in int8, and one
            ``, int8 stem`` the first one.
        against: a precision of other engines, of which the fastest counts; ``W1A1``: our own; ``threads``: our own
            with one thread; ``bytes``: onnxruntime's memory.
        must, aim: how many times as fast, or (``most``) how many times the time at most; None where nothing is said.
        isa: of ours; None for the fastest.
        most: the ratio is the time over that of the other, and small is good.
        threads: of the setting.
    """

    what: str
    cases: str
    kind: str
    against: str
    must: float | None
    aim: float | None
    isa: str | None = None
    most: bool = False
    threads: int = 1


TARGETS = [
    Target("W1A1 3x3 convolution, >= 128 channels, packed in and out", "conv-[125]*", "W1A1", "float32", 15, 20),
    Target("", "conv-[125]*", "W1A1", "int8", 4, 5.5),
    Target("", "conv-[125]*", "W1A1", "binary", 1.0, 1.2),
    Target("the same with batch norm, residual and sign", "conv-[125]*", "W1A1 fused", "W1A1", 1.15, 1.03, most=True),
    Target("W1A1 3x3 convolution, >= 128 channels, AVX2", "conv-[125]*", "W1A1", "float32", 7, 10, isa="avx2"),
    Target("W1A32 3x3 convolution", "conv-*", "W1A32", "float32", 1.7, 2.2),
    Target("", "conv-*", "W1A32", "bf16", None, 1.0),
    Target("W1A8 3x3 convolution", "conv-*", "W1A8", "int8", 0.9, 1.0),
    Target("GEMV 4096, W1A32", "gemv-4096", "W1A32", "float32", 12, 20),
    Target("GEMV 4096, W1A1", "gemv-4096", "W1A1", "float32", 75, 110),
    Target("ResNet-18, 224x224, W1A1", "resnet18-224-w1a1", "W1A1", "float32", 6, 9),
    Target("", "resnet18-224-w1a1", "W1A1", "int8", None, 2.5),
    Target("", "resnet18-224-w1a1", "W1A1", "binary", 1.0, 1.4),
    Target("ResNet-18, CIFAR, W1A32", "resnet18-32-w1a32", "W1A32", "float32", 1.6, 2.1),
    Target("ResNet-18, 224x224, second core", "resnet18-224-w1a1", "W1A1", "threads", 1.6, 1.85, threads=2),
    Target("memory to the first answer, ResNet-18, CIFAR, W1A1", MEMORY, "", "bytes", 8, 12),
]

Rows = dict[str, dict[str, Any]]


def key(case: str, threads: int, batch: int) -> str:
    return f"{case}, {threads} thread{'s' * (threads > 1)}, batch {batch}"


def circumstances() -> dict[str, Any]:
    """The machine and the versions, without importing any of what is measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    machine = {"processor": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return {"machine": {**machine, "system": platform.platform(terse=True)}, "versions": versions}


def child(wanted: dict[str, Any]) -> None:
    """Measure one setting here, and print it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: wanted["threads"]])  # before threads are made
    import _inference

    case = wanted["case"]
    if case.startswith("memory-"):
        row = _inference.memory(case.removeprefix("memory-"), wanted["engines"], max(3, int(wanted["seconds"] / 8)))
    else:
        setting = _inference.Setting(case, wanted["threads"], wanted["batch"], wanted["engines"])
        row = setting.measure(wanted["seconds"])
    print(json.dumps({**row, "seconds": wanted["seconds"]}))


def run_child(wanted: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(wanted)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(wanted["threads"])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{key(wanted['case'], wanted['threads'], wanted['batch'])}: failed; its words are above.")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


# The table


def ours(row: dict[str, Any], kind: str, isa: str | None) -> dict[str, Any] | None:
    """Our engine of a kind: of an instruction set, or the fastest."""
    found = [
        engine
        for name, engine in row["engines"].items()
        if name.startswith("abste ") and engine["precision"] == kind and isa in (None, name.split()[1])
    ]
    return min(found, key=lambda engine: engine["median"], default=None)


def fastest(row: dict[str, Any], precision: str) -> tuple[str, dict[str, Any]] | None:
    """The fastest other engine in a precision."""
    found = [
        (name, engine)
        for name, engine in row["engines"].items()
        if not name.startswith("abste") and engine["precision"] == precision
    ]
    return min(found, key=lambda item: item[1]["median"], default=None)


def ratio(target: Target, row: dict[str, Any], rows: Rows) -> tuple[float, bool] | None:
    """What a target speaks of, in one row, and whether it was contended; None where it was not measured."""
    if target.against == "bytes":
        engines = row["engines"]
        if "onnxruntime" not in engines:
            return None
        return engines["onnxruntime"]["bytes"] / engines["abste"]["bytes"], False
    mine = ours(row, target.kind, target.isa)
    if mine is None:
        return None
    if target.against == "threads":
        alone = rows.get(key(row["case"], 1, row["batch"]))
        other = alone and ours(alone, target.kind, target.isa)
    elif target.most:
        other = ours(row, target.against, target.isa)
    else:
        found = fastest(row, target.against)
        other = found and found[1]
    if not other:
        return None
    value = mine["median"] / other["median"] if target.most else other["median"] / mine["median"]
    return value, mine["contended"] or other["contended"]


def verdict(target: Target, worst: float) -> str:
    def reached(bound: float) -> bool:
        return worst <= bound if target.most else worst >= bound

    if target.aim is not None and reached(target.aim):
        return "aim"
    if target.must is None:
        return "below aim"
    return "must" if reached(target.must) else "**below must**"


def targets_table(rows: Rows) -> list[str]:
    lines = [
        "| what | against | must | aim | worst | all | reached |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    words = {
        "float32": "fastest float32",
        "bf16": "fastest bf16",
        "int8": "fastest int8",
        "binary": "OpenVINO, binary",
        "W1A1": "without them",
        "threads": "one core",
        "bytes": "onnxruntime, float32",
    }
    for target in TARGETS:
        found = {}
        for row in rows.values():
            if fnmatch.fnmatch(row["case"], target.cases) and (row["threads"], row["batch"]) == (target.threads, 1):
                value = ratio(target, row, rows)
                if value is not None:
                    found[row["case"].partition("-")[2]] = value
        bounds = ["-" if bound is None else f"{bound:g}" for bound in (target.must, target.aim)]
        head = f"| {target.what} | {words[target.against]} | {bounds[0]} | {bounds[1]} |"
        if not found:
            lines.append(f"{head} - | | not measured |")
            continue
        worst = (max if target.most else min)(found.values())
        each = [f"{case} {value:.2f}{'~' * contended}" for case, (value, contended) in found.items()]
        shown = ", ".join(each) if len(each) > 1 else ""
        lines.append(f"{head} {worst[0]:.2f}{'~' * worst[1]} | {shown} | {verdict(target, worst[0])} |")
    return lines


def microseconds(engine: dict[str, Any]) -> str:
    digits = 1 if engine["median"] < 1e-3 else 0
    return f"{1e6 * engine['median']:,.{digits}f}{'~' * engine['contended']}"


def macs(case: str) -> int | None:
    kind, _, rest = case.partition("-")
    channels, _, size = rest.partition("@")
    if kind not in ("conv", "gemv"):
        return None
    return int(channels) ** 2 * (9 * int(size) ** 2 if size else 1)


def settings_table(rows: Rows) -> list[str]:
    head = ["case", "threads", "batch", "ours", "us", "GOP/s", "float32", "bf16", "int8", "OpenVINO binary"]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | --- " + "| ---: " * 6 + "|"]
    for row in rows.values():
        if row["case"].startswith("memory"):
            continue
        others = [fastest(row, precision) for precision in ("float32", "bf16", "int8", "binary")]
        work = macs(row["case"])
        for name, engine in row["engines"].items():
            if not name.startswith("abste"):
                continue
            cells = [row["case"], str(row["threads"]), str(row["batch"]), name.removeprefix("abste ")]
            cells += [microseconds(engine), f"{2e-9 * work * row['batch'] / engine['median']:,.0f}" if work else ""]
            for other in others:
                if other is None or (other[1]["precision"] == "binary" and "W1A1" not in name):
                    cells.append("")
                    continue
                brand = "" if other[1]["precision"] == "binary" else f" {other[0]}"
                times = other[1]["median"] / engine["median"]
                cells.append(f"{microseconds(other[1])}{brand} ({times:.2f}x)")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(row: dict[str, Any]) -> list[str]:
    lines = [
        "| engine | rise of peak memory, MB | file, MB | load and first answer, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, engine in row["engines"].items():
        numbers = f"{engine['bytes'] / 1e6:.1f} | {engine['file_bytes'] / 1e6:.2f}"
        lines.append(f"| {name} | {numbers} | {1e3 * engine['load_and_answer_seconds']:.0f} |")
    return lines


def table(result: dict[str, Any]) -> str:
    from _inference import RULE

    rows: Rows = result["rows"]
    machine, versions = result["machine"], result["versions"]
    parts = [
        "# Inference, measured",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". Written by `benchmarks/inference.py`, whose first lines say what was measured and how. Medians; a ratio "
        f"above 1 is in our favour. {RULE}",
        "## What is promised",
        "\n".join(targets_table(rows)),
        "## All settings",
        "Microseconds for a batch; of layers for one layer.",
        "\n".join(settings_table(rows)),
    ]
    for row in rows.values():
        if row["case"].startswith("memory"):
            parts += ["## Memory", "\n".join(memory_table(row))]
    notes = {note: [] for row in rows.values() for note in row["notes"]}
    for name, row in rows.items():
        for note in row["notes"]:
            notes[note].append(name)
    if notes:
        parts += ["## Left out", "\n".join(f"- {note} ({'; '.join(where)})" for note, where in notes.items())]
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="cases, with wildcards (see --list)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring in each setting (default: 60)")
    parser.add_argument("--engines", nargs="+", default=["all"], help="other engines, as of `abste bench --peers`")
    parser.add_argument("--again", action="store_true", help="measure again what the JSON has")
    parser.add_argument("--list", action="store_true", help="print the settings, and measure none")
    parser.add_argument("--table", action="store_true", help="write the table again, and measure nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix (default: benchmarks/results/inference)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)  # what a process of its own measures
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    if min(*arguments.threads, *arguments.batches) < 1 or not arguments.seconds > 0:
        parser.error("--threads, --batches and --seconds must be positive")
    from _inference import CASES

    settings = [(case, t, b) for case in CASES for t in arguments.threads for b in arguments.batches]
    settings = [s for s in [*settings, (MEMORY, 1, 1)] if any(fnmatch.fnmatch(s[0], only) for only in arguments.only)]
    here = circumstances()
    stored = arguments.out.with_suffix(".json")
    result: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {**here, "rows": {}}
    if arguments.table:
        write(result, arguments.out)
        return
    if {name: result[name] for name in here} != here and result["rows"]:
        parser.error(f"{stored} is of another machine, or of other versions: move it away, or give another --out")
    most = here["machine"]["cores"]
    for case, threads, batch in settings:
        name = key(case, threads, batch)
        if threads > most:
            print(f"{name}: left out, there are {most} cores")
        elif arguments.list:
            print(f"{name}{'  (has been measured)' * (name in result['rows'])}")
        elif arguments.again or name not in result["rows"]:
            print(name, flush=True)
            wanted = {"case": case, "threads": threads, "batch": batch, "seconds": arguments.seconds}
            result["rows"][name] = run_child({**wanted, "engines": arguments.engines})
            order = [key(*setting) for setting in [(c, t, b) for c in CASES for t in (1, 2) for b in (1, 32)]]
            rank = {name: number for number, name in enumerate(order)}
            result["rows"] = dict(sorted(result["rows"].items(), key=lambda item: rank.get(item[0], len(rank))))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write(result, arguments.out)
    if not arguments.list:
        print("\n".join(targets_table(result["rows"])))


if __name__ == "__main__":
    main()
