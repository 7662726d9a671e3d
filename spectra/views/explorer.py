"""The interactive view: controls of ipywidgets around a figure of plotly, which follow the choices and the zoom."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go

from spectra.backend import markup
from spectra.estimates.quantities import EIGENVALUE_UNIT
from spectra.views.bands_on_screen import BandOnScreen, band_on_screen
from spectra.views.choices import Choices, Shown
from spectra.views.cumulative import FEW, POINTS, draw_bands
from spectra.views.curves import reasons
from spectra.views.screen import ScreenAxis, screen_axis
from spectra.views.style import AXIS_COLOUR, GRID_COLOUR, TEXT_COLOUR, literal, new_figure, rendered
from spectra.views.wording import listed, sentence_case, unfinished_words

TRACES = 4  # of a spectrum: lower edge, upper edge with the band, middle line, and what is said of each point
SCALE_NAMES = (("symmetric log", "symlog"), ("linear", "linear"), ("log, λ > 0", "log"))
SHARE_SCALE_NAMES = (("linear", "linear"), ("log", "log"))
DASHES = {"solid": "solid", "-": "solid", "dashed": "dash", "--": "dash", "dashdot": "dashdot", "-.": "dashdot"}
DASHES |= {"dotted": "dot", ":": "dot"}
HEIGHT = 460  # pixels of the figure, without the lines of its title
LINE_HEIGHT = 19  # pixels
MOST_KNOWN = 200  # bands that are kept for when one comes back to them


class Explorer(ipywidgets.VBox):
    """Bands of the cumulative share of a choice of spectra, with controls above them.

    Args:
        choices: What there is to choose from.
        level: The probability with which each band holds its curve.

    Attributes:
        choices: What there is to choose from.
        choice: What is chosen.
        axis: The axis of eigenvalues, with the range that is seen.
        level: The probability with which each band holds its curve.
        bands: The bands on the screen, in the order of `shown`.
        shown: The spectra on the screen.
        figure: The figure, a FigureWidget of plotly.
        controls: The controls by name: "group", "step", "mode", "scale", "share_scale", and "run 1", "run 2", ...
    """

    def __init__(self, choices: Choices, *, level: float) -> None:
        self.choices, self.level = choices, level
        self.choice = choices.first()
        self.axis = self._whole_axis("symlog")
        self.shown: list[Shown] = []
        self.bands: list[BandOnScreen] = []
        self._known: dict[Any, BandOnScreen] = {}
        self._busy = False
        self.figure: Any = go.FigureWidget(layout=_layout(level))
        self.controls: dict[str, Any] = {}
        self._make_controls()
        self._remarks = ipywidgets.HTML()
        self._run_row = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap"))
        first = [self.controls[name] for name in ("group", "step", "mode")]
        second = [self.controls[name] for name in ("scale", "share_scale")]
        super().__init__([*(_row(row) for row in (first, second)), self._run_row, self.figure, self._remarks])
        self._show_runs()
        self._draw(whole=True)
        self.figure.layout.on_change(self._on_zoom, "xaxis.range", "xaxis.autorange")

    def choose(self, **changes: Any) -> None:
        """Change the choice, as the controls do.

        Args:
            **changes: Fields of `Choice`.
        """
        before = self.choice
        self.choice = self.choices.fitted(replace(before, **changes))
        other_group = before.group != self.choice.group
        moved = other_group or before.mode != self.choice.mode
        if other_group:
            self._show_runs()
        self._follow_choice()
        if moved:
            self.axis = self._whole_axis(self.axis.scale)
        self._draw(whole=moved)

    def zoom(self, low: float, high: float) -> None:
        """Show the eigenvalues from one to another, and compute the bands anew at points between them.

        Args:
            low: The smallest eigenvalue seen.
            high: The largest.

        Raises:
            InputError: Unless low < high, and 0 < low on a logarithmic axis.
        """
        self.axis = self.axis.zoomed(low, high)
        self._draw(whole=True)

    def rescale(self, scale: str) -> None:
        """Change the scale of the axis of eigenvalues, all of which is then seen.

        Args:
            scale: "symlog", "linear" or "log".

        Raises:
            InputError: The scale is not known.
        """
        self.axis = self._whole_axis(scale)
        self._draw(whole=True)

    def picture(self) -> bytes:
        """The choice as a PNG, drawn as static figures are, for viewers without a kernel."""
        figure, axes = new_figure()
        if self.shown:
            curves = [replace(shown.curve, label=literal(shown.name)) for shown in self.shown]
            draw_bands(axes[0], curves, level=self.level, scale="symlog", legend="auto")
        return rendered(figure, "png", dpi=80)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, and a picture for viewers that show none, such as a page of a repository."""
        bundle = super()._repr_mimebundle_(**options)
        if isinstance(bundle, dict):
            bundle["image/png"] = base64.b64encode(self.picture()).decode()
        return bundle

    # -- controls

    def _make_controls(self) -> None:
        """Make the controls of choices and scales; those with nothing to choose from are not displayed."""
        groups = ipywidgets.SelectionSlider(options=self.choices.groups, description="group")
        steps = ipywidgets.SelectionSlider(options=[self.choice.step], description="step", continuous_update=False)
        modes = ipywidgets.ToggleButtons(options=[("", None)], description="mode")
        scale = ipywidgets.ToggleButtons(options=SCALE_NAMES, description="eigenvalues")
        share = ipywidgets.ToggleButtons(options=SHARE_SCALE_NAMES, description="shares")
        for control in (modes, scale, share):
            control.style.button_width = "auto"
        self.controls |= {"group": groups, "step": steps, "mode": modes, "scale": scale, "share_scale": share}
        self._follow_choice()
        for name in ("group", "step", "mode"):
            self.controls[name].observe(lambda change, name=name: self._on_control(name, change["new"]), "value")
        scale.observe(lambda change: self.rescale(change["new"]), "value")
        share.observe(lambda _: self._draw(whole=True), "value")

    def _follow_choice(self) -> None:
        """Let the controls offer what there is for the choice, and show it."""
        busy, self._busy = self._busy, True
        modes = [(mode or "", mode) for mode in self.choices.modes(self.choice.group)]
        steps = self.choices.steps(self.choice.group, self.choice.mode)
        offered = {"group": self.choices.groups, "step": steps, "mode": modes}
        for name, options in offered.items():
            control = self.controls[name]
            if list(control.options) != list(options):
                control.options = options
            control.value = getattr(self.choice, name)
            control.layout.display = None if len(options) > 1 else "none"
        self._busy = busy

    def _show_runs(self) -> None:
        """Make a button for each run of the group; none for a single run."""
        runs = self.choices.runs(self.choice.group)
        for name in [name for name in self.controls if name.startswith("run ")]:
            del self.controls[name]
        buttons = []
        for position, run in enumerate(runs if len(runs) > 1 else []):
            on = position not in self.choice.hidden
            button = ipywidgets.ToggleButton(value=on, description=run.presentation.label)
            button.layout.width = "auto"
            button.observe(lambda change, position=position: self._on_run(position, on=change["new"]), "value")
            self.controls[f"run {position + 1}"] = button
            buttons.append(button)
        self._run_row.children = buttons

    def _on_control(self, name: str, value: Any) -> None:
        """Follow a control that was moved."""
        if not self._busy:
            self.choose(**{name: value})

    def _on_run(self, position: int, *, on: bool) -> None:
        """Follow a run that was switched on or off."""
        if not self._busy:
            hidden = self.choice.hidden - {position} if on else self.choice.hidden | {position}
            self.choose(hidden=hidden)

    def _on_zoom(self, _: Any, seen: Any, automatic: Any) -> None:
        """Follow the range that was zoomed to in the figure; a double click shows the whole axis."""
        if self._busy:
            return
        whole = automatic or seen is None
        low, high = self.axis.whole if whole else self.axis.values(np.array(seen, dtype=float)).tolist()
        if low < high and math.isfinite(high - low):
            self.axis = self.axis.zoomed(low, high)
            self._draw(whole=whole)

    # -- what is drawn

    def _whole_axis(self, scale: str) -> ScreenAxis:
        """The axis of all spectra of the group and mode."""
        group, mode = self.choice.group, self.choice.mode
        return screen_axis(self.choices.reach(group, mode), self.choices.records(group, mode), scale)

    def _draw(self, *, whole: bool) -> None:
        """Compute the bands that the choice and the axis ask for, and put them into the figure.

        Args:
            whole: Whether the range of the figure is set too; not where it was the figure that was zoomed.
        """
        self.shown = self.choices.shown(self.choice)
        points = self.axis.points(POINTS)
        self.bands = [self._band(shown, points) for shown in self.shown]
        logarithmic = self.controls["share_scale"].value == "log"
        drawn = [
            trace
            for shown, band in zip(self.shown, self.bands, strict=True)
            for trace in self._traces(shown, band, logarithmic=logarithmic)
        ]
        self._busy = True
        try:
            with self.figure.batch_update():
                if len(self.figure.data) == len(drawn):
                    for trace, fields in zip(self.figure.data, drawn, strict=True):
                        trace.update(fields, overwrite=True)
            if len(self.figure.data) != len(drawn):
                self.figure.data = ()
                self.figure.add_traces([go.Scatter(fields) for fields in drawn])
            self.figure.update_layout(self._changing_layout(whole=whole, logarithmic=logarithmic))
        finally:
            self._busy = False
        self._remarks.value = self._remarks_in_words()

    def _band(self, shown: Shown, points: np.ndarray) -> BandOnScreen:
        """The band of a spectrum at the points of the screen, which is computed once."""
        key = (shown.key, self.axis)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[key] = band_on_screen(shown.curve.density, points, level=self.level)
        return self._known[key]

    def _traces(self, shown: Shown, band: BandOnScreen, *, logarithmic: bool) -> list[dict[str, Any]]:
        """The traces of a spectrum: both edges with the band between them, the middle line, and the hover words."""
        from matplotlib.colors import to_hex, to_rgb

        colour, name = to_hex(shown.curve.colour), _literal(shown.name)
        red, green, blue = (round(255 * part) for part in to_rgb(shown.curve.colour))
        floor = 0.5 / band.dimension if logarithmic else 0.0  # a logarithmic axis has no 0
        low, high, middle = (np.maximum(values, floor) for values in (band.low, band.high, band.middle))
        dash = _dash(shown.curve.style["linestyle"])
        same = {"x": self.axis.positions(band.points), "legendgroup": name, "name": name, "mode": "lines"}
        edge = {"color": colour, "width": 0.8, "dash": dash}
        silent = {"hoverinfo": "skip", "showlegend": False}
        known = {"color": colour, "width": 2.2, "dash": dash}
        lower = {**same, **silent, "y": low, "line": edge, "opacity": 0.7}
        tint = f"rgba({red},{green},{blue},{0.28 if len(self.shown) <= FEW else 0.12})"
        pattern = {"shape": shown.curve.hatch[:1], "fgcolor": colour, "bgcolor": tint, "fgopacity": 0.35}
        pattern |= {"size": 8, "solidity": 0.15}
        fill = {"fill": "tonexty", "fillcolor": tint, "fillpattern": pattern}
        upper = {**same, **silent, **fill, "y": high, "line": edge, "opacity": 0.7}
        line = {**same, "y": middle, "line": known, "hoverinfo": "skip", "showlegend": len(self.shown) > 1}
        hover = {"text": band.words(), "hoverinfo": "text+name", "showlegend": False}
        said = {**same, **hover, "y": (low + high) / 2, "line": {"color": colour, "width": 0}, "opacity": 0.0}
        return [lower, upper, line, said]

    def _changing_layout(self, *, whole: bool, logarithmic: bool) -> dict[str, Any]:
        """The title, the ticks and the ranges of the axes."""
        values, names = self.axis.ticks()
        ends = self.axis.positions(np.array(self.axis.seen)).tolist()
        x = {"tickvals": self.axis.positions(values).tolist(), "ticktext": names}
        if whole:
            x |= {"range": ends, "autorange": False}
        smallest = min((0.5 / band.dimension for band in self.bands), default=1e-3)
        y: dict[str, Any] = {"type": "log" if logarithmic else "linear"}
        if whole:
            y["range"] = [math.log10(smallest), math.log10(1.15)] if logarithmic else [-0.02, 1.02]
        lines = self._title_lines()
        top = LINE_HEIGHT * len(lines) + 24
        title = {"text": "<br>".join(lines)}
        zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        zero |= {"line": {"color": AXIS_COLOUR, "width": 1}, "visible": self.axis.scale != "log"}
        sizes = {"margin": {"t": top}, "height": HEIGHT + top}
        return {"xaxis": x, "yaxis": y, "title": title, "shapes": [zero], **sizes}

    def _title_lines(self) -> list[str]:
        """The chosen step and mode, and the negative share of each spectrum with its interval."""
        heading = f"step {self.choice.step}" + (f", Hessian mode {self.choice.mode}" if self.choice.mode else "")
        shares = [f"negative share {shown.negative_share}" for shown in self.shown]
        if len(shares) == 1 and len(self.choices.runs(self.choice.group)) == 1:
            return [_literal(f"{sentence_case(heading)}: {shares[0]}")]
        named = [f"{shown.name}: {share}" for shown, share in zip(self.shown, shares, strict=True)]
        return [_literal(line) for line in (sentence_case(heading), *named)]

    def _remarks_in_words(self) -> str:
        """What is missing, what is not resolved and why, and what cannot be relied on."""
        unresolved: dict[str, list[str]] = {}
        for shown in self.shown:
            if not shown.negative_share.resolved:
                unresolved.setdefault(shown.negative_share.reason, []).append(shown.name)
        why = [f"negative share of {listed(names)} not resolved: {reason}" for reason, names in unresolved.items()]
        nothing = "" if self.shown else "No spectrum is switched on"
        curves = [shown.curve for shown in self.shown]
        missing = unfinished_words(self.choices.runs(self.choice.group))
        lines = (self.choices.lacking(self.choice), nothing, *why, reasons(curves), missing)
        return markup.paragraphs([sentence_case(line) for line in lines if line])


