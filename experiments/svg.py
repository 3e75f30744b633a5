"""Figures as inline SVG that uses the colours and font of its page."""

import io
import math

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Placeholder colours. `svg` replaces them with the style sheet's, which differ for light, dark and print.
INK, GRID = "#00000a", "#00000b"
SERIES = [f"#0000a{i}" for i in range(8)]
CSS_COLORS = {INK: "currentColor", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
DASHES = ["-", (0, (4, 2)), (0, (1, 1.5))]  # the ninth run has the first one's colour, but another dash
NICE_STEPS = [1, 2, 2.5, 5, 10]  # allowed distances of ticks, times a power of ten


def svg(figure: Figure, name: str) -> Markup:
    """The figure as an <svg> element. Equal data give equal bytes."""
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
    """Draw grid lines, ticks and labels without a frame. Call it last, because ticks depend on the limits."""
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
    """A short text for a tick: 2e18, but 0.5 and 300."""
    return f"{value:g}" if 1e-2 <= value < 1e4 else f"{value:.0e}".replace("e+", "e").replace("e0", "e")
