"""Plants faults one by one, and notes who sees them. `python -m benchmarks.planted_faults --out out/planted_faults.json`.

Each fault changes one decision of the code. The proof is asked on models of unlike structure: on those on which a fault acts,
which is where anything that a user can see differs, `transform` should refuse the model. The suite is asked with the nearest
tests first. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .fault import FAULTS, Fault
from .judge import ask_proof, ask_suite, preload, reference, tests_of
from .table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Plants all faults that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/planted_faults.json"))
    parser.add_argument("--only", help="faults whose name, file or room holds this")
    parser.add_argument("--models", default="", help="models whose name holds this")
    parser.add_argument("--ask", choices=["proof", "suite", "both"], default="both")
    parser.add_argument("--part", default="1/1", help="the k-th of n parts, each with a file of its own: k/n")
    parser.add_argument("--again", action="store_true", help="ask again for those that nobody saw")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of these files, and plant nothing")
    given = parser.parse_args(arguments)
    if given.table:
        print(table([json.loads(path.read_text()) for path in given.table]))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    preload()
    number, parts = map(int, given.part.split("/"))
    chosen = [fault for fault in FAULTS if not given.only or given.only in f"{fault.name} {fault.path} {fault.room}"]
    chosen = chosen[number - 1 :: parts]
    results: dict[str, dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else {}
    known = reference(given.models) if given.ask != "suite" else {}
    for count, fault in enumerate(chosen, 1):
        entry = results.setdefault(fault.key, {})
        entry |= {"name": fault.name, "path": fault.path, "room": fault.room, "equivalent": fault.equivalent}
        if given.ask != "suite" and ("acting" not in entry or (given.again and not _proved(entry))):
            acting = ask_proof(fault, known)
            entry["acting"] = None if acting is None else [a._asdict() for a in acting]
        if given.ask != "proof" and ("suite" not in entry or (given.again and not entry["suite"])):
            entry["suite"] = _asked(fault)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1))
        print(f"{count}/{len(chosen)} {fault.room}: {fault.name}: {_line(entry)}", flush=True)


def _asked(fault: Fault) -> str:
    for group in tests_of(fault):
        found = ask_suite(fault, group)
        if found is None or found[0]:
            return found[0] if found else "the process ended"
    return ""


def _proved(entry: dict[str, Any]) -> bool:
    return entry["acting"] is None or any(a["proof"] for a in entry["acting"])


def _line(entry: dict[str, Any]) -> str:
    acting = entry.get("acting", [])
    if acting is None:
        return "the process ended"
    seen = [a for a in acting if a["proof"]]
    return f"acts on {len(acting)}, proof {len(seen)} {sorted({a['proof'] for a in seen})}; suite: {entry.get('suite', '-')}"


if __name__ == "__main__":
    main()
