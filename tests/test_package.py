from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import abste

# Stands for an installation without the extra "train".
WITHOUT_TRAIN = """
import sys

EXTRA = "torch torchvision lightning lightning_fabric pydantic safetensors sklearn tensorboard tomli_w".split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def _python(code: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd)


def _readme_blocks(repo_root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repo_root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_import_does_not_import_torch() -> None:
    done = _python("import sys, abste; assert 'torch' not in sys.modules; print(abste.__version__)")
    assert done.stdout.strip() == abste.__version__, done.stderr


def test_without_the_train_extra() -> None:
    code = WITHOUT_TRAIN + "import abste, abste.cli, abste.errors; print(abste.__version__)"
    done = _python(code)
    assert done.stdout.strip() == abste.__version__, done.stderr


def test_without_the_train_extra_an_error_names_it() -> None:
    done = _python(WITHOUT_TRAIN + "import sys; from abste.cli import main; sys.exit(main(['recipes']))")
    assert done.returncode == 2, done.stderr
    assert "abste[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("abste") == abste.__version__


def test_every_public_name_resolves() -> None:
    assert len(set(abste.__all__)) == len(abste.__all__)
    for name in abste.__all__:
        assert getattr(abste, name) is not None, name
    assert set(abste.__all__) <= set(dir(abste))


def test_typed_marker_and_recipes_are_part_of_the_package() -> None:
    root = importlib.resources.files("abste")
    assert (root / "py.typed").is_file()
    assert any(entry.name.endswith(".toml") for entry in (root / "train" / "recipes").iterdir())


def test_readme_example_trains(repo_root: Path, tmp_path: Path) -> None:
    (example,) = _readme_blocks(repo_root)
    done = _python(example, "-W", "error", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy ([\d.]+) %", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 80
    assert "passed on 64 images: Gaussian noise" in done.stdout and "first layer" in done.stdout
    predicted, labels = (re.findall(r"\d", line) for line in done.stdout.splitlines()[-1].split("]", 1))
    assert len(predicted) == len(labels) == 10 and sum(map(str.__eq__, predicted, labels)) >= 7
    assert [path.name for path in tmp_path.iterdir()] == ["digits.abste"]


def test_readme_commands_exist(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^    abste (\w+)", readme, flags=re.MULTILINE))
    assert commands >= {"quickstart", "recipes", "train", "eval", "summary"}
    usage = subprocess.run([sys.executable, "-m", "abste", "--help"], capture_output=True, text=True, check=True).stdout
    for command in commands:
        assert re.search(rf"\b{command}\b", usage), command
