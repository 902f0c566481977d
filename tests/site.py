"""Reads the built site as a browser would, with the standard library: its links, sections, pictures, scripts and styles."""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

RESOURCES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
LITERAL = re.compile(r"\]\(|^(?:- |\d+\. |\|)|```|^::: ", flags=re.MULTILINE)  # Markdown that was not understood


class Page(HTMLParser):
    """What one page holds.

    Attributes:
        ids: What sections and symbols are called.
        links: Where its links lead.
        resources: What a browser loads with it.
        texts: Its paragraphs, without code.
        classes: Classes of its elements.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.texts: list[str] = []
        self.classes: set[str] = set()
        self._open: list[str] = []  # paragraphs and code, from the outside in
        self.feed(html)
        self.resources += re.findall(
            r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", "".join(re.findall(r"<style.*?</style>", html, re.S))
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        self.classes.update(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if RESOURCES.get(tag, "") in given:
            self.resources.append(given[RESOURCES[tag]])
        if tag in ("p", "code"):
            self._open.append(tag)
            if tag == "p":
                self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._open == ["p"]:
            self.texts[-1] += data


class Site:
    """The pages of a folder, by their addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {file.relative_to(folder).as_posix(): Page(file.read_text()) for file in sorted(folder.rglob("*.html"))}

    def broken_links(self) -> list[str]:
        """Links to a page, a section or a file that is not there."""
        return [
            f"{address}: {link}"
            for address, page in self.pages.items()
            for link in page.links
            if not self._leads(address, link)
        ]

    def broken_resources(self) -> list[str]:
        """Scripts, styles, fonts and pictures that are not there, or that come from another host."""
        found = [
            f"{address}: {name}"
            for address, page in self.pages.items()
            for name in page.resources
            if not self._holds(address, name)
        ]
        for style in sorted(self.folder.rglob("*.css")):
            address = style.relative_to(self.folder).as_posix()
            names = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", style.read_text())
            found += [f"{address}: {name}" for name in names if not self._holds(address, name)]
        return found

    def literal_markdown(self) -> list[str]:
        """Paragraphs in which Markdown was not understood, and emphasis inside of a word, as between two products."""
        found = [f"{address}: {text}" for address, page in self.pages.items() for text in page.texts if LITERAL.search(text)]
        htmls = {address: (self.folder / address).read_text() for address in self.pages}
        return found + [
            f"{address}: {text}" for address, html in htmls.items() for text in re.findall(r"\w+<em>.*?</em>", html)
        ]

    def _leads(self, address: str, link: str) -> bool:
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            return True
        target = self._target(address, unquote(parts.path))
        if target in self.pages:
            return not parts.fragment or unquote(parts.fragment) in self.pages[target].ids
        return not parts.scheme and not parts.fragment and (self.folder / target).is_file()

    def _holds(self, address: str, name: str) -> bool:
        parts = urlsplit(name)
        if parts.scheme == "data":
            return True
        return not parts.scheme and not parts.netloc and (self.folder / self._target(address, unquote(parts.path))).is_file()

    def _target(self, address: str, path: str) -> str:
        """The address that a path leads to; from the root of the site if it starts with a slash, as on the page for errors."""
        if not path:
            return address
        target = posixpath.normpath(posixpath.join(posixpath.dirname(address), path) if path[0] != "/" else path.lstrip("/"))
        return "index.html" if target == "." else target
