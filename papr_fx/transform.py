"""The one call: trace, find the site, splice the proposal, prove."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor, fx, nn

from . import inputs
from .blocks import ancestors_of, find_blocks
from .diff import graph_text
from .errors import ArgumentError, NoSiteError, TraceError
from .module import Plan, PrunedModule, checked_z
from .passes import prune_tokens
from .proposal import InputStats, build_proposal
from .trace import ancestors, cut, fixed_value, propagate, sandbox, shape_of, trace
from .verify import prove

# What the code of models raises for images that it does not take.
_REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)


def transform(
    model: nn.Module,
    proposal: nn.Module | str,
    z: float,
    *,
    example_input: Tensor | None = None,
    mode: Literal["auto", "tokens"] = "auto",
    background: Literal["auto", "keep", "zero"] = "auto",
    proposal_size: int | tuple[int, int] | None = None,
    input_stats: InputStats = "auto",
    saliency: Literal["psm"] = "psm",
    merge: None = None,
    verify: bool = True,
) -> PrunedModule:
    """Rewrites a vision transformer so that it runs on the most significant patches alone (PaPr, ECCV 2024, Sec. 3).

    The model is traced to a graph, a significance network is made of `proposal`, and the kept tokens are gathered in front
    of the first block. `model` itself is not changed; the result shares its tensors.

    Args:
        model: An image classifier that takes (B, C, H, W), in eval or training mode.
        proposal: A light ConvNet classifier (its head is dropped), a module that returns a feature map (B, K, h, w) or a
            map (B, h, w), or the name of a timm model, whose pretrained weights are then loaded.
        z: Share of all tokens to keep, in (0, 1]: `int(N * z)` patches beside the prefix tokens, N counting both. At 1 the
            result is the traced model.
        example_input: Images such as the model takes, of which only the shape matters. Default: what the model states.
        mode: "tokens" gathers tokens in front of the blocks; "auto" picks by what the model is.
        background: What stands at dropped positions of models that keep a spatial layout; token models have none.
        proposal_size: Shorter side in pixels, or (rows, columns), to which images are resized for the proposal, bilinear.
        input_stats: "auto" re-normalises images for the proposal where the (mean, std) of both networks are known and
            differ, "shared" hands them over as they are, ((mean, std) of the model, (mean, std) of the proposal) says both.
        saliency: Source of the map: "psm", the mean over the proposal's last feature maps.
        merge: Token merging after pruning; none is available.
        verify: Whether to prove the rewrite on the model before returning it; `VerifyError` if it fails.

    Returns:
        A `torch.fx.GraphModule` that torch.compile takes.

    Raises:
        ArgumentError: An argument is out of range or of the wrong kind.
        ProposalError: `proposal` yields no significance map.
        TraceError: The model's forward cannot be recorded, or refuses these images.
        NoSiteError: The model has no place where pruning is sound.
        VerifyError: The rewritten model failed its proof.
    """
    keep_ratio = checked_z(z)
    model = inputs.checked_model(model)
    inputs.checked_word("mode", mode, inputs.MODES)
    inputs.checked_word("background", background, inputs.BACKGROUNDS)
    inputs.checked_word("saliency", saliency, ("psm",))
    if merge is not None:
        raise ArgumentError(f"merge must be None, not {merge!r}")
    images = inputs.example_images(model, example_input)
    size = inputs.checked_size(proposal_size)
    if images.is_meta and verify:
        raise ArgumentError("model has no weights (meta device), so nothing can be proved on it: pass verify=False")

    root, plan, recorded = _plan(model, images, min(keep_ratio, 0.9))
    root.papr_proposal = build_proposal(proposal, model, images, size=size, input_stats=input_stats, verify=verify)
    gm = _built(root, plan)
    _check_reads(gm, recorded)
    if gm.plan.z != keep_ratio:
        gm.retarget(keep_ratio)
    if os.environ.get("PAPR_FX_DEBUG") == "1":
        print(graph_text(gm.graph))
    if verify:
        prove(model, gm)
    return gm


def _plan(model: nn.Module, images: Tensor, z: float) -> tuple[nn.Module, Plan, list[fx.Graph]]:
    """Traces the model in both modes; returns the modules that the graphs call, the plan, and all that was recorded."""
    blocks = find_blocks(model)
    if not blocks:
        raise NoSiteError(
            f"{type(model).__name__} has no repeated blocks: sought composite modules (modules of modules), found none"
        )
    _run_once(model, images)
    opened = ancestors_of(blocks)
    while True:
        for name in opened:
            inputs.check_no_hooks(model.get_submodule(name), f"model.{name}")
        traced = trace(model, images, lambda _, name: name in opened)
        site = prune_tokens.find_site(traced.graph, blocks)
        dynamic = _takes_other_sizes(cut(sandbox(traced.root(model)).eval(), traced.graph, site.stream), images)
        if not dynamic or site.join.op != "call_module" or site.join.target in opened:
            break
        opened.add(str(site.join.target))  # its sizes must be values of this graph
    in_training = trace(model, images, lambda _, name: name in opened, training=True)
    dense = {False: traced.graph, True: _training_graph(traced.graph, site, in_training.graph, blocks)}
    flags = {model.training, *(model.get_submodule(name).training for name in opened)}
    if dense[True] is not dense[False] and len(flags) > 1:
        raise ArgumentError(
            f"{type(model).__name__} is partly in training mode, and its code depends on it: call model.train() or model.eval()"
        )
    plan = Plan(type(model).__name__, dense, tuple(blocks), frozenset(opened), dynamic, tuple(images.shape), z)
    plan.dense_graph(model.training)
    return traced.root(model), plan, [traced.recorded, in_training.recorded]


def _training_graph(graph: fx.Graph, site: prune_tokens.Site, training: fx.Graph, blocks: list[str]) -> fx.Graph | str:
    """The graph for training mode: the one for eval mode where they agree, a reason where the tokens differ at the splice."""
    if graph_text(training) == graph_text(graph):
        return graph
    sizes = {node.name: shape_of(node) for node in training.nodes}
    for node in graph.nodes:
        shape, other = shape_of(node), sizes.get(node.name)
        if shape and other and len(shape) == len(other) == 3 and other[1] < shape[1]:
            return (
                f"`{node.target}` itself drops patches in training, {shape[1]} tokens to {other[1]} (patch dropout): the map "
                "would no longer say which token is which. Set its rate to 0"
            )
        if node is site.stream:
            break
    try:
        found = prune_tokens.find_site(training, blocks)
    except NoSiteError as error:
        return str(error)
    if (found.grid, found.prefix, found.block.target) != (site.grid, site.prefix, site.block.target):
        return (
            f"in training `{found.block.target}` reads {found.prefix} prefix tokens and grid {found.grid}, in eval mode "
            f"`{site.block.target}` reads {site.prefix} and {site.grid}"
        )
    return training


def _check_reads(gm: PrunedModule, recorded: list[fx.Graph]) -> None:
    """Refuses a model in whose code Python went on with a number that pruning changes: the graph would hold the dense one."""
    for graph, training in zip(recorded, (False, True), strict=True):
        if isinstance(gm.plan.dense[training], str):
            continue
        stream = prune_tokens.find_site(graph, gm.plan.blocks).stream
        reads = [node for node in graph.nodes if "read" in node.meta and stream in ancestors(node)]
        before = {node: fixed_value(node) for node in reads}
        if not reads:
            continue
        hint = "which a graph would fix: compute with tensors or with `x.shape` itself there"
        try:
            propagate(gm.for_shapes(), gm.plan.prune(graph), gm.example())
        except TraceError as error:
            names = ", ".join(f"`{node.name}`" for node in reads)
            raise NoSiteError(f"the forward of {gm.plan.name} reads {names} as a Python number or length, {hint}") from error
        for node, value in before.items():
            if fixed_value(node) != value:
                raise NoSiteError(
                    f"the forward of {gm.plan.name} reads `{node.name}` as a Python number or length ({value} with all tokens, "
                    f"{fixed_value(node)} pruned), {hint}"
                )


def _run_once(model: nn.Module, images: Tensor) -> None:
    """Runs the model on one real image first: code that caches tensors by size must not cache fake ones."""
    copied = sandbox(model).eval()
    if not images.is_meta:
        with torch.no_grad(), torch.random.fork_rng(), suppress(*_REFUSALS):  # tracing meets the same error, and names its node
            copied(images[:1])


def _takes_other_sizes(embedding: fx.GraphModule, images: Tensor) -> bool:
    """Whether the part of the model in front of the blocks runs on images of twice the size, or of another aspect."""
    height, width = images.shape[-2:]
    for rows, columns in ((2 * height, 2 * width), (2 * height, width // 2), (height // 2, 2 * width)):
        try:
            with torch.no_grad():
                fx.Interpreter(embedding).run(images.new_zeros((1, images.shape[1], rows, columns)))
        except _REFUSALS:
            continue
        return True
    return False


def _built(root: nn.Module, plan: Plan) -> PrunedModule:
    try:
        return PrunedModule(root, plan)
    except TraceError as error:
        raise NoSiteError(
            f"the blocks of {plan.name} do not run on fewer tokens: they use positions beyond the embedding (a rotary table, "
            f"a relative-position bias, a mask, a reshape to the grid): {str(error).splitlines()[0]}"
        ) from error
