"""Pages that are generated are what the code says now, and links within the project lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("page", ["estimators", "recipe", "results", "study"])
def test_generated_pages_are_current(page: str, repo_root: Path) -> None:
    script = str(repo_root / "docs" / f"{page}.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in Path(__file__).parents[1].glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, repo_root: Path) -> None:
    path = repo_root / page
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = path.parent / file if file else path
        assert goal.exists(), f"{page}: {target}"
        if anchor and goal.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page}: {target}"
