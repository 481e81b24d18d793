"""The explorer's own pieces of HTML: its style, bits as bars, a score as a table."""

from html import escape

from bounds import nats_to_bits

# Colours of the resolutions, from the top: legible on white and on black.
COLOURS = "#4e79a7 #f28e2b #59a14f #e15759 #b07aa1 #76b7b2 #9c755f #edc948 #ff9da7 #8c8c8c".split()

# System fonts alone; pictures enlarged without smoothing; where there is room for one column only,
# what a control makes stands above the controls.
STYLE = """
.gradio-container { --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace;
  width: 100%; max-width: 1280px !important; margin: 0 auto; }
.gradio-container > main { width: 100%; max-width: 100%; }
#title h1 { margin: 0; font-size: 1.4rem; }
#title p { margin: 0; opacity: .75; }
h2 { margin: 0; font-size: 1rem; }
h2 span { font-weight: normal; opacity: .75; }
.low { align-items: flex-end; }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.pixels .image-container { padding-top: 1.9rem; box-sizing: border-box; }
.pixels .grid-wrap { min-height: 6rem !important; overflow-y: auto !important; }
.pixels .grid-container { grid-auto-rows: auto !important; grid-template-rows: none !important;
  grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important; }
.pixels .thumbnail-item { aspect-ratio: auto; height: auto; display: block; }
.pixels .thumbnail-item img { aspect-ratio: 1; border-radius: 0; }
.pixels .caption-label { position: static; max-width: 100%; white-space: normal; border: 0; }
.status { align-items: center; }
.status p { margin: 0; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 8rem; padding-top: 4px; }
.bars span { flex: 1 1 0; min-width: 1px; border-radius: 2px 2px 0 0; }
.bars span.gone { opacity: .25; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin-top: .4rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .35em; }
.score { font-variant-numeric: tabular-nums; }
.score b { font-size: 1.2rem; }
@media (max-width: 700px) { .sides > .first { order: -1; } }
"""


def bars(rates, bases, kept=None):
    """HTML of the bits that each layer tells of a picture, the layers beyond the kept ones pale.

    Args:
        rates: of each layer, in nats per dimension.
        bases: their resolutions.
        kept: how many layers are kept (None: all).
    """
    bits, names = bits_of(rates), sorted(set(bases))
    top, kept = max(*bits, 1e-9), len(bits) if kept is None else kept
    colours = {r: COLOURS[i % len(COLOURS)] for i, r in enumerate(names)}
    parts = [
        f'<span class="{"" if i < kept else "gone"}" '
        f'style="height: {max(100 * b / top, 0.5):.1f}%; background: {colours[r]}" '
        f'title="layer {i}, {r}x{r}: {b:.4f} bits/dim"></span>'
        for i, (b, r) in enumerate(zip(bits, bases, strict=True))
    ]
    sums = {r: sum(b for b, base in zip(bits, bases, strict=True) if base == r) for r in names}
    legend = [
        f"<span><i style='background: {colours[r]}'></i>{r}x{r}: {sums[r]:.3f}</span>"
        for r in names
    ]
    label = f"bits per dimension of each of {len(bits)} layers, from the top"
    return (
        f"<h2>Bits of each layer <span>from the top, with sums by resolution, per dimension</span>"
        f"</h2>"
        f'<div class="bars" role="img" aria-label="{label}">{"".join(parts)}</div>'
        f'<div class="legend">{"".join(legend)}</div>'
    )


def bits_of(rates):
    return [nats_to_bits(rate) for rate in rates]


def score(encoded):
    """HTML of what a picture costs: bits per dimension, of its latents and given them."""
    distortion, rate = bits_of((encoded.distortion, sum(encoded.rates)))
    return (
        f'<div class="score"><b>{encoded.bits_per_dim:.3f} bits/dim</b> = '
        f"distortion {distortion:.3f} + rate {rate:.3f}</div>"
    )


def said(*sentences):
    """HTML of the status line."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