def _layout(level: float) -> dict[str, Any]:
    """What stays of the layout: names of the axes, the grid, the legend."""
    grid = {"gridcolor": GRID_COLOUR, "linecolor": AXIS_COLOUR, "zeroline": False}
    x = {**grid, "title": {"text": f"eigenvalue λ ({EIGENVALUE_UNIT})"}, "tickmode": "array"}
    y = {**grid, "title": {"text": f"share of eigenvalues below λ ({100 * level:g} % band)"}}
    return {
        "template": "none",
        "font": {"color": TEXT_COLOUR, "size": 12},
        "title": {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 14, "l": 10}, "font": {"size": 14}},
        "xaxis": x,
        "yaxis": y,
        "hovermode": "x",
        "hoverlabel": {"namelength": -1, "font": {"size": 11}},
        "margin": {"l": 70, "r": 20, "b": 60},
        "showlegend": True,
        "legend": {"x": 0.99, "xanchor": "right", "y": 0.02, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.8)"},
    }


def _row(controls: Sequence[Any]) -> Any:
    """Controls side by side, in further rows where the page is narrow."""
    return ipywidgets.HBox(list(controls), layout=ipywidgets.Layout(flex_flow="row wrap"))


def _literal(text: str) -> str:
    """Text that plotly shows as it is: no tags, and no formula between dollar signs."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _dash(line: Any) -> str:
    """A line style of matplotlib as plotly calls it: a name, or lengths of dashes and gaps in pixels."""
    if isinstance(line, str):
        return DASHES.get(line, "solid")
    return ",".join(f"{2 * length:g}px" for length in line[1])
