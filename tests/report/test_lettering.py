"""Names in any script on plots are drawn or spelled, without empty boxes, formulas or warnings."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_report import mixed_report

from gcbench.report.plots import figure as canvas
from gcbench.report.plots import lettering, run_plots

NAME = "模 $a$_{ b\tc\nd\udcff 😀 x"


@pytest.fixture(autouse=True)
def _as_if_new():
    for remembered in (lettering.fallback, lettering._found, lettering._fonts):
        remembered.cache_clear()
    yield
    for remembered in (lettering.fallback, lettering._found, lettering._fonts):
        remembered.cache_clear()


@pytest.mark.parametrize("has_fonts", [False, True])
def test_plots_of_any_name_are_drawn_without_a_warning(tmp_path, monkeypatch, has_fonts):
    """Four glyph warnings on standard error, and boxes in the picture; with `$` a formula that cannot be parsed."""
    if not has_fonts:
        monkeypatch.setattr(lettering, "_fonts", lambda: ())
    stored = mixed_report()
    outcomes = tuple(
        replace(o, cell=replace(o.cell, strategy=f"plan:{NAME}" if o.cell.strategy == "every:2" else o.cell.strategy))
        for o in stored.outcomes
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = run_plots.draw(replace(stored, model=replace(stored.model, model=NAME), outcomes=outcomes), tmp_path)
    assert len(drawn) == 2


def test_what_no_font_has_is_spelled(monkeypatch):
    monkeypatch.setattr(lettering, "_fonts", lambda: ())
    assert "".join(lettering.drawable("模é$\n\udcff")) == "\\u6a21é\\$\\n\\udcff"
    text = canvas.shortened("模" * 40, 28)
    assert len(text) <= 28 and text.startswith("\\u6a21\\u6a21") and text.endswith("…\\u6a21\\u6a21")


def test_another_font_is_used_where_one_has_the_letters(monkeypatch):
    """With a font of matplotlib's own, as if it were the one that a system has for a script."""
    import matplotlib
    from matplotlib.figure import Figure

    name, path = "STIXGeneral", str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "STIXGeneral.ttf")
    lacking = next(chr(c) for c in sorted(lettering._codes(path) - lettering._default_codes()) if chr(c).isprintable())
    monkeypatch.setattr(lettering, "_fonts", lambda: ((name, path),))
    assert lettering.drawable(lacking) == [lacking]
    figure = Figure()
    title, plain = figure.suptitle(f"a {lacking}"), figure.text(0, 0, "plain")
    usual = plain.get_fontfamily()
    lettering.choose_fonts(figure)
    assert title.get_fontfamily() == [*usual, name]
    assert plain.get_fontfamily() == usual


def test_a_font_of_boxes_is_none():
    """matplotlib brings one that has every character there is."""
    assert not any("Last Resort" in name for name, _ in lettering._fonts())
