"""What helps to find out why: stages of the pipeline, the user's own frames in errors, reasons in the report."""

import re
import traceback

import pytest
import timm
import torch
from torch import Tensor, nn

import papr_fx

from .models import Shape, ToyViT, toy_proposal
from .models.positioned import positioned

FRONT = ("trace", "splice_proposal", "embed_kept_patches")


def stages(text: str) -> list[str]:
    return re.findall(r"^--- (\w+)$", text, flags=re.M)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (lambda: positioned(Shape(), "rotary"), {}, [*FRONT, "gather_positions", "prune_tokens", "restore_places"]),
        (
            lambda: ToyViT(Shape()),
            {"merge": papr_fx.Merge(2)},
            [*FRONT, "gather_positions", "prune_tokens", "restore_places", "reduce_tokens"],
        ),
        (lambda: timm.create_model("convnext_atto", num_classes=2).eval(), {"mode": "pixels"}, ["trace", "prune_pixels"]),
    ],
)
def test_each_stage_is_printed_under_the_name_of_its_pass(model, options, expected, monkeypatch, capsys):
    monkeypatch.setenv("PAPR_FX_DEBUG", "1")
    papr_fx.transform(model(), toy_proposal(), 0.5, verify=False, **options)
    printed = capsys.readouterr().out
    assert stages(printed) == [*expected, "result"]
    parts = dict(zip([*expected, "result"], re.split(r"^--- \w+$", printed, flags=re.M)[1:], strict=True))
    assert "papr_" not in parts["trace"]
    assert "papr_map = papr_proposal(" in parts[expected[1]]
    if "prune_tokens" in parts:
        assert "gather_tokens" not in parts["gather_positions"]
        assert re.search(r"papr_tokens = papr_fx.gather_tokens\(.*# \(B, 9, 8\)", parts["prune_tokens"])
        assert "(B, 17, 8)" in parts["trace"]
        assert "# (" not in parts["gather_positions"] or "rotary" not in expected
    assert "papr_map" in parts["result"]


def test_nothing_is_printed_otherwise(monkeypatch, capsys):
    monkeypatch.delenv("PAPR_FX_DEBUG", raising=False)
    papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, verify=False)
    assert not capsys.readouterr().out


class Broken(ToyViT):
    def tokens(self, x: Tensor) -> Tensor:
        return self.a_line_of_the_user(super().tokens(x))

    def a_line_of_the_user(self, x: Tensor) -> Tensor:
        raise ValueError("a value of the user")


class Branching(ToyViT):
    def classify(self, x: Tensor) -> Tensor:
        return self.a_branch_of_the_user(super().classify(x))

    def a_branch_of_the_user(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "frame"), [(Broken, "a_line_of_the_user"), (Branching, "a_branch_of_the_user")], ids=["error", "branch"]
)
def test_errors_keep_the_frames_of_the_users_code(model, frame):
    with pytest.raises(papr_fx.TraceError) as caught:
        papr_fx.transform(model(Shape()), toy_proposal(), 0.5)
    printed = "".join(traceback.format_exception(caught.value))
    assert __file__ in printed
    assert f"in {frame}" in printed


def test_the_report_says_why_tokens_were_not_pruned():
    model = timm.create_model("convnext_atto", num_classes=2).eval()
    found = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert found.mode == "pixels"
    assert found.fallback.startswith("positions keep a spatial layout in the trunk")
    assert f"\nnot by tokens: {found.fallback}" in str(found)
    chosen = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, verify=False, mode="pixels"))
    assert chosen.fallback == ""
    assert "not by tokens" not in str(chosen)
    tokens = papr_fx.report(papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, verify=False))
    assert tokens.fallback == ""


class Normed(nn.Module):
    """A residual MLP whose batch norm treats positions independently in eval mode only, beside one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.first = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 1))
        self.second = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return (x + self.second(x)).mean((2, 3))


def test_sites_of_training_mode_are_its_own_even_where_the_graph_is_the_same():
    example = torch.zeros(1, 3, 16, 16)
    gm = papr_fx.transform(Normed().eval(), toy_proposal(), 0.5, example_input=example, mode="pixels", background="keep")
    assert len(papr_fx.report(gm).sites) == 2
    gm.train()
    assert len(papr_fx.report(gm).sites) == 1
    x = torch.randn(4, 3, 16, 16)
    whole = Normed().train()
    whole.load_state_dict(gm.state_dict())
    statistics = gm.first[1].running_mean.clone()
    gm(x)
    whole(x)
    assert not torch.equal(statistics, gm.first[1].running_mean)
    assert torch.allclose(gm.first[1].running_mean, whole.first[1].running_mean, atol=1e-6)
