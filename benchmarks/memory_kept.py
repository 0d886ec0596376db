"""Training in a process that keeps the memory it frees, as `abste train` does, beside one that returns it.

    python benchmarks/memory_kept.py --data DIR [--rounds 5] [--steps 40] [--out FILE]

Both are whole `abste train` commands on CIFAR-10 with one thread and whole images, by turns; each round's figure is the
median over its lines of metrics but the first. Only glibc has this.
"""

from __future__ import annotations

from _common import Launch, circumstances, launched_by_turns, parse_launched, save

RECIPES = ("cifar10-resnet20-w1a32", "cifar10-resnet20-w1a1", "cifar10-resnet18-w1a32")
CHANGES = ("train.image_sizes=[]",)
TRAIN = "-m abste train --threads 1"
KEPT = "kept", Launch(TRAIN)
# Whoever sets something of malloc gets that and nothing else: here what is set anyway.
RETURNED = "returned", Launch(TRAIN, {"GLIBC_TUNABLES": "glibc.malloc.check=0"})


def main() -> None:
    arguments = parse_launched(__doc__)
    results = [launched_by_turns(KEPT, RETURNED, recipe, CHANGES, arguments) for recipe in RECIPES]
    save({"steps": arguments.steps, **circumstances(), "results": results}, arguments.out)


if __name__ == "__main__":
    main()
