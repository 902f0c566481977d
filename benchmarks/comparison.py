"""Ways to use fewer tokens, on one ViT with trained weights, at equal MACs. `python -m benchmarks.comparison WEIGHTS FOLDER`.

WEIGHTS and FOLDER, k-NN and probe are those of `benchmarks.trained_vit`; +- is a standard error. Every method gets the
multiply-accumulates of PaPr at z, its proposal (EfficientNet-Lite0) included; a coarse background takes a little less. Random
patches are chosen beside the proposal's run, so that they cost the same. Then all take turns and are timed on one thread, eager
and compiled. Memory is the largest sum of the bytes of activations alive at once, eager. What was measured is kept in out/ at
once: the same command goes on where it was stopped, and a stage of timing starts again.

All methods run as this project's passes, written from the papers (docs/reducers.md), not as their authors' releases.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import papr_fx
from papr_fx.errors import first_line
from papr_fx.evaluation.bench import Candidate, TimingSettings, benchmark
from papr_fx.peers import at_macs, kept_before, reduction_named
from papr_fx.planning.module import sibling
from papr_fx.proposals.named import LITE0_STATISTICS, lite0
from papr_fx.tracing.macs import count_module_macs

from .record import Run, environment, peak_megabytes
from .saliency_vit import backbone, read_weights
from .trained_vit import STATISTICS, Judges, Photographs, knn, outputs, probe, with_error

_FORMATS = ("", ".2f", "", "", "", ".0f", ".2f", ".0f", ".2f", ".0f", "", "")


@dataclass(frozen=True)
class Method:
    """What `transform` is given.

    Attributes:
        reduction: A name of `papr_fx.peers.REDUCERS`, if tokens are reduced in the blocks.
        prunes: Whether patches are dropped before the blocks.
        options: Further options.
    """

    reduction: str = ""
    prunes: bool = True
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def at(self, model: nn.Module, images: Tensor, z: float, macs: int) -> papr_fx.PrunedModule:
        """The model at the MACs that are given; where there is nothing to fit, at the keep ratio z."""
        reduction = reduction_named(self.reduction) if self.reduction else None
        stats = (STATISTICS, LITE0_STATISTICS)
        given: dict[str, Any] = {"example_input": images, "input_stats": stats, "verify": False, **self.options}
        gm = papr_fx.transform(model, lite0(), 0.5, merge=reduction, **given)
        if reduction is None:
            return sibling(gm, z=z)
        return at_macs(sibling(gm, z=kept_before(z) if self.prunes else 1.0), macs)


_COARSE = {"background": "coarse"}
PAPR = "PaPr"
METHODS = {
    PAPR: Method(),
    "PaPr, coarse background": Method(options=_COARSE),
    "PaPr, then merging": Method("papr+tome"),
    "PaPr, coarse, then merging": Method("papr+tome", options=_COARSE),
    "random patches": Method(options={"saliency": "random"}),
    "token merging, constant r": Method("tome", prunes=False),
    "token merging, late": Method("tome:late", prunes=False),
    "token merging, equal shares": Method("tome:share", prunes=False),
    "TokenFusion": Method("tofu", prunes=False),
    "TokenPropagation (GTP-ViT)": Method("gtp", prunes=False),
    "attention pruning": Method("ats", prunes=False),
}


def candidates(
    model: nn.Module, images: Tensor, names: Iterable[str], ratios: Iterable[float]
) -> Iterator[tuple[str, Candidate]]:
    """The dense model, and every method at the MACs of PaPr at each keep ratio; PaPr itself comes first."""
    yield "dense", Candidate(model, count_module_macs(model, images))
    for z in ratios:
        macs = papr_fx.report(METHODS[PAPR].at(model, images, z, 0)).total_macs
        for name in dict.fromkeys((PAPR, *names)):
            gm = METHODS[name].at(model, images, z, macs)
            yield f"{name}, z={z:g}", Candidate(gm, papr_fx.report(gm).total_macs)


def accuracies(found: Mapping[str, Candidate], judges: Judges, test: Photographs) -> Iterator[dict[str, str]]:
    """Top-1 of the classifiers in percent, with standard errors; and the probe's difference from PaPr, paired over images."""
    papr: Tensor | None = None
    for name, candidate in found.items():
        features = outputs(candidate.module, test.images, name)
        right = {key: (classify(features) == judges.truth).float() for key, classify in judges.classify.items()}
        row = {key: "{:.1f} +- {:.1f}".format(*with_error(values, 100)) for key, values in right.items()}
        papr = right["probe"] if name.startswith(f"{PAPR}, z") else papr
        row["probe - PaPr"] = "" if papr is None else "{:+.1f} +- {:.1f}".format(*with_error(right["probe"] - papr, 100))
        yield row


