"""The table of docs/trust.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate


def table(results: Iterable[Mapping[str, Mapping[str, Any]]]) -> str:
    """A row for each room: faults, those that act on a model, and how many of them the proof and the suite see."""
    rooms: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in {key: entry for result in results for key, entry in result.items()}.values():
        rooms[entry["room"]].append(entry)
    rows = [_row(room, entries) for room, entries in sorted(rooms.items())]
    rows.append(_row("all", [entry for entries in rooms.values() for entry in entries]))
    return tabulate(rows, headers="keys", tablefmt="github")


def _row(room: str, entries: list[Mapping[str, Any]]) -> dict[str, Any]:
    acting = [entry for entry in entries if entry["acting"] is None or entry["acting"]]
    proved = [entry for entry in acting if entry["acting"] is None or any(a["proof"] for a in entry["acting"])]
    tested = [entry for entry in entries if entry.get("suite")]
    return {
        "room": room,
        "faults": len(entries),
        "change a model": len(acting),
        "of these seen by the proof": len(proved),
        "seen by the suite": len(tested),
        "equivalent": sum(bool(entry["equivalent"]) for entry in entries),
    }
