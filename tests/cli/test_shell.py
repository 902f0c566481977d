"""The version, and completion scripts, which are run by the shell itself."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import pytest
import timm
import torch

import papr_fx
from papr_fx.cli.main import main


def printed(capsys, *words):
    """What the command line prints before it ends."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    return capsys.readouterr().out


def completed(capsys, tmp_path, *words):
    """What bash offers for the last word of a line."""
    script = tmp_path / "papr-fx.bash"
    script.write_text(printed(capsys, "--print-completion", "bash"))
    ask = f'. {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_papr_fx; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask, "bash", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_version(capsys):
    version = importlib.metadata.version("papr-fx")
    assert papr_fx.__version__ == version
    libraries = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    said = printed(capsys, "--version")
    assert said.startswith(f"papr-fx {version} ({libraries}")
    assert said.endswith(f"timm {timm.__version__})\n")
    with pytest.raises(AttributeError, match="module 'papr_fx' has no attribute 'none'"):
        _ = papr_fx.none


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert {"demo", "show", "eval", "models"} <= completed(capsys, tmp_path, "papr-fx", "")
    assert completed(capsys, tmp_path, "papr-fx", "eval", "--class-") == {"--class-map", "--class-order"}
    assert completed(capsys, tmp_path, "papr-fx", "eval", "--class-order", "t") == {"torchvision"}
    for words in (("show", "pic"), ("eval", "pic"), ("eval", "--checkpoint", "pic"), ("bench", "--results-file", "pic")):
        assert completed(capsys, tmp_path, "papr-fx", *words) == {"pictures"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(capsys, shell):
    assert "class-order" in printed(capsys, "--print-completion", shell)


def test_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "needs the completion extra: pip install 'papr-fx[completion]'" in capsys.readouterr().err
