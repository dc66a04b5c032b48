"""The report's pictures, drawn with matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report_rows import (
    COLD,
    DENSE,
    OURS,
    WITH_MEMORY,
    Place,
    Point,
    Quantity,
    Scored,
    Series,
    crossover,
    gflops,
    is_dirty,
    megabytes,
    quotient,
    seconds,
)
from icseg.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart under the common forms of colour blindness.
COLOURS = {
    "UniverSeg, as published": "#56b4e9",
    "UniverSeg, factorised": "#0072b2",
    "PatchICL, published": "#009e73",
    "Dense global attention": "#cc79a7",
    COLD: "#d55e00",
    WITH_MEMORY: "#d55e00",
}
OTHER_COLOURS = ("#000000", "#e69f00", "#8c564b", "#7f7f7f", "#bcbd22", "#17becf")
MARKERS = "osD^vP*Xph<>"
HOLLOW_NOTE = "hollow: measured with changes that were not committed"


def _figure(rows: int, columns: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "the report's pictures need the package matplotlib, which pip install 'icseg[train]' brings, got none"
        ) from error
    figure = Figure(figsize=(5.6 * columns, height * rows + 0.7), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _legend(figure: Figure, panels: Iterable[Axes], *, columns: int = 3, hollow: bool = False) -> None:
    """One for all panels, above them; below, what hollow markers mean."""
    found: dict[Any, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns, fontsize=9)
    if hollow:
        figure.supxlabel(HOLLOW_NOTE, fontsize=8)


def _axes(panel: Axes, ticks: Sequence[int], xlabel: str, ylabel: str, *, time: bool = False) -> None:
    """Both logarithmic; the ticks of x are what was measured."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(ticks), [str(x) for x in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(EngFormatter("s") if time else FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.grid(alpha=0.3)


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """The same colour for a rival in every picture; others get those that are left."""
    others = [n for n in names if n not in COLOURS]
    colour = COLOURS.get(name) or OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]
    marker = MARKERS[[*COLOURS, *others].index(name) % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": "--" if name == WITH_MEMORY else "-"}


def _line(panel: Axes, one: Series, of: Quantity, name: str) -> None:
    points = one.values(of, name)
    if points:
        style = _style(name, one.names)
        panel.plot(list(points), list(points.values()), label=name, markersize=6, linewidth=1.6, **style)
        dirty = [x for x in points if is_dirty(one.rows[x])]
        hollow = style | {"linestyle": "none", "markerfacecolor": "white"}
        panel.plot(dirty, [points[x] for x in dirty], markersize=6, **hollow)


def _mark_crossovers(panel: Axes, one: Series, of: Quantity) -> None:
    """A ring where ours is the cheaper one from there on, a line where the crossover is interpolated, both in words."""
    lines = []
    for ours in OURS:
        found = crossover(one, ours, of)
        if found is None:
            continue
        what = "cold" if ours == COLD else "with memory"
        if found.first is None:
            lines.append(f"{what}: not up to the largest size")
            continue
        text = f"{what}: from {found.first} px on" + ("" if found.slower else ", the smallest size measured")
        if found.interpolated:
            panel.axvline(found.interpolated, color="0.4", linewidth=1, linestyle=_style(ours, one.names)["linestyle"])
            text += f" (line: {found.interpolated:.0f} px, interpolated)"
        ring: dict[str, Any] = {
            "markersize": 13,
            "markerfacecolor": "none",
            "markeredgecolor": "black",
            "linestyle": "none",
        }
        panel.plot([found.first], [one.values(of, ours)[found.first]], marker="o", **ring)
        lines.append(text)
    if lines:
        title = "cheaper than the best dense rival (from the ring on)"
        panel.set_title("\n".join([title, *lines]), fontsize=8, color="0.2", loc="left")


def draw_cost(one: Series, path: Path, xlabel: str, *, crossovers: bool) -> None:
    """FLOPs and latency of every rival."""
    figure, panels = _figure(1, 2)
    for panel, of, ylabel in zip(panels, (gflops, seconds), ("GFLOPs", "latency"), strict=True):
        for name in one.names:
            _line(panel, one, of, name)
        _axes(panel, list(one.rows), xlabel, ylabel, time=of is seconds)
        if crossovers:
            _mark_crossovers(panel, one, of)
    _legend(figure, panels, hollow=any(map(is_dirty, one.rows.values())))
    _save(figure, path)


def draw_memory(one: Series, path: Path) -> None:
    figure, panels = _figure(1, 1)
    for name in one.names:
        _line(panels[0], one, megabytes, name)
    _axes(panels[0], list(one.rows), "size in pixels", "MB beyond model and inputs")
    _legend(figure, panels, columns=2, hollow=any(map(is_dirty, one.rows.values())))
    _save(figure, path)


def draw_speedup(one: Series, path: Path) -> None:
    """FLOP ratio and measured speed-up of each dense rival to ours."""
    figure, panels = _figure(1, 2)
    for panel, ours in zip(panels, OURS, strict=True):
        for rival in DENSE:
            style: dict[str, Any] = {"color": COLOURS[rival], "linewidth": 1.6, "markersize": 6}
            for of, label, line in ((gflops, "FLOP ratio", "x--"), (seconds, "measured speed-up", "o-")):
                found = {x: quotient(row, of, rival, ours) for x, row in one.rows.items()}
                points = {x: value for x, value in found.items() if value}
                if points:
                    panel.plot(list(points), list(points.values()), line, label=f"{label}, {rival}", **style)
                    dirty = [x for x in points if is_dirty(one.rows[x]) and of is seconds]
                    panel.plot(dirty, [points[x] for x in dirty], "o", **style | {"markerfacecolor": "white"})
        panel.axhline(1, color="0.4", linewidth=1)
        panel.set_title("cold" if ours == COLD else "support set encoded before", fontsize=10)
        _axes(panel, list(one.rows), "size in pixels", "dense over sparse")
    _legend(figure, panels, columns=2, hollow=any(map(is_dirty, one.rows.values())))
    _save(figure, path)


def draw_accuracy(places: dict[Place, list[Scored]], path: Path) -> None:
    """Dice against GFLOPs and latency; a row a size and number of support pairs."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    shown = {place: models for place, models in places.items() if models}
    names = list(dict.fromkeys(m.kind for models in shown.values() for m in models))
    figure, panels = _figure(len(shown), 2)
    for index, ((size, support, _, trained), models) in enumerate(shown.items()):
        for panel, field, label in zip(panels[2 * index :], ("gflops", "seconds"), ("GFLOPs", "latency"), strict=False):
            for number, name in enumerate(names):
                found = sorted((m for m in models if m.kind == name), key=lambda m: getattr(m, field))
                style = _style(name, names) | {"linestyle": "-"}
                x, y = [getattr(m, field) for m in found], [m.dice for m in found]
                if found:
                    panel.plot(x, y, label=name, markersize=7, linewidth=1, **style)
                for m in found:
                    if m.dirty:
                        panel.plot([getattr(m, field)], [m.dice], markersize=7, **style | {"markerfacecolor": "white"})
                    if len(found) > 1:
                        panel.annotate(
                            m.amount,
                            (getattr(m, field), m.dice),
                            (0, -13 if number % 2 else 7),
                            textcoords="offset points",
                            ha="center",
                            fontsize=7,
                            color=style["color"],
                            path_effects=[withStroke(linewidth=3, foreground="white")],
                        )
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_minor_formatter(NullFormatter())
            engineering = EngFormatter("s") if field == "seconds" else FuncFormatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_major_formatter(engineering)
            panel.margins(x=0.12, y=0.12)
            panel.set_xlabel(f"{label} of a target")
            panel.set_ylabel("Dice")
            title = f"{size} px, {support} support pairs, {models[0].classes}"
            panel.set_title(title + f", trained for {trained}" * bool(trained), fontsize=10)
            panel.grid(alpha=0.3)
    _legend(figure, panels, columns=3, hollow=any(m.dirty for models in shown.values() for m in models))
    _save(figure, path)


def draw_roofline(points: Sequence[Point], path: Path) -> None:
    """A panel a machine and number of threads; roofs: the medians of the rows' own."""
    places = sorted({(point.row["machine"], point.row["threads"]) for point in points})
    kinds = list(dict.fromkeys((point.row["subject"], point.row["work"]) for point in points))
    subjects = list(dict.fromkeys(subject for subject, _ in kinds))
    palette = [*dict.fromkeys(COLOURS.values()), *OTHER_COLOURS]
    columns = min(len(places), 2)
    figure, panels = _figure(math.ceil(len(places) / columns), columns, height=4.6)
    for panel, place in zip(panels, places, strict=False):
        here = [point for point in points if (point.row["machine"], point.row["threads"]) == place]
        for index, kind in enumerate(kinds):
            colour = palette[subjects.index(kind[0]) % len(palette)]
            found = [point for point in here if (point.row["subject"], point.row["work"]) == kind]
            for dirty in (False, True):
                shown = [point for point in found if is_dirty(point.row) == dirty]
                panel.plot(
                    [point.intensity for point in shown],
                    [point.rate for point in shown],
                    MARKERS[index % len(MARKERS)],
                    color=colour,
                    markerfacecolor="white" if dirty else colour,
                    label=None if dirty else ", ".join(kind),
                )
        roofs = _draw_roofs(panel, here)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("FLOPs a byte of inputs and outputs")
        panel.set_ylabel("FLOP/s")
        panel.set_title(f"{place[0]}, threads {place[1]}\n{roofs}", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(places) :]:
        panel.set_axis_off()
    _legend(figure, panels, columns=2 * columns, hollow=any(is_dirty(point.row) for point in points))
    _save(figure, path)


def _draw_roofs(panel: Axes, points: Sequence[Point]) -> str:
    """Of memory, rising, and of arithmetic, level, where measured; returns what they are."""
    bandwidth = _median_rate(points, "copy_bandwidth")
    rate = _median_rate(points, "matrix_rate")
    low, high = 0.5 * min(point.intensity for point in points), 2 * max(point.intensity for point in points)
    ridge = min(max(rate / bandwidth, low), high) if rate and bandwidth else high
    words = []
    if bandwidth:
        panel.plot([low, ridge], [bandwidth * low, bandwidth * ridge], "k-", linewidth=1.4)
        words.append(f"copy {bandwidth / 1e9:.3g} GB/s")
    if rate:
        panel.plot([ridge if bandwidth else low, high], [rate, rate], "k-", linewidth=1.4)
        words.append(f"matrix product {rate / 1e9:.3g} GFLOP/s")
    return f"roofs: {', '.join(words)}" if words else "no roof was measured"


def _median_rate(points: Iterable[Point], field: str) -> float:
    return statistics.median([point.row[field] for point in points if point.row[field]] or [0.0])
