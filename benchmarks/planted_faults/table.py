"""The table of docs/trust.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate

from .judge import AT_ONCE

Entry = Mapping[str, Any]


def table(results: Iterable[Mapping[str, Entry]]) -> str:
    """A row for each room: faults, those that act on a model at once or later, and how many the proof and the suite see."""
    rooms: dict[str, list[Entry]] = defaultdict(list)
    for entry in {key: entry for result in results for key, entry in result.items()}.values():
        rooms[entry["room"]].append(entry)
    rows = [_row(room, entries) for room, entries in sorted(rooms.items())]
    rows.append(_row("all", [entry for entries in rooms.values() for entry in entries]))
    return tabulate(rows, headers="keys", tablefmt="github")


def _row(room: str, entries: list[Entry]) -> dict[str, Any]:
    at_once = [entry for entry in entries if _acts(entry) and _at_once(entry)]
    return {
        "room": room,
        "faults": len(entries),
        "change the result": len(at_once),
        "of these seen by the proof": sum(map(_proved, at_once)),
        "change later answers alone": sum(_acts(entry) and not _at_once(entry) for entry in entries),
        "change no model": sum(not _acts(entry) for entry in entries),
        "seen by the suite": sum(bool(entry.get("suite")) for entry in entries),
    }


def _acts(entry: Entry) -> bool:
    return entry["acting"] is None or bool(entry["acting"])


def _at_once(entry: Entry) -> bool:
    """Whether something differs as soon as the module is there, or nothing comes out at all."""
    return entry["acting"] is None or any(AT_ONCE & {*acting["differs"]} for acting in entry["acting"])


def _proved(entry: Entry) -> bool:
    return entry["acting"] is None or any(acting["proof"] for acting in entry["acting"])
