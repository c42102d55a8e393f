"""What the documentation claims is there: classes, files, options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import effusion
from effusion.cli.main import parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_every_class_in_the_table_exists() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- facts -->")[2].partition("<!-- /facts")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 15
    assert [name for name in names if not isinstance(getattr(effusion, name, None), type)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    known = {verb: p.format_help() for verb, p in parser()._subparsers._group_actions[0].choices.items()}  # type: ignore
    for verb, rest in re.findall(r"^effusion (\w+)([^\n#]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        for option in re.findall(r"--[\w-]+", rest):
            assert option in known[verb], f"effusion {verb} has no {option}"


def test_facts_can_be_made() -> None:
    run = subprocess.run([sys.executable, ROOT / "docs" / "facts.py"], capture_output=True, text=True, check=True)
    assert "StableDiffusionPipeline" in run.stdout