def graph_breaks(module: nn.Module, images: Tensor) -> int:
    """How often torch.compile leaves the graph of a module."""
    torch.compiler.reset()
    return int(torch._dynamo.explain(module)(images).graph_break_count)


@torch.inference_mode()
def onnx_export(module: nn.Module, images: Tensor) -> str:
    """Whether ONNX Runtime computes what the module does: "yes", or the reason why not."""
    import onnxruntime

    errors: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # its classes are stated nowhere
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        try:
            program: Any = torch.onnx.export(module, (images,), dynamo=True, verbose=False)
            program.save(path)
        except torch.onnx.OnnxExporterError as error:
            return f"no: {first_line(error)}"
        try:
            session: Any = onnxruntime.InferenceSession(path)
        except (errors.NotImplemented, errors.Fail, errors.InvalidGraph) as error:
            return f"no: {first_line(error)}"
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    expected = module(images)
    error = float((found - expected).abs().max() / expected.abs().max())
    return "yes" if error < 1e-3 else f"no: outputs differ by {error:.1e}"


def judges_of(model: nn.Module, train: Photographs, test: Photographs) -> Judges:
    """Judges of class tokens alone, fitted on the dense model's features."""
    features = outputs(model, train.images, "training images")

    def nearest(tokens: Tensor) -> Tensor:
        return knn(features, train.classes, tokens)

    classify = {"k-NN": nearest, "probe": probe(features, train.classes)}
    return Judges(test.classes, features[:0], classify, features[:0])


Row = dict[str, Any]


def measure(
    found: Mapping[str, Candidate],
    judges: Callable[[], Judges],
    test: Photographs,
    how: Run,
    known: Iterable[Row] = (),
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measures the dense model, and every method at each keep ratio.

    Args:
        found: What is measured, by name.
        judges: Fits the judges, where they are needed.
        test: Photographs.
        how: How many of them are in a batch that is timed, and for how many rounds.
        known: Rows of a run that was stopped.
        save: Called with the rows after each stage.

    Returns:
        A row each.
    """
    batch, rounds, images = how.batch, how.rounds, test.images[: how.batch]
    rows: dict[str, Row] = {name: {"method": name, "GMACs": candidate.macs / 1e9} for name, candidate in found.items()}
    for row in known:
        rows[row["method"]] |= row

    def lack(column: str) -> bool:
        return any(column not in row for row in rows.values())

    if lack("probe"):
        for name, row in zip(found, accuracies(found, judges(), test), strict=True):
            rows[name] |= row
        save([*rows.values()])
    for compiled in (False, True):
        run = "compiled" if compiled else "eager"
        if not lack(f"{run}, ms"):
            continue
        settings = TimingSettings(batch_sizes=[batch], compiled=compiled, rounds=rounds)
        with torch.inference_mode(), tqdm(total=len(found) * (rounds + settings.warmup), desc=run, leave=False) as progress:
            for row in benchmark("", found, images, settings, progress=progress.update):
                rows[row.variant] |= {f"{run}, ms": row.infer_step_time, f"{run}, times": row.speed_up}
        save([*rows.values()])
    for name, candidate in found.items():
        module = candidate.module
        if "ONNX" not in rows[name]:
            megabytes, breaks = peak_megabytes(lambda module=module: module(images)), graph_breaks(module, images)
            rows[name] |= {"MB": megabytes, "breaks": breaks, "ONNX": onnx_export(module, images)}
            save([*rows.values()])
    return [*rows.values()]


def main() -> None:
    """Prints the table, and writes out/comparison.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="ONNX file")
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--z", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--images", type=int, help="at most as many test images")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a batch that is timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out/comparison.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    record: Row = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    known: list[Row] = record["rows"] if record.get("given") == given else []

    def save(rows: list[Row]) -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"given": given, "environment": environment(0), "rows": rows}, indent=2) + "\n")

    model = backbone(read_weights(arguments.weights)[0])
    train, test = Photographs.of(arguments.folder / "train"), Photographs.of(arguments.folder / "val", arguments.images)
    found = dict(candidates(model, test.images[:1], arguments.methods, arguments.z))
    how = Run(arguments.batch_size, arguments.rounds, torch.device("cpu"))
    rows = measure(found, lambda: judges_of(model, train, test), test, how, known, save)
    print(f"{len(test.images)} images, timed in batches of {arguments.batch_size}; {json.dumps(environment(0))}\n")
    print(tabulate(rows, headers="keys", floatfmt=_FORMATS, tablefmt="github", disable_numparse=[2, 3, 4]))


if __name__ == "__main__":
    main()
