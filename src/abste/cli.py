"""The command line: parses, calls the library, prints. What needs torch is imported by the command that needs it."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from abste.errors import AbsteError

_EXTRA = {
    "torch": "train",
    "torchvision": "train",
    "lightning_fabric": "train",
    "pydantic": "train",
    "tomli_w": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "sklearn": "train",
    "scipy": "train",
    "plotly": "report",
}
"""The extra that a package comes with."""

_NO_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What an error that names no file has, where it is standard output that cannot be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status: 0, 2 for an error of the user's, 130 and 143 after a signal."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, until the process ends
    for stream in (sys.stdout, sys.stderr):  # a name of a class must not fail where the output has no such letter
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(_unknown_arguments(unknown, hasattr(arguments, "overrides")))
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except AbsteError as error:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
        who = "abste" if rank == "0" else f"abste (rank {rank})"
        print(f"{who}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA:
            raise
        print(
            f'abste: error: this command needs {package}; install it with: pip install "abste[{_EXTRA[package]}]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("abste: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_OUTPUT:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            return 1
        print(f"abste: error: cannot write to standard output: {error.strerror or error}.", file=sys.stderr)
        return 2


def _unknown_arguments(unknown: list[str], settable: bool) -> str:
    """What is wrong, and for the name of a recipe's key how to set it."""
    text = f"unrecognized arguments: {shlex.join(unknown)}"
    option, _, value = unknown[0].partition("=")
    if not (settable and option.startswith("--")):
        return text
    try:
        from abste.train.recipe import Recipe, known_keys
    except ModuleNotFoundError:  # there is no training without it either
        return text
    name = option[2:].replace("-", "_")
    keys = [key for key in known_keys(Recipe) if key.rpartition(".")[2] == name]
    value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "...")
    ways = " or ".join(f"--set {shlex.quote(f'{key}={value}')}" for key in keys)
    return f"{text}; that is a key of recipes: {ways}" if ways else text


