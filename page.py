"""The explorer's page: three tabs, their layout, which function answers which control."""

from html import escape

from answering import choice, real, upload, whole, yes_or_no
from errors import UserError
from exploring import (
    Chosen,
    by_resolution,
    layers_of_mixture,
    layers_of_picture,
    layers_of_samples,
    layers_of_way,
    mixture,
    read_picture,
    reconstruction,
    samples,
    way,
    write_latents,
)
from page_controls import (
    ANOTHER,
    SEEDS,
    Controls,
    all_shown,
    changes_of,
    save_grid,
    save_image,
    shown,
    timed,
)
from page_parts import bars, bits_of, score
from pictures import draw_rates
from watching import layers_of

MOST = 64  # pictures at once
FACTOR = "Factor of the prior's standard deviations"


def make_page(model, folder):
    """The page as Gradio's Blocks.

    Args:
        model: an exploring.Model.
        folder: of uploads and of files to download.
    """
    own = Controls(model, folder)
    gr = own.gradio
    with gr.Blocks(title="Explorer", analytics_enabled=False) as page:
        head = f"<h1>Explorer</h1><p>{escape(model.in_words)}</p>"
        gr.HTML(head, elem_id="title", padding=False)
        with gr.Tab("Sample"):
            sample_tab(own, page.load)
        with gr.Tab("Picture"):
            picture_tab(own)
        with gr.Tab("Mix"):
            mix_tab(own)

        def leave(request: gr.Request):
            own.answers.stop(request.session_hash)

        page.unload(leave)
    page.queue(max_size=64, api_open=False)
    return page


# ---- Sample --------------------------------------------------------------------------------


