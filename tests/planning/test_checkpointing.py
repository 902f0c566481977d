"""Gradient checkpointing: what the model checkpoints, the transformed model checkpoints too."""

import copy
import io
import operator
import pickle
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import papr_fx
from papr_fx.planning.checkpointing import outline, with_functions
from papr_fx.tracing.checkpoints import Region, lay_inside, regions_of
from papr_fx.tracing.numerics import relative_error

from ..models import enliven, toy_proposal
from ..models.checkpointed import CASES, User, by_block
from ..versions import called_by_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # re-entrant calls, in any model


def example(model):
    return torch.empty(1, 3, *((16, 24) if isinstance(model, User) else (32, 32)))


@cache
def transformed(name, **options):
    """The case's model with checkpoints in training, what it becomes, and images. Tests leave them as they are."""
    make, given, _ = CASES[name]
    model = make(True).train()
    options = {"example_input": example(model), "verify": False, **given, **options}
    return model, papr_fx.transform(model, toy_proposal(), 0.5, **options), pictures(example(model))


def plain(gm):
    """The same graph without checkpoints."""
    return torch.fx.Interpreter(gm).run


def pictures(example):
    return torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(3))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def saved(module, x):
    """Bytes that a forward pass keeps for the backward pass, parameters excepted."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step(gm, x, run=None):
    """The output and the gradients of a training step, with the same random numbers in each call."""
    gm.zero_grad()
    torch.manual_seed(5)
    output = logits(gm(x) if run is None else run(x))
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in gm.parameters() if p.grad is not None)]


def assert_same(found, expected):
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_and_what_is_computed(name):
    model, gm, x = transformed(name)
    make, _, regions = CASES[name]
    assert gm.code.count("checkpoint.checkpoint(") == regions
    dense, kept = saved(model, x), saved(gm, x)
    assert kept < 1.02 * dense < 0.95 * saved(make(False).train(), x)
    if regions and name != "transformers ViT":  # its layers, called whole, are checkpointed inside regions too
        assert kept < (0.8 if name in ("MLPs, merged", "sequential", "selective") else 0.5) * saved(plain(gm), x)
        assert_same(step(gm, x), step(gm, x, plain(gm)))


def test_the_proof_and_the_diff_do_not_see_regions():
    model, gm, _ = transformed("nested", verify=True)
    make, options, _ = CASES["nested"]
    other = make(False).train()
    dense = papr_fx.transform(other, toy_proposal(), 0.5, example_input=example(model), verify=False, **options)
    assert papr_fx.graph_diff(model, gm) == papr_fx.graph_diff(other, dense) != ""
    assert papr_fx.report(gm) == papr_fx.report(dense)


def test_another_keep_ratio_and_evaluation_are_checkpointed():
    _, gm, x = transformed("timm Swin")
    gm = copy.deepcopy(gm).eval()
    for z in (1.0, 0.3):
        papr_fx.set_keep_ratio(gm, z)
        assert saved(gm, x) < 0.4 * saved(plain(gm), x)
        assert_same(step(gm, x), step(gm, x, plain(gm)))


def test_flags_that_hold_in_training_only():
    _, gm, x = transformed("transformers ViT, merged")
    gm = copy.deepcopy(gm)
    assert "checkpoint" in gm.code
    assert "checkpoint" not in gm.eval().code
    assert saved(gm, x) == saved(plain(gm), x) > 2 * saved(gm.train(), x)


@pytest.mark.parametrize(("name", "regions"), [("nested", 4), ("selective", 4), ("re-entrant", 4)])
def test_compiled(name, regions):
    _, gm, x = transformed(name)
    seen = EagerAndRecordGraphs()
    torch.compile(gm, backend=seen, fullgraph=True)(x)
    (graph,) = seen.graphs
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    assert sum("activation_checkpoint" in str(node.target) for node in nodes) == regions


def test_gradients_of_a_compiled_model():
    _, gm, x = transformed("timm ConvNeXt")
    gm = copy.deepcopy(gm)
    for module in gm.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    found = step(gm, x, torch.compile(gm, backend="aot_eager", fullgraph=True))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, step(gm, x), strict=True))


def file_copy(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda gm: pickle.loads(pickle.dumps(gm)), "save": file_copy}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_checkpointed(name):
    _, gm, x = transformed("selective")
    copied = COPIES[name](gm)
    assert copied.code == gm.code
    assert saved(copied, x) == saved(gm, x) < saved(plain(gm), x)
    assert_same(step(copied, x), step(gm, x))


def test_options_are_kept():
    _, gm, _ = transformed("re-entrant")
    assert gm.code.count("use_reentrant = True, determinism_check = 'none', early_stop = False)") == 4


class Branches(nn.Module):
    """Fails while it is traced."""

    def forward(self, x):
        return checkpoint(lambda x: x if x.mean() > 0 else -x, x, use_reentrant=False)


def contexts():
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


def with_contexts(model, x):
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def test_functions_among_the_options_are_the_users_own():
    """A trace runs copies of functions; a copy could not be pickled."""
    model = User(with_contexts).train()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=example(model), verify=False)
    assert {dict(region.options)["context_fn"] for node in gm.graph.nodes for region in regions_of(node)} == {contexts}
    torch.save(gm, io.BytesIO())


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_an_attention_that_is_opened_for_merging_stays_in_its_region():
    model = User(partial(by_block, use_reentrant=False)).train()
    for block in model.blocks:
        block.attn = MultiHead()
    enliven(model)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=example(model), verify=False, merge=papr_fx.Merge(2))
    inside = [node for node in gm.graph.nodes if node.target is torch.nn.functional.scaled_dot_product_attention]
    assert inside
    assert all(regions_of(node) for node in inside)


def test_nothing_is_left_behind_by_a_trace_that_fails():
    before = called_by_checkpoint()
    with pytest.raises(papr_fx.PaprError, match="content of the image"):
        papr_fx.transform(Branches(), toy_proposal(), 0.5, example_input=torch.empty(1, 3, 8, 8))
    assert called_by_checkpoint() is before


def in_region(node, *numbers):
    return lay_inside(node, tuple(map(Region, numbers)))


def lines_of(graph):
    """The code of the outline of a graph."""
    return [line.strip() for line in with_functions(outline(graph).graph.python_code("self").src).splitlines() if line.strip()]


def test_what_a_pass_puts_into_a_region():
    """What reads nothing of the region comes before it; what reads it is part of it, unless it comes last."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first = in_region(graph.call_function(torch.sin, (x,), name="first"), 0)
    keep = graph.call_function(torch.topk, (y, 2), name="keep")
    gathered = graph.call_function(torch.gather, (first, keep), name="gathered")
    second = in_region(graph.call_function(torch.cos, (gathered,), name="second"), 0)
    after = graph.call_function(torch.add, (second, gathered), name="after")
    graph.output((after, keep))
    lines = lines_of(graph)
    begin = lines.index("def papr_checkpointed_0(x, keep):")
    assert lines[begin - 1].startswith("keep = torch.topk(y, 2)")
    assert [line.split(" =")[0] for line in lines[begin + 1 : begin + 4]] == ["first", "gathered", "second"]
    assert lines[begin + 4] == "return gathered, second"
    assert lines[begin + 5].startswith("papr_region_0 = torch.utils.checkpoint.checkpoint(papr_checkpointed_0, x, keep, use_re")
    assert "x = " in lines[begin + 5].split(";")[1]  # freed after the call, not before
    assert regions_of(first) == (Region(0),)  # the graph itself stays as it is