def _version() -> str:
    try:
        return metadata.version("abste")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abste",
        description="Train binary neural networks with adaptive blended straight-through estimators, and pack them "
        "into files that run as bits, without torch.",
        epilog="Start with `abste quickstart`, which needs no data and no arguments.",
    )
    parser.add_argument("--version", action="version", version=f"abste {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str, examples: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command(
        "quickstart",
        _quickstart,
        "train a small binary network on embedded data and evaluate it",
        "  abste quickstart\n  abste quickstart --out runs/first --set train.epochs=5",
    )
    sub.add_argument("--out", metavar="DIR", help="run directory (default: a new one, runs/quickstart...)")
    _add_set(sub)

    sub = command(
        "recipes",
        _recipes,
        "list the built-in recipes and what is published for their networks, or print one in full",
        "  abste recipes\n  abste recipes cifar10-resnet20-w1a32 > mine.toml",
    )
    sub.add_argument("recipe", nargs="?", metavar="RECIPE", help="print this recipe, with everything it extends")

    sub = command(
        "train",
        _train,
        "train a network as a recipe says",
        "  abste train cifar10-resnet20-w1a32 --data data --out runs/r20\n"
        "  abste train cifar10-resnet20-w1a32 --data data --out runs/r20 --resume\n"
        "  abste train cifar10-resnet20-w1a1 --data data --out runs/w1a1 --set train.epochs=30 --seed 1\n"
        "  abste train cifar10-resnet20-w1a1 --data data --out runs/warm --init runs/float\n"
        "  abste train finetune --model resnet20 --data photos --out runs/mine   # photos/CLASS/*.jpg\n"
        "  torchrun --nproc-per-node 2 -m abste train mine.toml --data data --out runs/mine",
    )
    sub.add_argument("recipe", metavar="RECIPE", help="built-in recipe (see `abste recipes`) or a TOML file")
    sub.add_argument("--model", metavar="NAME", help="network of abste.models; short for --set model.name=NAME")
    _add_data(sub)
    sub.add_argument("--out", required=True, metavar="DIR", help="run directory: everything about the run goes there")
    _add_set(sub)
    sub.add_argument("--seed", type=int, metavar="N", help="short for --set train.seed=N")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads; short for --set train.threads=N")
    sub.add_argument(
        "--precision", metavar="P", help="32-true, bf16-mixed or 16-mixed; short for --set train.precision=P"
    )
    sub.add_argument(
        "--init",
        metavar="RUN",
        help="start from the weights of this run, float or binary (RUN/averaged.safetensors: its averaged ones); "
        "short for --set init=RUN",
    )
    sub.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    sub.add_argument("--max-minutes", type=float, metavar="M", help="stop cleanly, with a checkpoint, after M minutes")
    sub.add_argument("--max-steps", type=int, metavar="N", help="stop cleanly, with a checkpoint, after N steps")
    sub.add_argument("--accelerator", default="auto", metavar="A", help="auto, cpu, cuda or mps (default: auto)")
    sub.add_argument("--devices", default="1", metavar="N", help="number of devices or processes, or auto (default: 1)")
    sub.add_argument("--strategy", default="auto", metavar="S", help="auto or ddp (default: auto)")
    sub.add_argument("--num-nodes", type=int, default=1, metavar="N", help="machines of the run (default: 1)")

    sub = command(
        "eval",
        _eval,
        "evaluate a run in float32 on its test set",
        "  abste eval runs/r20 --data data\n  abste eval runs/r20 --data data --averaged",
    )
    sub.add_argument("run_directory", metavar="RUN", help="run directory")
    _add_data(sub)
    sub.add_argument("--averaged", action="store_true", help="the averaged weights, of a recipe with [average]")
    sub.add_argument("--recalibrate", action="store_true", help="also after estimating batch-norm statistics anew")
    sub.add_argument("--device", default="cpu", metavar="D", help="torch device (default: cpu)")

    sub = command(
        "compare",
        _compare,
        "run a study: arms, settings and seeds under one protocol, and what they say together",
        "  abste compare study.toml --data data --out studies/mine\n"
        "  abste compare study.toml --data data --out studies/mine --max-minutes 120   # and again, to go on\n"
        "  abste compare study.toml --list                                             # what it would run\n"
        "  abste compare study.toml --out studies/mine --report                        # of what is done\n"
        "  abste compare study.toml --data data --out studies/mine --task $SLURM_ARRAY_TASK_ID",
    )
    sub.add_argument("study", metavar="STUDY", help="TOML file; docs/compare.md says what is in it")
    _add_data(sub)
    sub.add_argument("--out", metavar="DIR", help="directory of the study; a second call goes on where the first ended")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: cores / threads of a run)")
    sub.add_argument("--max-minutes", type=float, metavar="M", help="stop cleanly, with checkpoints, after M minutes")
    sub.add_argument(
        "--task", type=int, nargs="+", metavar="N", help="do these runs alone, numbered as by --list, and no report"
    )
    only = sub.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print the runs of the study, and start none")
    only.add_argument(
        "--report", action="store_true", help="write the report of the runs that are done, and start none"
    )

    sub = command(
        "report",
        _report,
        "draw runs on one HTML page: results, settings, curves, what estimators did; needs abste[report]",
        "  abste report runs/r20 --out r20.html\n"
        "  abste report runs/ste runs/ab_tanh --out both.html\n"
        "  abste report studies/mine --out mine.html       # all runs of a study, finished or not",
    )
    sub.add_argument("paths", nargs="+", metavar="RUN", help="run directory, or a directory that holds some")
    sub.add_argument("--out", required=True, metavar="FILE", help="the page, FILE.html; needs nothing beside it")

    sub = command(
        "summary",
        _summary,
        "show what a network would be made of: layers, bits, bytes, operations",
        "  abste summary cifar10-resnet20-w1a1\n  abste summary runs/r20",
    )
    sub.add_argument("source", metavar="RECIPE|RUN", help="built-in recipe, TOML file or run directory")
    _add_set(sub)

    sub = command(
        "export",
        _export,
        "pack a trained network into one small file, and verify it",
        "  abste export runs/r20 r20.abste\n  abste export runs/r20 r20.abste --data data --float16",
    )
    sub.add_argument("run_directory", metavar="RUN", help="run directory")
    sub.add_argument("file", metavar="FILE", help="the .abste file to write; replaced only by one that was verified")
    _add_data(sub)
    sub.add_argument("--averaged", action="store_true", help="the averaged weights, of a recipe with [average]")
    sub.add_argument("--float16", action="store_true", help="store the weights that stay float in half precision")
    sub.add_argument("--description", metavar="TEXT", help="what the file says that it is (default: the recipe's)")

    command(
        "zoo",
        _zoo,
        "list the trained networks that come with abste; NAME is zoo:NAME where a FILE is read",
        "  abste zoo\n  abste inspect zoo:cifar10-resnet20-w1a1\n  abste predict zoo:cifar10-resnet20-w1a1 cat.png",
    )

    sub = command(
        "inspect",
        _inspect,
        "show what is in an .abste file: layers, shapes, bits, bytes, memory",
        "  abste inspect r20.abste",
    )
    sub.add_argument("file", metavar="FILE", help=".abste file")

    sub = command(
        "bench",
        _bench,
        "measure how fast an .abste file runs here, by layer and beside other engines; needs no torch",
        "  abste bench r20.abste\n"
        "  abste bench r20.abste --batch 32 --threads 1 --peers onnxruntime openvino-binary\n"
        "  abste bench r20.abste --peers none --json r20.json",
    )
    sub.add_argument("file", metavar="FILE", help=".abste file")
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="images in a call (default: 1)")
    sub.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="numbers of threads (default: 1, and one for each core)"
    )
    sub.add_argument("--isa", nargs="+", metavar="NAME", help="instruction sets (default: all of this machine)")
    sub.add_argument("--seconds", type=float, default=5.0, metavar="S", help="for each number of threads (default: 5)")
    sub.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="other engines: torch, torch-bf16, torch-compile, onnxruntime, onnxruntime-int8, openvino, openvino-bf16, "
        "openvino-int8, openvino-binary..., all or none (default: those that are ready in seconds)",
    )
    sub.add_argument(
        "--int8", metavar="LAYERS", help="integers of eight bits in these layers: stem, float, binary or all (inexact)"
    )
    sub.add_argument("--json", metavar="FILE", help="also write the figures here")

    sub = command(
        "verify",
        _verify,
        "compare an .abste file with the run it was made from",
        "  abste verify runs/r20 r20.abste\n  abste verify runs/r20 r20.abste --data data",
    )
    sub.add_argument("run_directory", metavar="RUN", help="run directory")
    sub.add_argument("file", metavar="FILE", help=".abste file")
    _add_data(sub)
    sub.add_argument("--averaged", action="store_true", help="the averaged weights, of a recipe with [average]")
    sub.add_argument("--images", type=int, metavar="N", help="use N images of the data (default: all)")
    sub.add_argument(
        "--int8",
        choices=("stem", "float", "binary", "all"),
        help="tell, too, what integers of eight bits in these layers change (abste.load has this option)",
    )

    sub = command(
        "predict",
        _predict,
        "classify images with an .abste file; needs abste[image], not torch",
        "  abste predict r20.abste cat.png\n  abste predict r20.abste *.jpg --top 1",
    )
    sub.add_argument("file", metavar="FILE", help=".abste file")
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    sub.add_argument("--top", type=int, default=3, metavar="N", help="how many classes to show (default: 3)")
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="replace keys of the recipe, such as optimizer.lr=0.2; 'none' empties an optional key; repeatable",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="folder of the data set, downloaded there if missing; embedded data needs none"
    )


