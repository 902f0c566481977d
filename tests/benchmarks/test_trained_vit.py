"""The measurement of a trained ViT, on toy models, and its statistics, against plain Python."""

import math
import sys

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import papr_fx
from benchmarks import saliency_vit, trained_plot, trained_vit
from benchmarks.record import write
from benchmarks.trained_maps import Detail, PsmAndDetail, centre, off_centre
from benchmarks.trained_vit import Judges, Photographs, correlation, dense_row, knn, measure, overlap, table, with_error

from ..models import Shape, ToyViT, enliven, toy_proposal

SHAPE = Shape(pool="cls", depth=1)


class Dense(nn.Module):
    """A toy ViT whose patches are laid out as their grid, for a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.conv = ToyViT(SHAPE), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        tokens = self.vit.tokens(x)
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self.conv(tokens[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4)).sigmoid()


def test_rows_of_toy_models(monkeypatch, tmp_path):
    monkeypatch.setattr(trained_vit, "lite0", toy_proposal)
    monkeypatch.setattr(trained_vit, "LITE0_STATISTICS", trained_vit.STATISTICS)
    models = enliven(ToyViT(SHAPE)).eval(), enliven(Dense()).eval()
    images, classes = torch.randn(12, 3, 8, 12), torch.arange(12) % 3
    with torch.no_grad():
        features, maps = models[0](images), models[1](images[:5])
    judges = Judges(classes, features, {"k-NN": lambda f: knn(features, classes, f, k=1)}, maps)
    dense = dense_row(models[0], judges, images[:1])
    rows = list(measure(models, judges, Photographs(images, classes), ["psm", "centre"], [0.5, 0.9]))
    assert [(row["map"], row["z"], row["background"]) for row in rows] == [
        (name, z, background) for name in ("psm", "centre") for z in (0.5, 0.9) for background in ("drop", "coarse")
    ]
    for drop, coarse in zip(rows[::2], rows[1::2], strict=True):
        assert coarse["tokens"] <= drop["tokens"]
        assert coarse["cosine - drop"] == pytest.approx(coarse["cosine"] - drop["cosine"])
        assert 0 < drop["cosine"] < 1
        assert "cosine - drop" not in drop
    assert all(rows[2][key] > rows[0][key] for key in ("cosine", "correlation"))  # more tokens
    assert table(rows, judges).count("\n") == 9
    assert_curve([dense, *rows], tmp_path, monkeypatch)
    counted = papr_fx.report(trained_vit.pruned(models[0], "psm", "coarse", images[:1]))
    assert rows[1]["GMACs"] * 1e9 == pytest.approx(counted.total_macs)
    assert counted.proposal_macs > 0
    assert dense["GMACs"] * 1e9 == pytest.approx(counted.dense_macs)
    assert dense["k-NN"] == pytest.approx(100)
    same = judges.scores(features, maps)
    assert {key: with_error(values)[0] for key, values in same.items()} == pytest.approx(dict.fromkeys(same, 1.0))


def assert_curve(rows, folder, monkeypatch):
    """A record is drawn as accuracy against GMACs: a line for each map and background, and a point for the dense model."""
    write(folder / "record.json", rows, seed=0)
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **options: figures.append(save(figure, *given, **options) or figure)
    )
    monkeypatch.setattr(
        sys, "argv", ["trained_plot", str(folder / "record.json"), str(folder / "curve.png"), "--measured", "k-NN"]
    )
    trained_plot.main()
    with Image.open(folder / "curve.png") as picture:
        assert picture.size == (840, 480)
    (axes,) = figures[0].axes
    lines, labels = axes.get_legend_handles_labels()
    assert labels == ["psm, drop", "psm, coarse", "centre, drop", "centre, coarse", "dense"]
    drawn = {label: line[0].get_xydata().tolist() for line, label in zip(lines, labels, strict=True)}
    assert drawn["psm, coarse"] == [[row["GMACs"], row["k-NN"]] for row in (rows[2], rows[4])]
    assert drawn["dense"] == [[rows[0]["GMACs"], rows[0]["k-NN"]]]
    assert "GMACs" in axes.get_xlabel()


def test_nearest_neighbours_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    classes = torch.tensor([0, 1, 1])
    assert knn(train, classes, torch.tensor([[1.0, 0.02], [0.1, 1.0]]), k=1).tolist() == [0, 1]
    assert knn(train, classes, torch.tensor([[1.0, 0.02]]), k=2, temperature=100.0).tolist() == [0]
    assert knn(train, classes, torch.tensor([[1.0, 0.02]]), k=3, temperature=100.0).tolist() == [1]


def test_maps_are_compared():
    a = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    b = torch.tensor([[0.9, 0.2, 0.7, 0.0], [0.1, 0.2, 0.3, 0.4]]).view(2, 1, 2, 2)
    assert overlap(a, b).tolist() == [pytest.approx(1 / 3), 1.0]
    expected = torch.corrcoef(torch.stack([a[0].flatten(), b[0].flatten()]))[0, 1]
    assert float(correlation(a, b)[0]) == pytest.approx(float(expected))


def test_standard_errors():
    assert with_error(torch.tensor([1.0, 2.0, 3.0, 6.0]), 10) == pytest.approx((30.0, 10 * math.sqrt(14 / 3 / 4)))


def test_the_centre_comes_first():
    found = centre(torch.zeros(2, 5, 3, 5))
    assert found.shape == (2, 3, 5)
    assert found[1].argmax() == 7
    assert found[0, 0, 0] == found.min()


def test_photographs_are_spread_over_classes(tmp_path):
    for number, name in enumerate(("b", "a")):
        (tmp_path / name).mkdir()
        for image in range(2):
            Image.new("RGB", (224, 224), (255 * number, 0, 0)).save(tmp_path / name / f"{image}.png")
    found = Photographs.of(tmp_path, 2)
    assert found.classes.tolist() == [0, 0]
    found = Photographs.of(tmp_path)
    assert found.classes.tolist() == [0, 1, 0, 1]
    means, stds = trained_vit.STATISTICS
    assert float(found.images[0, 0, 0, 0]) == pytest.approx((1 - means[0]) / stds[0])
    assert float(found.images[1, 2, 5, 7]) == pytest.approx(-means[2] / stds[2])


@pytest.mark.slow
def test_weights_are_read_from_a_file(tmp_path):
    """A file of random weights, laid out as the real one: the network is the one whose weights they are."""
    import timm
    from onnx import TensorProto, helper, numpy_helper

    model = enliven(timm.create_model("vit_small_patch14_dinov2", img_size=37 * 14, num_classes=0)).eval()
    state = model.state_dict()
    names = {
        "backbone.embeddings.cls_token": "cls_token",
        "backbone.layernorm.weight": "norm.weight",
        "backbone.layernorm.bias": "norm.bias",
        "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    }
    tensors = {name: state[own] for name, own in names.items()}
    tensors |= {"onnx::Concat_1": state["pos_embed"][:, :1], "onnx::Reshape_2": state["pos_embed"][:, 1:]}
    nodes = []

    def linear(module, weight, bias):
        tensors[f"backbone.{module}.bias"] = bias
        tensors[f"onnx::MatMul_{len(tensors)}"] = weight.T
        path = "/backbone/" + module.replace(".", "/") + "/MatMul"
        nodes.append(helper.make_node("MatMul", ["x", list(tensors)[-1]], [path], name=path))

    for block in range(12):
        old, new = f"encoder.layer.{block}", f"blocks.{block}"
        weights, biases = (state[f"{new}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear(f"{old}.attention.attention.{part}", weight, bias)
        for theirs, ours in (("attention.output.dense", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            linear(f"{old}.{theirs}", state[f"{new}.{ours}.weight"], state[f"{new}.{ours}.bias"])
        for name in ("norm1", "norm2"):
            tensors |= {f"backbone.{old}.{name}.{kind}": state[f"{new}.{name}.{kind}"] for kind in ("weight", "bias")}
        for number in (1, 2):
            tensors[f"backbone.{old}.layer_scale{number}.lambda1"] = state[f"{new}.ls{number}.gamma"]
    decoder = saliency_vit.Decoder(28)
    tensors |= {f"decoder.{name}": value for name, value in decoder.state_dict().items() if value.is_floating_point()}
    initializers = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in tensors.items()]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "vit", [image], [image], initializers)
    path = tmp_path / "vit.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())

    weights = saliency_vit.read_weights(path)
    x = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        assert torch.equal(saliency_vit.backbone(weights[0], 518)(x), model(x))
        tokens = model.forward_features(x)[:, 1:]
        maps = saliency_vit.Saliency(weights, 518)
        decoder.size = 518
        assert torch.equal(maps(x), decoder.eval()(tokens.transpose(1, 2).reshape(1, 384, 37, 37)))


def test_detail_is_the_deviation_of_pixels():
    images = torch.zeros(1, 3, 28, 28)
    images[:, :, :14, 14:].copy_(torch.tensor([-1.0, 3.0]).repeat(7))  # deviation 2 about a mean of 1
    assert Detail()(images).tolist() == [[[0.0, 2.0], [0.0, 0.0]]]


def test_psm_and_detail_weigh_the_same():
    mixed = PsmAndDetail().eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        found = mixed(images)
        psm = mixed.network.extract_features(images).mean(1, keepdim=True)
        psm = torch.nn.functional.interpolate(psm, size=(16, 16), mode="bicubic", align_corners=False)[:, 0]
        detail = mixed.detail(images)
    for maps in (psm, detail):
        maps -= maps.mean((1, 2), keepdim=True)
        maps /= maps.std((1, 2), keepdim=True)
    torch.testing.assert_close(found, psm + detail, rtol=1e-4, atol=1e-4)


def test_subjects_move_to_all_corners():
    images = torch.zeros(4, 1, 224, 224)
    images[:, :, 112, 112] = 1
    corners = [tuple(divmod(int(image.argmax()), 224)) for image in off_centre(images)]
    assert corners == [(176, 176), (176, 48), (48, 176), (48, 48)]