def sample_tab(own, load):
    """Samples, and one of them drawn anew below the layers that are kept of it."""
    gr, model = own.gradio, own.model
    found = sorted(set(model.bases))
    names = {f"{r}x{r}": r for r in found}
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300):
            n = gr.Slider(1, MOST, 12 if model.millions < 5 else 4, step=1, label="Pictures")
            with gr.Row(elem_classes="low"):
                seed = own.seed()
                another = gr.Button("Another seed", size="sm", min_width=120)
            label = own.label("What the samples show")
            with gr.Group():
                ts = {r: own.temperature(1, f"Temperature at {name}", FACTOR if r == found[0]
                                         else None) for name, r in names.items()}  # fmt: skip
            mean = own.mean()
        with gr.Column(scale=3, min_width=300, elem_classes="first"):
            images = own.gallery("Samples", "samples", "press one to draw it anew")
            status, stop = own.status_and_stop()
            with gr.Row():
                as_png = gr.Button("Save (PNG)", size="sm")
                as_latents = gr.Button("Save latents (.npz)", size="sm")
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300):
            index = gr.Number(0, label="Chosen picture", precision=0, minimum=0, maximum=MOST - 1,
                              info="Its number, from 0")  # fmt: skip
            keep = gr.Radio([*names], value=[*names][(len(names) - 1) // 2], label="Keep down to",
                            info="Its layers up to this resolution")  # fmt: skip
            with gr.Row(elem_classes="low"):
                rest = own.seed("Seed of the rest", "The rest is drawn anew from it")
                anew = gr.Button("Draw the rest anew", size="sm", min_width=120)
        with gr.Column(scale=3, min_width=300):
            variations = own.gallery("The chosen one, the rest drawn anew", "variations")
            with gr.Row():
                anew_png = gr.Button("Save (PNG)", size="sm")
                anew_latents = gr.Button("Save latents (.npz)", size="sm")

    checks = own.shared_checks(seed, label, mean) | {
        "n": (n, whole("Pictures", 1, MOST)),
        **{f"t{r}": (ts[r], real(f"Temperature at {r}x{r}", 0, 1.5)) for r in found},
    }
    more = checks | {
        "index": (index, whole("Chosen picture", 0, MOST - 1)),
        "resolution": (keep, choice("Keep down to", names)),
        "rest": (rest, whole("Seed of the rest", 0, SEEDS)),
    }

    def drawn(n, seed, label, mean, index=None, resolution=None, rest=None, **ts):
        """(images, latents, what they are in words)"""
        if index is not None and index >= n:
            raise UserError(
                f"Chosen picture is {index}: of {n} pictures it must be a number from 0 to {n - 1}."
            )
        t = [ts[f"t{r}"] for r in model.bases]
        chosen = None if index is None else Chosen(index, resolution, rest)
        words = f"{n} sample{'s' * (n > 1)} of seed {seed}"
        if chosen:
            words = (
                f"sample {index} of seed {seed}, kept to {resolution}x{resolution}, the rest "
                f"{n} times of seed {rest}"
            )
        words += "; temperature " + ", ".join(f"{ts[f't{r}']:g} at {r}x{r}" for r in found)
        return *samples(model, n, t, seed, label, mean, chosen), words

    def show(**values):
        images, _, words = drawn(**values)
        return all_shown(images), words

    def save_png(path, **values):
        images, _, words = drawn(**values)
        save_grid(path, model, images, words)

    def save_latents(path, label, **values):
        images, latents, words = drawn(label=label, **values)
        write_latents(path, model, latents, [f"{words}, {i}" for i in range(len(images))], label)

    def n_layers(values):
        return layers_of_samples(model, values["n"], "index" in values)

    changes = changes_of(*(part for part, _ in checks.values()))
    show = timed(show)
    events = [
        own.answer([load, *changes], "samples", show, checks, [images], status, n_layers),
        own.answer([anew.click, *changes_of(index, keep, rest)], "variations", show, more,
                   [variations], status, n_layers),
        own.download(as_png, "samples.png", save_png, checks, status, n_layers),
        own.download(as_latents, "samples.npz", save_latents, checks, status, n_layers),
        own.download(anew_png, "variations.png", save_png, more, status, n_layers),
        own.download(anew_latents, "variations.npz", save_latents, more, status, n_layers),
    ]  # fmt: skip
    own.stopping(stop, status, events)
    another.click(None, js=ANOTHER, outputs=seed, api_visibility="private")
    anew.click(None, js=ANOTHER, outputs=rest, api_visibility="private")

    def choose(event: gr.SelectData):
        return event.index

    images.select(choose, outputs=index, show_progress="hidden", api_visibility="private")


# ---- Picture -------------------------------------------------------------------------------


def picture_tab(own):
    """What the latents of a picture keep of it, layer by layer, and what they cost."""
    gr, model = own.gradio, own.model
    n = len(model.bases)
    with gr.Row():
        image = own.picture("Picture", "upload")
        original = own.result("Model's input", "original")
        kept = own.result("What is kept of it", "kept")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            k = gr.Slider(0, n, n, step=1, label="Layers kept", info="From the top; the rest is "
                          "sampled")  # fmt: skip
            t = own.temperature(0.1, "Temperature of the rest", FACTOR)
            seed, label, mean = own.seed(), own.label("What the picture shows"), own.mean()
        with gr.Column(scale=3, min_width=300):
            status, stop = own.status_and_stop()
            cost = gr.HTML(elem_id="score", padding=False)
            chart = gr.HTML(elem_id="bars", padding=False)
            added = own.gallery("What each resolution adds", "added", "with bits per dimension")
            with gr.Row():
                as_png = gr.Button("Save kept (PNG)", size="sm", min_width=110)
                as_latents = gr.Button("Save latents (.npz)", size="sm", min_width=110)
                added_png = gr.Button("Save added (PNG)", size="sm", min_width=110)
                bars_png = gr.Button("Save bits (PNG)", size="sm", min_width=110)

    about = own.shared_checks(seed, label, mean) | {"image": (image, upload("Picture", own.folder))}
    checks = about | {
        "k": (k, whole("Layers kept", 0, n)),
        "t": (t, real("Temperature of the rest", 0, 1.5)),
    }

    def encoded(data, seed, label):
        """(what the model sees of an upload, its Encoded)"""
        square = read_picture(model, data)
        return square, own.encodings.of(model, square, seed, label)

    def forming(of_image, seed, label, mean):
        """(images, captions), one a resolution."""
        images, steps = by_resolution(model, of_image, seed, label, mean)
        bits, captions = bits_of(of_image.rates), []
        for start, stop in zip([0, *steps], steps, strict=False):
            r = model.bases[stop - 1]
            captions.append(f"to {r}x{r}, {stop} of {n} layers: +{sum(bits[start:stop]):.3f}")
        return images, captions

    def keeping(of_image, k, t, seed, label, mean):
        """(image, latents, what they are in words)"""
        rest = f", the rest at temperature {t:g}" if k < n else ""
        words = f"{k} of {n} layers kept{rest}; seed {seed}"
        return *reconstruction(model, of_image, k, t, seed, label, mean), words

    def move(image, k, t, seed, label, mean):
        _, of_image = encoded(image, seed, label)
        now, _, words = keeping(of_image, k, t, seed, label, mean)
        return shown(now), bars(of_image.rates, model.bases, k), words

    def show(image, k, t, seed, label, mean):
        square, of_image = encoded(image, seed, label)
        now, chart, words = move(image, k, t, seed, label, mean)
        formed = all_shown(*forming(of_image, seed, label, mean))
        return shown(square), now, score(of_image), chart, formed, words

    def save_png(path, image, seed, label, **values):
        _, of_image = encoded(image, seed, label)
        save_image(path, keeping(of_image, seed=seed, label=label, **values)[0])

    def save_latents(path, image, seed, label, **values):
        _, of_image = encoded(image, seed, label)
        _, latents, words = keeping(of_image, seed=seed, label=label, **values)
        write_latents(path, model, latents, [words], label)

    def save_added(path, image, seed, label, mean):
        _, of_image = encoded(image, seed, label)
        images, captions = forming(of_image, seed, label, mean)
        save_grid(path, model, images, "what each resolution adds, bits/dim", captions)

    def save_bars(path, image, seed, label, mean):
        _, of_image = encoded(image, seed, label)
        title = f"{model.vae.H.hparam_sets}: {of_image.bits_per_dim:.3f} bits/dim"
        draw_rates(path, model.bases, of_image.rates, title)

    encoding, decoding = layers_of(model.vae)

    def all_n(_):
        return layers_of_picture(model)

    def move_n(_):
        return 2 * encoding + decoding

    events = [
        own.answer([image.upload, *changes_of(seed, label, mean)], "picture", timed(show), checks,
                   [original, kept, cost, chart, added], status, all_n),
        own.answer(changes_of(k, t), "reconstruct", timed(move), checks, [kept, chart], status,
                   move_n),
        own.download(as_png, "picture.png", save_png, checks, status, move_n),
        own.download(as_latents, "picture.npz", save_latents, checks, status, move_n),
        own.download(added_png, "resolutions.png", save_added, about, status, all_n),
        own.download(bars_png, "bits.png", save_bars, about, status, move_n),
    ]  # fmt: skip
    own.stopping(stop, status, events)


# ---- Mix -----------------------------------------------------------------------------------


def mix_tab(own):
    """Two pictures: the coarse latents of one with the fine ones of the other; the way between."""
    gr, model = own.gradio, own.model
    n = len(model.bases)
    with gr.Row():
        a, b = own.picture("A: coarse latents", "a"), own.picture("B: fine latents", "b")
        mixed = own.result("The mixture", "mixture")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            k = gr.Slider(0, n, n // 2, step=1, label="Layers of A", info="From the top; "
                          "the others are B's")  # fmt: skip
            stored = gr.Checkbox(False, label="B's latents as stored", info="Else B's posterior "
                                 "given what A has decided")  # fmt: skip
            steps = gr.Slider(2, 16, 8, step=1, label="Steps from A to B")
            seed, label, mean = own.seed(), own.label("What both show"), own.mean()
        with gr.Column(scale=3, min_width=300):
            status, stop = own.status_and_stop()
            between = own.gallery("The way from A to B", "way")
            with gr.Row():
                mix_png = gr.Button("Save mixture (PNG)", size="sm", min_width=110)
                mix_latents = gr.Button("Save its latents (.npz)", size="sm", min_width=110)
                way_png = gr.Button("Save way (PNG)", size="sm", min_width=110)
                way_latents = gr.Button("Save its latents (.npz)", size="sm", min_width=110)

    both = own.shared_checks(seed, label, mean) | {
        "a": (a, upload("Picture A", own.folder)),
        "b": (b, upload("Picture B", own.folder)),
    }
    mixing = both | {
        "k": (k, whole("Layers of A", 0, n)),
        "stored": (stored, yes_or_no("B's latents as stored")),
    }
    going = both | {"steps": (steps, whole("Steps from A to B", 2, 16))}

    def mix(a, b, k, stored, **values):
        """(image, latents, what they are in words)"""
        how = "as stored" if stored else "given A's"
        words = f"layers: {k} of A, {n - k} of B, {how}"
        a, b = read_picture(model, a), read_picture(model, b)
        return *mixture(model, a, b, k, stored, **values), words

    def go(a, b, steps, **values):
        """(images, latents)"""
        return way(model, read_picture(model, a), read_picture(model, b), steps, **values)

    def show_mix(**values):
        image, _, words = mix(**values)
        return shown(image), words

    def show_way(steps, **values):
        return all_shown(go(steps=steps, **values)[0]), f"{steps} steps from A to B"

    def show_both(a, b, k, stored, steps, **values):
        if a is None or b is None:
            return gr.skip(), gr.skip(), f"now choose picture {'B' if b is None else 'A'}"
        image, words = show_mix(a=a, b=b, k=k, stored=stored, **values)
        return image, show_way(a=a, b=b, steps=steps, **values)[0], words

    def save_mix(path, **values):
        save_image(path, mix(**values)[0])

    def save_mix_latents(path, label, **values):
        _, latents, words = mix(label=label, **values)
        write_latents(path, model, latents, [words], label)

    def save_way(path, steps, **values):
        captions = [f"{i / (steps - 1):.2f}" for i in range(steps)]
        save_grid(path, model, go(steps=steps, **values)[0], "the way from A to B", captions)

    def save_way_latents(path, steps, label, **values):
        _, latents = go(steps=steps, label=label, **values)
        names = [f"step {i} of {steps} from A to B" for i in range(steps)]
        write_latents(path, model, latents, names, label)

    def mix_n(values):
        return layers_of_mixture(model, values["k"])

    def way_n(values):
        return layers_of_way(model, values["steps"])

    def both_n(values):
        return mix_n(values) + way_n(values)

    some = {name: (part, lambda value, check=check: None if value is None else check(value))
            for name, (part, check) in both.items() if name in "ab"}  # fmt: skip
    events = [
        own.answer([a.upload, b.upload, *changes_of(seed, label, mean)], "mix_and_way",
                   timed(show_both), mixing | going | some, [mixed, between], status, both_n),
        own.answer(changes_of(k, stored), "mix", timed(show_mix), mixing, [mixed], status, mix_n),
        own.answer(steps.change, "way", timed(show_way), going, [between], status, way_n),
        own.download(mix_png, "mixture.png", save_mix, mixing, status, mix_n),
        own.download(mix_latents, "mixture.npz", save_mix_latents, mixing, status, mix_n),
        own.download(way_png, "way.png", save_way, going, status, way_n),
        own.download(way_latents, "way.npz", save_way_latents, going, status, way_n),
    ]  # fmt: skip
    own.stopping(stop, status, events)