def _recipes(arguments: argparse.Namespace) -> int:
    from abste.train.published import comments, overview
    from abste.train.recipe import builtin_recipes, load_recipe

    if arguments.recipe:
        recipe = load_recipe(arguments.recipe)
        print(comments(recipe) + recipe.to_toml(), end="")
        return 0
    recipes = {name: load_recipe(name) for name in builtin_recipes()}
    columns = min(120, shutil.get_terminal_size((120, 24)).columns)
    indent = max(map(len, recipes)) + 2
    for name, recipe in recipes.items():
        wrapped = textwrap.wrap(recipe.description, max(40, columns - indent))
        print(f"{name:{indent}}" + f"\n{'':{indent}}".join(wrapped))
    print(f"\n{overview(max(60, columns))}")
    print("`abste recipes NAME` prints one, with epochs and sources of these numbers.")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from abste.train.recipe import load_recipe

    overrides = list(arguments.overrides)
    if arguments.model is not None:
        overrides.append(f"model.name={arguments.model}")
    for key in ("seed", "threads", "precision"):
        value = getattr(arguments, key)
        if value is not None:
            overrides.append(f"train.{key}={value}")
    if arguments.init is not None:
        overrides.append(f"init={json.dumps(arguments.init)}")
    recipe = load_recipe(arguments.recipe, overrides)  # before torch is imported: a typo is answered at once
    import torch.distributed as dist

    from abste.train import Interrupted, fit, keep_freed_memory

    keep_freed_memory()
    try:
        summary = fit(
            recipe,
            arguments.data,
            arguments.out,
            resume=arguments.resume,
            max_minutes=arguments.max_minutes,
            max_steps=arguments.max_steps,
            accelerator=arguments.accelerator,
            devices=int(arguments.devices) if arguments.devices.isdecimal() else arguments.devices,
            strategy=arguments.strategy,
            num_nodes=arguments.num_nodes,
        )
    except Interrupted as stop:
        if _is_rank_zero():
            print(f"{stop}\nresume with: {_resume_command(arguments)}", flush=True)
        return 128 + stop.signum
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # its threads, met by the end of the process, may abort it
    if not _is_rank_zero():
        return 0
    if summary["finished"]:
        print(_result_lines(summary))
        print(f"run directory: {arguments.out}")
    else:
        print(f"resume with: {_resume_command(arguments)}")
    return 0


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def _resume_command(arguments: argparse.Namespace) -> str:
    """The command that continues a run: its own resolved recipe needs no --set."""
    words = ["abste", "train", str(Path(arguments.out) / "recipe.toml")]
    for option in ("data", "out", "accelerator", "devices", "strategy", "num_nodes"):
        value = getattr(arguments, option)
        if value not in (None, "auto", 1, "1"):
            words += ["--" + option.replace("_", "-"), str(value)]
    return shlex.join([*words, "--resume"])


