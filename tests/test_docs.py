"""Every code block of README.md and docs/ is run as it stands, on small models and data instead of the large ones.

Blocks of `diff` and `text` are what the command before them prints, with lines left out. test_recipes.py runs
docs/deployment.md, on several models, and test_towers.py the code of docs/models.md for LLaVA.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image

import papr_fx
from papr_fx.cli.main import main
from papr_fx.evaluation import paper
from papr_fx.evaluation.paper import Line, Table
from papr_fx.video import write_video

from .models import Shape, ToyViT, images, toy_proposal

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page):
    return [(match[1], match[2]) for match in FENCE.finditer(page.read_text())]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if blocks(page)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of images, videos and photographs, and a video model."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        for i in range(8):
            save_noise(root / "imagenet" / split / f"class{i % 2}" / f"{i}.png", i)
    for i in range(2):
        path = root / "kinetics400" / "val" / f"class{i}" / "clip.mp4"
        path.parent.mkdir(parents=True)
        write_video(path, torch.rand(14, 3, 64, 80))
    save_noise(root / "photographs" / "val" / "b" / "0.png", 0)
    (root / "photographs" / "class_map.txt").write_text("a\nb\n")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.VideoMAEConfig(image_size=64, num_frames=4, num_labels=2, **sizes)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(root / "video_model")
    transformers.VideoMAEImageProcessor().save_pretrained(root / "video_model")
    torch.save(timm.create_model("test_vit").state_dict(), root / "mae_finetuned_vit_base.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), root / "mobileone_s0.pth")
    return root


def save_noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (60, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)


# Replaces what is large, or has to be downloaded.
WORDS = {
    "--pretrained": "",
    "eval_model": "test_vit",
    "MCG-NJU/videomae-base-finetuned-kinetics": "{data}/video_model --temporal-views 1 --spatial-views 1 --frame-step 2",
    "mae_finetuned_vit_base.pth": "{data}/mae_finetuned_vit_base.pth",
    "mobileone_s0.pth": "{data}/mobileone_s0.pth",
    "/data/": "{data}/",
    "out/": "{out}/",
    "--speedup 2": "--speedup 1",
    "--proposal x3d_m": "--proposal x3d_s --workers 0",
    "eva02_tiny*": "test_vit*",
}
SMALL = {
    "eval": "--workers 0",
    "tune": "--workers 0",
    "reproduce": "--workers 0",
    "bench": "--proposal test_resnet --num-bench-iter 2",
}
SMALL_MODEL = {"vit_base_patch16_224": "test_vit", "deit_small_patch16_224": "vit_tiny_patch16_224"}
SMALL_RUNS = {
    "examples.imagenet": "--proposal test_resnet --proposal-checkpoint {data}/mobileone_s0.pth --num-classes 2 --epochs 1 "
    "--batch-size 4 --workers 0 --output {out}",
    "benchmarks.photographs": "--z 1 0.5 --out {out}/photographs.json",
}


def shrunk(line, data, out):
    """A command on small models and data."""
    words = WORDS | (SMALL_MODEL if "diff" not in line else {})
    for old, new in words.items():
        line = line.replace(old, new)
    command = next((word for word in SMALL if f" {word} " in line), "")
    module = next((word for word in SMALL_RUNS if f"-m {word}" in line), "")
    return f"{line} {SMALL.get(command, '')} {SMALL_RUNS.get(module, '')}".format(data=data, out=out)


def run_command(line, data, out):
    """Runs a command line; returns what it prints."""
    word, *rest = shlex.split(shrunk(line, data, out), comments=True)
    if word == "papr-fx":
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            try:
                code = main(rest)
            except SystemExit as stop:  # of options that only print something
                code = stop.code
        assert code == 0
        return told.getvalue()
    if word == "make":
        command = ["make", "--dry-run", *rest]
    elif word == "pip":
        assert rest[0] == "install"
        listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        asked = re.findall(r"[\w]+", " ".join(rest[1:]))
        assert set(asked) <= set(re.findall(r"^(\w+) = ", listed, flags=re.MULTILINE)), asked
        return ""
    elif word == "torchrun":
        rest[rest.index("--nproc-per-node") + 1] = "2"
        command = [sys.executable, "-m", "torch.distributed.run", *rest]
    else:
        assert word == "python", line
        command = [sys.executable, *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def run_shell(code, data, out):
    lines = code.replace("\\\n", " ").splitlines()
    return "".join(run_command(line, data, out) for line in lines if line.strip())


def run_python(code, given):
    """Runs a block of code; returns what it prints."""
    code = code.replace("pretrained=True", "pretrained=False")
    depth = 3 if "features_only" in code else 1  # timm takes features from the last three blocks
    code = code.replace('"vit_base_patch16_224.augreg_in21k_ft_in1k"', f'"test_vit", depth={depth}')
    small = "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48"
    code = code.replace("mobileone_s0.apple_in1k", "test_resnet").replace("VideoMAEConfig()", f"VideoMAEConfig({small})")
    if "test_vit" in code:
        given["images"] = torch.randn(2, 3, 160, 160)
    code = code.replace("torch.compile(gm, fullgraph=True)", "gm")  # test_compile.py compiles
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(code, "page", "exec"), given)
    return told.getvalue()


def classifier():
    """A proposal that has classes."""
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*toy_proposal(), *head)


def assert_printed(block, printed):
    """Its lines are among those that were printed, in this order."""
    rest = iter(printed.splitlines())
    for line in block.splitlines():
        assert any(line == other for other in rest), f"not printed, or not in this order: {line}"


@pytest.fixture
def small_tables(monkeypatch):
    lines = (Line(80, 0.2, 100), Line(70, 0.1, 150, 0.5))
    table = Table("Tab. 2", "test_vit", lines, "test_vit", "test_resnet", {"num_classes": 1000})
    monkeypatch.setitem(paper.TABLES, "vit-b", table)
    monkeypatch.setitem(paper.TABLES, "mae-b-small", table)


SLOW = ("evaluation.md", "models.md", "reading-diffs.md", "training.md", "video.md", "your-model.md")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")  # timm's reader
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in SLOW else ())
        for page in PAGES
        if page.name != "deployment.md"
    ],
)
def test_page(page, data, tmp_path, small_tables, monkeypatch):
    torch.compiler.reset()
    module = types.ModuleType("my_pass")
    monkeypatch.setitem(sys.modules, "my_pass", module)  # where the functions of a page are
    batch = images(Shape(), 4, dtype=torch.float32)
    given = module.__dict__
    given |= {"papr_fx": papr_fx, "torch": torch, "folder": tmp_path, "images": batch, "labels": torch.randint(7, (4,))}
    given |= {"model": ToyViT(Shape()).eval(), "proposal": classifier(), "loader": [batch]}
    given["gm"] = papr_fx.transform(given["model"], given["proposal"], 0.5)
    (tmp_path / "pruned.diff").write_text(papr_fx.graph_diff(given["model"], given["gm"]))  # the golden file of a user
    printed = ""
    for kind, code in blocks(page):
        if kind == "sh":
            printed = run_shell(code.replace("mae-b /", "mae-b-small /"), data, tmp_path)
        elif kind == "python" and "llava" not in code:
            printed = run_python(code, given)
        elif kind != "python" and "─" not in code:  # else a drawing
            assert kind in ("diff", "text"), f"{page.name}: a block without a language"
            assert_printed(code, printed)


def test_the_clip_of_the_video_page():
    """Its figures are those of VideoMAE-B."""
    text = (ROOT / "docs" / "video.md").read_text()
    with torch.device("meta"):
        model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig())
    proposal = papr_fx.proposals.create_network("x3d_m", pretrained=False)
    found = papr_fx.report(papr_fx.transform(model, proposal, 0.45, verify=False))
    assert f"{found.dense_macs / 1e9:.2f} GMACs a view, {found.total_macs / 1e9:.2f} with the proposal" in text


def test_a_block_that_is_not_printed_fails():
    with pytest.raises(AssertionError, match="not printed"):
        assert_printed("b\na\n", "a\nb\n")
    assert_printed("a\nb\n", "a\nx\nb\n")
