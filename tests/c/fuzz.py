"""Fuzzes the reader and the runtime, and says what was executed.

Needs clang with libFuzzer (Debian: clang, libclang-rt-14-dev, llvm).

python tests/c/fuzz.py --minutes 30 --out tests/c/fuzz-report.json

Builds tests/c/fuzz.c with AddressSanitizer and UndefinedBehaviorSanitizer, runs it from the seeds in tests/c/corpus,
replays what it found in a build that counts lines, and writes a report. Exits with 1 where the fuzzer found something.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = sorted([*ROOT.glob("csrc/src/*.c"), *ROOT.glob("csrc/kernels/*.c")])
SANITIZERS = "address,undefined,float-cast-overflow"


def build(compiler: str, out: Path, *flags: str) -> Path:
    """The target with these flags."""
    command = [compiler, "-std=c11", "-g", "-ffp-contract=off", f"-I{ROOT / 'csrc/include'}", *flags]
    subprocess.run([*command, str(HERE / "fuzz.c"), *map(str, SOURCES), "-o", str(out)], check=True)
    return out


def tool(name: str) -> str:
    """A program of LLVM, with or without a version in its name."""
    for found in (shutil.which(f"{name}-14"), shutil.which(name)):
        if found:
            return found
    sys.exit(f"fuzz.py needs {name}; install it (Debian: clang, libclang-rt-14-dev, llvm).")


def fuzz(target: Path, found: Path, crashes: Path, seconds: int, seed: int) -> tuple[int, int]:
    """Run the fuzzer; gives its exit status and how many inputs it tried."""
    command = [
        str(target),
        str(found),
        str(HERE / "corpus"),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-artifact_prefix={crashes}/",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-malloc_limit_mb=256",
        "-use_value_profile=1",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    log = crashes / "log.txt"
    with log.open("wb") as file:
        status = subprocess.run(command, stderr=file, stdout=file, check=False).returncode
    text = log.read_text(errors="replace")
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    return status, int(executed.group(1)) if executed else 0


def coverage(folder: Path, inputs: Sequence[Path]) -> dict[str, Any]:
    """Lines that these inputs execute, by file; functions and cases of steps that none of them does."""
    flags = ("-O1", "-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping")
    counting = build(tool("clang"), folder / "counting", *flags)
    raw, profile = folder / "raw", folder / "profile"
    command = [str(counting), "-runs=0", "-max_len=4096", *map(str, inputs)]
    subprocess.run(command, env={"LLVM_PROFILE_FILE": str(raw)}, check=True, stderr=subprocess.DEVNULL)
    subprocess.run([tool("llvm-profdata"), "merge", str(raw), "-o", str(profile)], check=True)
    arguments = [str(counting), f"-instr-profile={profile}", *map(str, SOURCES)]
    text = subprocess.run([tool("llvm-cov"), "export", *arguments], check=True, capture_output=True).stdout
    data = json.loads(text)["data"][0]
    lines = {}
    for file in data["files"]:
        counts = file["summary"]["lines"]
        lines[str(Path(file["filename"]).relative_to(ROOT))] = {
            "lines": counts["count"],
            "executed": counts["covered"],
            "percent": round(counts["percent"], 1),
        }
    functions: dict[str, int] = {}
    for function in data["functions"]:  # what a header defines is there once for each file that includes it
        name = function["name"].split(":")[-1]
        functions[name] = max(functions.get(name, 0), function["count"])
    shown = subprocess.run(
        [tool("llvm-cov"), "show", *arguments[:2], str(ROOT / "csrc/src/run.c")], check=True, capture_output=True
    ).stdout.decode()
    cases = dict.fromkeys(re.findall(r"\bcase (STEP_\w+):", (ROOT / "csrc/src/run.c").read_text()), 0)
    for count, case in re.findall(r"\|\s*([\d.]+[kMG]?)\|\s+case (STEP_\w+):", shown):
        cases[case] = max(cases[case], int(count != "0"))
    return {
        "lines": lines,
        "kernels": {name: count for name, count in sorted(functions.items()) if name.endswith("_scalar")},
        "functions_not_executed": sorted(name for name, count in functions.items() if not count),
        "steps_not_executed": sorted(case for case, count in cases.items() if not count),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report here (default: print it)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="abste-fuzz-"))
    found, crashes = folder / "found", folder / "crashes"
    found.mkdir(), crashes.mkdir()
    target = build(
        tool("clang"), folder / "target", "-O1", f"-fsanitize=fuzzer,{SANITIZERS}", "-fno-sanitize-recover=all"
    )
    seconds = max(1, round(60 * arguments.minutes))
    status, executed = fuzz(target, found, crashes, seconds, arguments.seed)
    findings = sorted(path.name for path in crashes.iterdir() if path.name != "log.txt")
    report = {
        "command": "python tests/c/fuzz.py --minutes " + f"{arguments.minutes:g} --seed {arguments.seed}",
        "compiler": subprocess.run([tool("clang"), "--version"], capture_output=True, text=True).stdout.splitlines()[0],
        "machine": platform.machine(),
        "sanitizers": SANITIZERS,
        "seconds": seconds,
        "inputs_tried": executed,
        "inputs_kept": len(list(found.iterdir())),
        "findings": findings,
        "exit_status": status,
        "coverage": coverage(folder, [found, HERE / "corpus"]),
        "coverage_of_seeds_alone": coverage(folder, [HERE / "corpus"])["lines"]["csrc/src/load.c"],
    }
    text = json.dumps(report, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if findings or status:
        sys.stderr.write(f"the fuzzer found something: see {crashes}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
