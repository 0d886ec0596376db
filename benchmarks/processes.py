"""Training on two processes of one thread each, beside one process of two threads: images per second.

    python benchmarks/processes.py --data DIR [--rounds 5] [--steps 40] [--out FILE]

Both are whole `abste train` commands on CIFAR-10 with the same global batch, by turns; each round's figure is the
median over its lines of metrics but the first. Promised is at least 0.85 of the one process.
"""

from __future__ import annotations

from _common import Launch, circumstances, launched_by_turns, parse_launched, save

PROMISED = 0.85
RECIPES = ("cifar10-resnet20-w1a32", "cifar10-resnet20-w1a1")
CHANGES = ("train.compile=false", "train.batch_size=256")
ONE = "one", Launch("-m abste train --threads 2")
TWO = "two", Launch("-m torch.distributed.run --standalone --nproc-per-node 2 -m abste train --threads 1")


def main() -> None:
    arguments = parse_launched(__doc__)
    results = [launched_by_turns(TWO, ONE, recipe, CHANGES, arguments) for recipe in RECIPES]
    save({"promised": PROMISED, "steps": arguments.steps, **circumstances(), "results": results}, arguments.out)


if __name__ == "__main__":
    main()
