"""What a release says of itself: the same version everywhere, a changelog that can be read, forms that hold."""

import re
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
HEADINGS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_newest_version_is_that_of_the_project():
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+) \((?:\d{4}-\d\d-\d\d|unreleased|not released)\)$", CHANGELOG, flags=re.MULTILINE
    )
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, key=lambda version: [int(number) for number in version.split(".")], reverse=True)
    assert len(versions) == len(re.findall(r"^## ", CHANGELOG, flags=re.MULTILINE))


def test_changes_are_under_the_known_headings_in_order():
    for part in CHANGELOG.split("\n## ")[1:]:
        places = [HEADINGS.index(heading) for heading in re.findall(r"^### (.*)$", part, flags=re.MULTILINE)]
        assert places == sorted(set(places))


def test_citation():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["version"] == PROJECT["version"]
    assert said["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    number = re.search(r"arxiv.org/abs/([0-9.]+)", (ROOT / "README.md").read_text())[1]
    assert {"type": "other", "value": f"arXiv:{number}"} in said["preferred-citation"]["identifiers"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_forms_have_what_a_form_needs(path):
    """A form with a fault in it is not shown, without a word."""
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert "papr-fx --version" in path.read_text()


def test_the_workflow_runs_what_ci_runs():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]["steps"]
    command = next(step["run"] for step in steps if "run" in step)
    assert (ROOT / command).stat().st_mode & 0o100
    assert "make test" in (ROOT / command).read_text()


def test_extras_are_part_of_what_developers_install():
    extras = PROJECT["optional-dependencies"]
    named = re.match(r"papr-fx\[(.*)\]", extras["dev"][0])[1].split(",")
    assert set(named) == extras.keys() - {"dev"}
