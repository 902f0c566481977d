"""Pruned models that leave Python with symbolic batch, height and width give at every size what eager mode gives."""

import onnxruntime
import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from .models import Attention, Block, enliven, toy_proposal

ANY = torch.export.Dim.DYNAMIC
DYNAMIC = ({0: ANY, 2: ANY, 3: ANY},)
SIZES = ((1, 16, 16), (3, 24, 40), (2, 40, 16))


class AnySize(nn.Module):
    """A vision transformer without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Block(8, Attention(8, 2, True))])

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def pruned_vit() -> torch.fx.GraphModule:
    return papr_fx.transform(
        enliven(AnySize()).eval(), toy_proposal(), 0.3, example_input=torch.zeros(1, 3, 16, 16), verify=False
    )


def dynamic_program(gm, shape=(2, 3, 24, 32)) -> torch.export.ExportedProgram:
    program = torch.export.export(gm, (torch.randn(shape),), dynamic_shapes=DYNAMIC)
    name = program.graph_signature.user_inputs[0]
    (images,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == name)
    assert [isinstance(size, torch.SymInt) for size in images.meta["val"].shape] == [True, False, True, True]
    return program


def assert_equal_at_all_sizes(gm, run, sizes=SIZES) -> None:
    counts = set()
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        counts.add(sum(int(mask[0].sum()) for mask in papr_fx.keep_masks(gm, x).values()))
        assert relative_error(run(x), gm(x)) < 1e-5
    assert len(counts) == len(sizes)  # as many tokens are kept as each size asks for


@torch.no_grad()
def test_torch_export():
    gm = pruned_vit()
    assert_equal_at_all_sizes(gm, dynamic_program(gm).module())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
@torch.no_grad()
def test_torch_export_of_models_of_timm(name):
    vit = {"depth": 1, "img_size": 64, "dynamic_img_size": True}
    options = vit if "vit" in name else {"depths": (1,) * 4, "dims": (8,) * 4}
    model = enliven(timm.create_model(name, num_classes=5, **options)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64), verify=False)
    program = dynamic_program(gm, (2, 3, 96, 128))
    assert_equal_at_all_sizes(gm, program.module(), ((1, 64, 64), (3, 128, 64), (2, 160, 96)))


@torch.no_grad()
def test_onnx(tmp_path):
    gm = pruned_vit()
    path = str(tmp_path / "pruned.onnx")
    torch.onnx.export(gm, (torch.randn(2, 3, 24, 32),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    (images,) = session.get_inputs()
    assert [isinstance(size, str) for size in images.shape] == [True, False, True, True]
    assert_equal_at_all_sizes(gm, lambda x: torch.from_numpy(session.run(None, {images.name: x.numpy()})[0]))


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor(tmp_path):
    gm = pruned_vit()
    package = torch._inductor.aoti_compile_and_package(dynamic_program(gm), package_path=str(tmp_path / "pruned.pt2"))
    assert_equal_at_all_sizes(gm, torch._inductor.aoti_load_package(package))