def _result_lines(summary: dict[str, Any]) -> str:
    lines = []
    for title, results in (("last epoch", summary), ("averaged weights", summary.get("averaged", {}))):
        for split in ("test", "held_out"):
            if split in results:
                result = results[split]
                lines.append(
                    f"{split.replace('_', '-')} accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f} "
                    f"({title}, {result['images']:,} images, float32)"
                )
    if unreadable := summary.get("unreadable", {}).get("images"):
        lines.append(
            f"{len(unreadable):,} images could not be read and were left out, such as {next(iter(unreadable))}"
        )
    cost = summary["cost"]
    lines.append(f"{cost['seconds']:.0f} s, {cost['samples_per_second']:,.0f} images/s in training")
    return "\n".join(lines)


def _eval(arguments: argparse.Namespace) -> int:
    from abste.train.run import evaluate

    for recalibrate in (False, True) if arguments.recalibrate else (False,):
        result = evaluate(
            arguments.run_directory,
            arguments.data,
            averaged=arguments.averaged,
            recalibrate=recalibrate,
            device=arguments.device,
        )
        how = ", batch norm recalibrated" if recalibrate else ""
        print(
            f"{result['split'].replace('_', '-')} accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f} "
            f"({result['images']:,} images, float32{how})"
        )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from abste.errors import ConfigError
    from abste.report.study import load_study

    study = load_study(arguments.study)  # before torch is imported: a typo is answered at once
    plan = study.plan()
    if arguments.list:
        width = len(str(len(plan) - 1))
        for number, planned in enumerate(plan):
            print(f"{number:{width}}  {planned}")
        return 0
    if arguments.out is None:
        raise ConfigError("compare needs --out, the directory of the study.")
    from abste.report import compare_runs, read_finished, run_study
    from abste.train.files import write_atomic, write_json
    from abste.train.progress import Progress

    status = 0
    if not arguments.report:
        try:
            outcome = run_study(
                study,
                arguments.out,
                arguments.data,
                jobs=arguments.jobs,
                tasks=arguments.task,
                max_minutes=arguments.max_minutes,
                say=Progress().line,
            )
        except KeyboardInterrupt:
            print("\nstopped; every run has written a checkpoint, and the same command goes on from there", flush=True)
            return 130
        for name in outcome.elsewhere:
            print(f"{name} is left to the process that is at it")
        if outcome.stopped:
            print("stopped by max_minutes; the same command goes on from there")
        if outcome.failed:
            print(f"{len(outcome.failed)} failed; their logs are beside their directories, and a new call tries again")
            status = 1
        if arguments.task is not None:
            return status
    finished = read_finished(plan, Path(arguments.out))
    if not finished:
        print("no run is done yet")
        return status
    result = compare_runs(study, finished, len(plan))
    report = Path(arguments.out) / "report.md"
    write_atomic(report, str(result).encode())
    write_json(report.with_suffix(".json"), result.to_dict())
    print(f"\n{result}\nwrote {report} and {report.with_suffix('.json')}")
    return status


