"""Are the packed networks of results/ the trained ones? Exports and verifies each of them.

python benchmarks/parity.py --data DIR --out benchmarks/results/parity.json

With --data, over the whole test set of CIFAR-10; without, over random images alone. Exits with 1 where one is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import circumstances, save

from abste.deploy import Verification, export_run, verify_run

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 (default: random images alone)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    networks: dict[str, Any] = {}
    for run in sorted(path.parent for path in RESULTS.glob("*/weights.safetensors")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.abste"
            exported = export_run(run, path)
            checks = verify_run(run, path, arguments.data)
        print(f"{run.name}\n{exported.report}\n" + "\n".join(map(str, checks)) + "\n", flush=True)
        networks[run.name] = {
            "passed": all(check.passed for check in checks),
            "file_bytes": exported.file_bytes,
            "times_smaller": round(exported.ratio, 1),
            "checks": [asdict(check) for check in checks if isinstance(check, Verification)],
        }
    save({"networks": networks, **circumstances()}, arguments.out)
    return 0 if all(network["passed"] for network in networks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
