"""The page that lists the families holds those that are tested, and no others."""

import re
from pathlib import Path

import pytest
from helpers import families

PAGE = Path(__file__).parents[2] / "docs" / "vectors.md"


def listed(text):
    """Family names by kind, from the table between the page's marks."""
    table = text.split("<!-- families -->")[1].split("<!-- /families -->")[0]
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return {kind.strip(): re.findall(r"`([^`]+)`", names) for kind, names in rows}


def test_the_page_lists_the_families_that_are_tested():
    if not PAGE.is_file() or "<!-- families -->" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page has no table of families")
    assert families.table() in PAGE.read_text(encoding="utf-8"), "print(families.table()) between the page's marks"
    found = listed(PAGE.read_text(encoding="utf-8"))
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted(families.names())


def test_the_table_holds_every_family_once():
    found = listed(families.table())
    assert sorted(name for group in found.values() for name in group) == sorted(families.names())
    assert "llama" in found["pre-norm"] and len(families.names()) == len(set(families.names())) >= 25