def _report(arguments: argparse.Namespace) -> int:
    from abste.report import write_page

    runs = write_page(arguments.paths, arguments.out)
    print(f"wrote {arguments.out}: {', '.join(run.label for run in runs[:5])}{' and more' * (len(runs) > 5)}")
    return 0


def _summary(arguments: argparse.Namespace) -> int:
    from abste.errors import ConfigError
    from abste.train.recipe import load_recipe

    directory = Path(arguments.source)
    if directory.is_dir():
        if arguments.overrides:
            raise ConfigError("--set changes recipes, not runs; give the name of a recipe.")
        from abste.train.run import RunDirectory

        recipe = RunDirectory(directory).read_recipe()
    else:
        recipe = load_recipe(arguments.source, arguments.overrides)
    from abste.nn import summary
    from abste.train.run import build_model

    model, report = build_model(recipe)
    print(f"{recipe.name}: {recipe.description}\n\n{report}\n")
    print(summary(model, (1, *recipe.data.image_shape)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from abste.deploy.runs import export_run

    exported = export_run(
        arguments.run_directory,
        arguments.file,
        arguments.data,
        averaged=arguments.averaged,
        float16=arguments.float16,
        description=arguments.description,
    )
    print(exported)
    print(f"\nwrote {arguments.file}")
    _hint_at_data(arguments, exported.checks)
    return 0


def _zoo(arguments: argparse.Namespace) -> int:
    from abste.zoo import entries

    rows = [("name", "accuracy", "bytes", "epochs", "seed", "commit", "what it is")]
    rows += [
        (
            entry.name,
            f"{entry.accuracy:.2%}",
            f"{entry.file_bytes:,}",
            str(entry.epochs),
            str(entry.seed),
            entry.commit[:10] + entry.commit[40:],
            entry.description,
        )
        for entry in entries()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    form = "  ".join(f"{{:{'>' if 0 < column < 5 else '<'}{width}}}" for column, width in enumerate(widths)) + "  {}"
    print("\n".join(form.format(*row) for row in rows))
    print(
        "\nEach is a single run; accuracy is that of the last epoch on the test set. In Python: "
        f'abste.load("zoo:{rows[1][0]}")'
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from abste.runtime import load
    from abste.runtime.inspect import describe

    print(describe(load(arguments.file)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from abste.bench import bench
    from abste.errors import ConfigError

    result = bench(
        arguments.file,
        batch=arguments.batch,
        threads=arguments.threads,
        isa=arguments.isa,
        seconds=arguments.seconds,
        peer_names=arguments.peers,
        int8=arguments.int8,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(result)
    if arguments.json:
        try:
            Path(arguments.json).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {arguments.json}: {error.strerror}.") from error
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from abste.deploy.runs import verify_run

    checks = verify_run(
        arguments.run_directory,
        arguments.file,
        arguments.data,
        averaged=arguments.averaged,
        images=arguments.images,
        int8=arguments.int8,
    )
    print("\n\n".join(map(str, checks)))
    _hint_at_data(arguments, checks)
    return 0 if all(check.passed for check in checks) else 1


def _hint_at_data(arguments: argparse.Namespace, checks: Sequence[Any]) -> None:
    if all(check.passed for check in checks) and not any(getattr(check, "labelled", 0) for check in checks):
        print(f"(verified on random images alone; add --data DIR to use those of {arguments.run_directory} too)")


def _predict(arguments: argparse.Namespace) -> int:
    from abste.errors import ConfigError, DataError
    from abste.runtime import load
    from abste.runtime.image import classify
    from abste.runtime.inspect import printable

    if arguments.top < 1:
        raise ConfigError(f"--top must be at least 1, not {arguments.top}.")
    network = load(arguments.file)
    status = 0
    for image in arguments.images:
        try:
            found = classify(network, image)[: arguments.top]
        except DataError as error:  # the others may be whole
            print(f"abste: error: {error}", file=sys.stderr)
            status = 2
            continue
        if len(arguments.images) > 1:
            print(f"{image}:")
        found = [(printable(name), probability) for name, probability in found]
        width = max(len(name) for name, _ in found)
        for name, probability in found:
            print(f"{name:{width}}  {probability:7.2%}")
    return status


def _quickstart(arguments: argparse.Namespace) -> int:
    from abste.train.recipe import load_recipe

    recipe = load_recipe("digits-resnet8-w1a32", arguments.overrides)
    from abste.nn import summary
    from abste.train import Interrupted, evaluate, fit, load_run

    out = arguments.out or _fresh("runs/quickstart")
    print("Training a small network with binary weights on 8x8 handwritten digits, which come with scikit-learn.\n")
    try:
        result = fit(recipe, None, out)
    except Interrupted as stop:
        print(f"{stop}\nresume with: {shlex.join(['abste', 'train', f'{out}/recipe.toml', '--out', out, '--resume'])}")
        return 128 + stop.signum
    print("\nWhat was binarised:\n" + (Path(out) / "conversion.txt").read_text(encoding="utf-8"))
    model = load_run(out)
    print(summary(model, (1, *recipe.data.image_shape)))
    again = evaluate(out)
    print(f"\n{_result_lines(result)}")
    print(f"loaded again from {out}/weights.safetensors: {again['accuracy']:.2%}")
    hints = [
        (f"abste eval {out}", "evaluate it again"),
        (f"abste export {out} digits.abste", "pack it into one small file"),
        (f"tensorboard --logdir {out}/tensorboard", "look at the curves"),
        ("abste recipes", "what else can be trained"),
        (
            "abste train cifar10-resnet20-w1a32 --data data --out runs/r20",
            "ResNet-20 on CIFAR-10, downloaded into data/",
        ),
    ]
    width = max(len(command) for command, _ in hints)
    print("\nNext:")
    for command, what in hints:
        print(f"  {command:{width}}  {what}")
    print(f"and in Python: model = abste.load_run({out!r})")
    return 0


def _fresh(name: str) -> str:
    """``name``, or the first of ``name-2``, ``name-3``... that does not exist."""
    candidate, number = name, 1
    while Path(candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate
