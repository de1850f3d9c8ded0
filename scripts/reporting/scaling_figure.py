"""Draws loss against compute: the points of each pattern, its law with a band, and the held-out point hollow."""

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from scripts.reporting.labels import literal
from scripts.reporting.scaling import Scaling
from scripts.reporting.style import LIGHT, styles_of


def draw_scaling(axes: Axes, scaling: Scaling) -> None:
    for fit, style in zip(scaling.fits, styles_of([fit.baseline for fit in scaling.fits]), strict=True):
        flops = [each for each, _ in fit.curve]
        laws = [law for _, law in fit.curve]
        axes.plot(flops, [law.value for law in laws], color=style.color, linewidth=1.4, linestyle=style.linestyle)
        if laws[0].low is not None:
            low, high = [law.low for law in laws], [law.high for law in laws]
            axes.fill_between(flops, low, high, color=style.color, alpha=0.12, linewidth=0)
        marks = {"color": style.color, "markersize": 6, "linestyle": "none", "zorder": 4}
        xs, ys = [point.flops for point in fit.points], [point.loss for point in fit.points]
        axes.plot(xs, ys, style.marker, label=literal(fit.pattern), **marks)
        if fit.held_out is not None:
            point = [fit.held_out.flops], [fit.held_out.loss]
            axes.plot(*point, style.marker, markerfacecolor=LIGHT["paper"], markeredgewidth=1.4, **marks)
    axes.set_xscale("log")
    budgets = sorted({point.flops for fit in scaling.fits for point in fit.points} | {scaling.held_out})
    axes.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(f"held-out {scaling.unit}")
    axes.legend(loc="upper right")
