"""Figures as inline SVG that takes the colours and the font of the page that it is in."""

import io
import math

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Drawn in these colours, which the page's style sheet then decides, for light and dark and print.
INK, GRID = "#00000a", "#00000b"
SERIES = [f"#0000a{i}" for i in range(8)]
CSS_COLORS = {INK: "currentColor", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
DASHES = ["-", (0, (4, 2)), (0, (1, 1.5))]  # tells a ninth run from the first
NICE_STEPS = [1, 2, 2.5, 5, 10]  # between ticks


def svg(figure: Figure, name: str) -> Markup:
    """The same data give the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for drawn, color in CSS_COLORS.items():
        text = text.replace(drawn, color)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(name)}"', 1))


def empty_figure(width: float = 4.2, height: float = 2.9, left: float = 0.12) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((left, 0.18, 0.97 - left, 0.78))
    axes.patch.set_alpha(0)
    return figure, axes


def style(axes: Axes, x_label: str, y_label: str = "") -> None:
    """Grid lines and no frame; call it last, as ticks depend on the limits."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, pad=5)
    axes.set_xlabel(x_label, color=INK, fontsize=10.5)
    axes.set_ylabel(y_label, color=INK, fontsize=10.5)
    for axis, scale, limits in (
        (axes.xaxis, axes.get_xscale(), axes.get_xlim()),
        (axes.yaxis, axes.get_yscale(), axes.get_ylim()),
    ):
        if scale == "log":
            decades = math.log10(limits[1] / limits[0])
            subs = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3 else (1,)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        else:
            axis.set_major_locator(MaxNLocator(5, steps=NICE_STEPS))


def power(value: float) -> str:
    """2e18; 0.5 and 300 as they are."""
    return f"{value:g}" if 1e-2 <= value < 1e4 else f"{value:.0e}".replace("e+", "e").replace("e0", "e")
