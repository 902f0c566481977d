"""Hooks of mkdocs: the site also holds the pages at the top of the repository, and each file that a page links to.

Pages link to each other by their places in the repository, so that they can be read there. Here these links become those of
the site, and where their text is the name of a page's file, its title. A link to no file stays as it is, and mkdocs, which is
strict, refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
FILES = "files/"  # where the other files of the repository lie on the site

_FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^][]*)\]\(([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages at the top, and the files that pages link to."""
    for name, address in TOP.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for target in links(page.content_string):
            name = named(target, page.src_uri)
            address = address_of(name)
            if address.startswith(FILES) and (ROOT / name).is_file() and address not in files.src_uris:
                files.append(File.generated(config, address, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to places in the repository by links to places on the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        text, target = match.groups()
        file = files.get_file_from_path(address_of(named(target, here)))
        if file is None:
            return match[0]
        text = title(file.content_string) if text.endswith(target) and target.endswith(".md") else text
        return f"[{text}]({posixpath.relpath(file.src_uri, posixpath.dirname(here) or '.')}"

    parts = re.split(f"({_FENCE.pattern})", markdown, flags=_FENCE.flags)  # the odd ones are code
    return "".join(part if place % 2 else _LINK.sub(moved, part) for place, part in enumerate(parts))


def links(markdown: str) -> list[str]:
    """The files that a page links to, without sections; not those of its code, nor other hosts."""
    found = [match[2] for match in _LINK.finditer(_FENCE.sub("", markdown))]
    return [target for target in found if "://" not in target]


def title(markdown: str) -> str:
    """The first heading of a page."""
    return markdown.split("\n", 1)[0].removeprefix("# ")


def named(target: str, page: str) -> str:
    """The place in the repository that a link of a page of the site leads to."""
    source = next((name for name, address in TOP.items() if address == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def address_of(name: str) -> str:
    """The place on the site of a file of the repository."""
    if name in TOP:
        return TOP[name]
    return name.removeprefix("docs/") if name.startswith("docs/") else FILES + name
