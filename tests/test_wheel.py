"""What is published: the source archive, and the wheel that is built of it alone."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both. The wheel is built from the archive, somewhere else than in the repository."""
    folder = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def run(*command):
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def modules(names):
    """The Python files of the package among those names, from its own folder on."""
    return {name[name.index("papr_fx/") :] for name in names if name.endswith(".py") and "papr_fx/" in name}


def test_they_are_named_by_the_version(built):
    assert {path.name for path in built.iterdir()} == {f"papr_fx-{VERSION}.tar.gz", f"papr_fx-{VERSION}-py3-none-any.whl"}


def test_both_hold_all_modules(built):
    """Those of passes/ too, which papr_fx/passes is a link to."""
    folders = [ROOT / "papr_fx", *(path for path in (ROOT / "papr_fx").iterdir() if (path / "__init__.py").exists())]
    wanted = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.glob("*.py")}
    assert "papr_fx/passes/prune_tokens.py" in wanted
    with tarfile.open(built / f"papr_fx-{VERSION}.tar.gz") as archive:
        assert modules(archive.getnames()) == wanted
        assert not any(member.issym() or member.islnk() for member in archive)
    with zipfile.ZipFile(built / f"papr_fx-{VERSION}-py3-none-any.whl") as wheel:
        assert modules(wheel.namelist()) == wanted


def test_an_index_would_take_them(built):
    run("twine", "check", "--strict", *built.iterdir())


def test_the_wheel_installs_one_top_level_name(built, tmp_path):
    with zipfile.ZipFile(built / f"papr_fx-{VERSION}-py3-none-any.whl") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {name.split("/")[0] for name in names} == {"papr_fx", f"papr_fx-{VERSION}.dist-info"}
    assert "papr_fx/py.typed" in names
    said = f"import papr_fx.passes.prune_tokens as p; assert p.__file__.startswith({str(tmp_path)!r}); import papr_fx; "
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {said} assert papr_fx.__version__ == {VERSION!r}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)
