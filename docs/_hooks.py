"""Hooks of mkdocs.yml: pages that are not in docs/, links for a site, and references in docstrings."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):`(~?)([^`]+)`")


def on_files(files: Files, config: Any) -> Files:
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/figures/", "](figures/")
        if target == "index.md":
            text = "---\nhide: [navigation]\n---\n\n" + text
        files.append(File.generated(config, target, content=text))
    for page in api(config["nav"]):
        module = page.removeprefix("api/").removesuffix(".md")
        name = "abste" if module == "abste" else f"abste.{module}"
        files.append(File.generated(config, page, content=f"# {name}\n\n::: {name}\n"))
    return files


def api(nav: Any) -> list[str]:
    """The API's pages in the navigation."""
    if isinstance(nav, str):
        return [nav] if nav.startswith("api/") else []
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in api(entry)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links between pages.

    What is in the repository but not on the site stays as text; what is in neither stays a link, which strict refuses.
    """
    home = "" if page.file.src_uri in PAGES.values() else "docs"

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        source = posixpath.normpath(posixpath.join(home, path))
        target = PAGES.get(source, source.removeprefix("docs/"))
        if files.get_file_from_path(target) is None and (ROOT / source).exists():
            return text
        return f"[{text}]({target}{anchor})"

    return LINK.sub(replace, markdown)


def _reference(match: re.Match[str]) -> str:
    name = match[2]
    shown = name.rsplit(".", 1)[-1] if match[1] else name
    if not name.startswith("abste."):
        return f"`{shown}`"
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'  # text, where no page has it


class Roles(griffe.Extension):
    """Sphinx's references, which editors know, as links of the site."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for obj in (pkg, *_members(pkg)):
            if obj.docstring is not None:
                obj.docstring.value = ROLE.sub(_reference, obj.docstring.value)


def _members(parent: griffe.Object) -> Iterator[griffe.Object]:
    for member in parent.members.values():
        if isinstance(member, griffe.Object):  # what is imported is a member of its home
            yield member
            yield from _members(member)
