"""What a built wheel installs."""

import subprocess
import sys
import zipfile
from pathlib import Path


def test_wheel_installs_one_top_level_name(tmp_path):
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in names} == {"papr_fx", "papr_fx-0.1.0.dist-info"}
    assert {"papr_fx/py.typed", "papr_fx/passes/prune_tokens.py", "papr_fx/passes/splice_proposal.py"} <= set(names)
    script = "import papr_fx.passes.prune_tokens as p, sys; sys.exit(not p.__file__.startswith(sys.path[0]))"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {script}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)
