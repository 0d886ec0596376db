"""Time to import abste and load a packed network, beside a bare `import numpy`, by turns in new processes.

python benchmarks/import_time.py
python benchmarks/import_time.py --out benchmarks/results/import_time.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import circumstances, save

from abste.deploy import export_run

RUN = Path(__file__).resolve().parents[1] / "results" / "cifar10-resnet20-w1a1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="processes of each kind (default: 41)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("--rounds must be at least 3")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.abste"
        export_run(RUN, path)
        codes = {"numpy": "import numpy", "abste": f"import abste; abste.load({str(path)!r})"}
        times: dict[str, list[float]] = {name: [] for name in codes}
        for _ in range(arguments.rounds):
            for name, code in codes.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", code], check=True)
                times[name].append(time.perf_counter() - start)
    ratios = [abste / numpy for abste, numpy in zip(times["abste"], times["numpy"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "import_numpy_ms": round(1e3 * statistics.median(times["numpy"]), 1),
        "import_abste_and_load_ms": round(1e3 * statistics.median(times["abste"]), 1),
        "ratio": round(statistics.median(times["abste"]) / statistics.median(times["numpy"]), 3),
        "ratio_quartiles": [round(quartile, 3) for quartile in quartiles],
        "rounds": arguments.rounds,
        "network": RUN.name,
        **circumstances(),
    }
    print(json.dumps(result, indent=2))
    save(result, arguments.out)


if __name__ == "__main__":
    main()