def test_regions_in_regions_and_parameters_that_others_read_too():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    table = in_region(graph.create_node("get_attr", "table"), 0)
    a = in_region(graph.call_function(torch.add, (x, table), name="a"), 0)
    b = in_region(graph.call_function(torch.sin, (a,), name="b"), 0, 1)
    c = in_region(graph.call_function(torch.cos, (b,), name="c"), 0)
    d = in_region(graph.call_function(torch.add, (c, table), name="d"), 2)
    graph.output(d)
    plan = outline(graph)
    module = torch.fx.GraphModule({"table": torch.ones(3)}, graph)
    values = {"torch": torch}
    exec(with_functions(plan.graph.python_code("self").src), values)
    given = torch.randn(3, requires_grad=True)
    assert torch.equal(values["forward"](module, given), module(given))
    lines = lines_of(graph)
    assert [line for line in lines if line.startswith(("def papr", "return"))] == [
        *("def papr_checkpointed_0(x, table):", "def papr_checkpointed_1(a):", "return b", "return c"),
        *("def papr_checkpointed_2(papr_region_0, table):", "return d", "return papr_region_2"),
    ]
    assert [list(graph.nodes)[place].name for place in plan.places] == [
        *("x", "table", "a", "a", "b", "b", "b", "b", "c", "c", "c", "d", "d", "d", "d", "output")
    ]


@pytest.mark.parametrize(("where", "kept"), [("alone", True), ("among results", False), ("among inputs", False)])
def test_re_entrant_calls_get_no_tuples_of_tensors(where, kept):
    """They would lose the gradients of such tensors. A tuple that is the result itself is none."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    inside = (Region(0, (("use_reentrant", True),)),)
    first = lay_inside(graph.call_function(torch.sin, (x,)), () if where == "among inputs" else inside)
    halves = lay_inside(graph.call_function(torch.chunk, (first, 2)), () if where == "among inputs" else inside)
    halves.meta["parts"] = ((2,), (2,))
    half = graph.call_function(operator.getitem, (halves, 0))
    last = lay_inside(graph.call_function(torch.add, (first, half)), inside if where == "among inputs" else ())
    if where == "among inputs":
        lay_inside(half, inside)
    graph.output((last, half) if where == "among results" else last)
    if where == "alone":
        last.args = (x, half)
    code = "\n".join(lines_of(graph))
    assert f"use_reentrant = {kept}" in code
    assert code.count("use_reentrant") == 1


def test_lines_of_code_are_those_of_their_nodes():
    _, gm, _ = transformed("nested")
    lines = gm.code[gm.code.index("def forward") :].splitlines()
    nodes = list(gm.graph.nodes)
    named = {nodes[place].name: lines[line].strip() for line, place in gm._lineno_map.items() if place is not None}
    assert named["head"].startswith("head = self.head(")
