"""The documentation's examples run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from reference_models import universeg

DOCS = Path(__file__).parents[1] / "docs"


def examples(page: str) -> list[object]:
    """Every Python block of a page, named by the heading above it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found, heading = [], page
    for match in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", text, re.M | re.S):
        if match["code"] is None:
            heading = match["heading"]
        else:
            found.append(pytest.param(match["code"], id=heading))
    if not found:
        raise ValueError(f"{page} must hold examples, found none")
    return found


@pytest.mark.parametrize("code", examples("drop_in.md"))
def test_drop_in_examples_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("universeg")  # its stand-in
    monkeypatch.setitem(sys.modules, "universeg", package)
    monkeypatch.setitem(sys.modules, "universeg.model", universeg)
    exec(compile(code, "drop_in.md", "exec"), {"__name__": "drop_in"})
