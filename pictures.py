"""Pictures with words in them: grids of images (Pillow), rates and learning curves (matplotlib)."""

import functools
import math
import warnings

import numpy as np
from PIL import Image, ImageDraw

from bounds import nats_to_bits
from errors import needing, one_line
from fonts import Font, chart_style

# ---- grids ---------------------------------------------------------------------------------


def _wrapped(text, font, width):
    """text on at most three lines of `width` pixels; a longer one has an ellipsis in its middle."""

    def lines_of(text):
        lines = [""]
        for character in text:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
        return lines

    lines, kept = lines_of(text), len(text)
    while len(lines) > 3:
        kept -= 1
        lines = lines_of(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}")
    return "\n".join(lines)


def picture_of(image):
    """A PIL image of uint8 (S, S, 3), mode RGB, or (S, S, 1), mode L."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _cell(size, columns):
    """The side of an image of `size` pixels in a grid of so many columns."""
    return size * math.ceil((128 if columns <= 12 else 64) / size)


def strip(images):
    """A PIL image of images, uint8 (n, S, S, c), side by side, as large as in labelled_grid."""
    n, size = images.shape[:2]
    cell = _cell(size, n)
    gap = max(4, cell // 32)
    row = [picture_of(image).resize((cell, cell), Image.Resampling.NEAREST) for image in images]
    canvas = Image.new(row[0].mode, (n * (cell + gap) - gap, cell), "white")
    for column, image in enumerate(row):
        canvas.paste(image, (column * (cell + gap), 0))
    return canvas


def labelled_grid(rows, row_labels, column_labels=(), title=""):
    """A PIL image, RGB, of rows of images, each uint8 (n, S, S, c), on white with their labels.

    Small images are enlarged by a whole number, to be legible: in up to twelve columns to 128
    pixels at least, in more to 64. A row may be shorter than others. Labels are a line each, names
    of files for example: what is no printable character is escaped.
    """
    size, columns = rows[0].shape[1], max(map(len, rows))
    cell = _cell(size, columns)
    gap = max(4, cell // 32)
    font = Font(min(max(13, cell // 12), 40))
    line, title, row_labels = font.line, one_line(title), [*map(one_line, row_labels)]
    column_labels = [_wrapped(one_line(label), font, cell) for label in column_labels]
    depth = max((label.count("\n") + 1 for label in column_labels), default=0)
    left = int(max(map(font.getlength, row_labels))) + 2 * gap
    top = gap + line * (bool(title) + depth)
    width = max(left + columns * (cell + gap), int(font.getlength(title)) + 2 * gap)
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    font.draw(draw, (gap, gap), title)
    for column, label in enumerate(column_labels):
        center = left + column * (cell + gap) + cell // 2
        font.draw(draw, (center, top - gap // 2), label, "md")
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * (cell + gap)
        font.draw(draw, (left - gap, y + cell // 2), label, "rm")
        for column, image in enumerate(images):
            enlarged = picture_of(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (cell + gap), y))
    return canvas


# ---- charts --------------------------------------------------------------------------------


def _legible(draw):
    """draw(path, ...) → the same with the texts among its arguments shown as they stand.

    Names of runs are any text: with letters of any script, dollars, what is no text at all.
    """

    @functools.wraps(draw)
    def drawn(path, *args, **more):
        with needing("matplotlib", f"the picture {path}"):
            import matplotlib  # slow to import
            from matplotlib.figure import Figure  # noqa: F401  which may fail where it does not

        args = [
            one_line(arg)
            if isinstance(arg, str)
            else {one_line(label): value for label, value in arg.items()}
            if isinstance(arg, dict)
            else arg
            for arg in args
        ]
        texts = [text for arg in args if isinstance(arg, str | dict) for text in arg]
        with matplotlib.rc_context(chart_style(texts)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of a letter that no font has
            draw(path, *args, **more)

    return drawn


@_legible
def draw_rates(path, resolutions, rates, title, active=None):
    """Writes a picture of where the bits go: a bar per layer, and the sums by resolution.

    Args:
        path: of the picture, in the format its suffix names.
        resolutions: that of each layer.
        rates: that of each layer, in nats per dimension.
        active: (latent channels in use, latent channels) of each layer, drawn below it.
    """
    from matplotlib.figure import Figure

    bits = nats_to_bits(np.asarray(rates))
    names = sorted(set(resolutions))
    colors = dict(zip(names, (f"C{i}" for i in range(len(names))), strict=True))
    figure = Figure(figsize=(11, 4.2 + 1.6 * bool(active)), layout="constrained")
    figure.suptitle(title)
    parts = figure.subplot_mosaic(
        [["layers", "sums"]] + [["active", "sums"]] * bool(active),
        width_ratios=(2.4, 1),
        height_ratios=(3, 1)[: 1 + bool(active)],
    )
    layers, sums = parts["layers"], parts["sums"]
    layers.bar(range(len(bits)), bits, color=[colors[r] for r in resolutions])
    layers.set(ylabel="rate, bits/dim")
    below = layers
    if active:
        in_use, widths = active
        below = parts["active"]
        below.sharex(layers)
        below.bar(range(len(bits)), widths, color="0.9")
        below.bar(range(len(bits)), in_use, color=[colors[r] for r in resolutions])
        below.set(ylabel="active channels")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set(xlabel="stochastic layer, from 0 at the top")
    total = bits.sum()
    for row, r in enumerate(names):
        value = bits[np.asarray(resolutions) == r].sum()
        sums.barh(row, value, color=colors[r])
        share = f" ({value / total:.0%})" if total else ""
        sums.text(value, row, f" {value:.3g}{share}", va="center")
    counts = [list(resolutions).count(r) for r in names]
    words = [f"{r}x{r}, {n} layer{'s' * (n > 1)}" for r, n in zip(names, counts, strict=True)]
    sums.set_yticks(range(len(names)), words)
    sums.invert_yaxis()
    sums.margins(x=1)  # room for the words
    sums.xaxis.get_major_locator().set_params(nbins=3)  # and for those of small rates
    sums.set(xlabel="rate, bits/dim", title=f"by resolution, total {total:.3g}")
    for axes in parts.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


@_legible
def draw_curves(path, runs):
    """Writes the learning curves of runs: bits/dim over steps and hours, gradient norm, skip rate.

    Args:
        path: of the picture, in the format its suffix names.
        runs: {label: (train, evaluations)}, dicts of arrays of one length: step, hours and bits;
            of train also grad_norm and skip_rate; of evaluations, whose bits are those of the EMA,
            also weights_bits_per_dim, NaN where the weights themselves were not evaluated, and
            labels, a word: whether the evaluations were told labels ("": there are none).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """The ticks that a logarithmic axis names, as numbers."""

        def __call__(self, value, position=None):
            return f"{value:.6g}" if super().__call__(value, position) else ""

    figure = Figure(figsize=(12, 8), layout="constrained")
    (by_step, by_time), (norms, skips) = figure.subplots(2, 2)
    with_weights = False
    late = []  # bits/dim after the first tenth of a run: what the axes must show
    hours = max(train["hours"][-1] for train, _ in runs.values())
    unit, scale = ("hours", 1) if hours > 2 else ("minutes", 60)
    for i, (label, (train, evals)) in enumerate(runs.items()):
        if told := evals.get("labels"):
            label = f"{label} (labels: {told})"
        style = dict(color=f"C{i}", linewidth=1)
        dots = dict(marker="o", markersize=4, label=label)
        for axes, key, factor in ((by_step, "step", 1), (by_time, "hours", scale)):
            axes.plot(train[key] * factor, train["bits"], **style, alpha=0.5)
            axes.plot(evals[key] * factor, evals["bits"], **style, **dots)
            own = evals.get("weights_bits_per_dim", evals["bits"] * math.nan)
            if np.isfinite(own).any():
                crosses = dict(marker="x", markersize=5, linestyle=":", label=f"{label}: weights")
                axes.plot(evals[key] * factor, own, **{**style, **crosses})
                with_weights = True
        norms.plot(train["step"], train["grad_norm"], **style, label=label)
        skips.plot(train["step"], train["skip_rate"], **style, label=label)
        late += [*train["bits"][train["step"] >= train["step"][-1] / 10], *evals["bits"]]
        late += [*own]
    late = np.array(late)[np.isfinite(late)]
    for axes in (by_step, by_time):
        if len(late):
            margin = 0.05 * (late.max() - late.min()) or 0.1
            axes.set_ylim(late.min() - margin, late.max() + margin)
        crosses = ", crosses: of the weights" if with_weights else ""
        dots = "dots: validation of the EMA" if with_weights else "dots: validation"
        axes.set_ylabel(f"bits/dim (line: training, {dots}{crosses})")
    norms.set(ylabel="gradient norm, largest per log line", yscale="log")
    # Texts stand as they are (chart_style), so this axis's may be no formulas: 100, not $10^2$.
    norms.yaxis.set_major_formatter(Plain())
    norms.yaxis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))
    skips.set(ylabel="skipped updates, share of the steps")
    top = max(np.nanmax(train["skip_rate"]) for train, _ in runs.values())
    skips.set_ylim(0, max(0.05, 1.1 * top))
    for axes in (by_step, norms, skips):
        axes.set_xlabel("step")
        axes.get_xaxis().get_major_locator().set_params(nbins=7)
    by_time.set_xlabel(f"{unit} since the run's first line")
    for axes in (by_step, by_time, norms, skips):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.legend()
    figure.savefig(path, dpi=110)
