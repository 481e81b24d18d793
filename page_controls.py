"""What the tabs of the explorer's page have in common: controls, places for images, downloads."""

import os
import secrets
import time
from functools import partial
from typing import Any

from PIL import Image

from answering import Answers, choice, whole, yes_or_no
from errors import UserError, reason_of
from exploring import Encodings, as_rgb
from page_parts import said
from pictures import labelled_grid

SEEDS = 2**31 - 1  # the largest seed: a number that every browser keeps whole
NONE = "none"  # of a label

# Variables by which Gradio, or what it stands on, would share the page, send figures on requests to
# other hosts, take itself for another host's. GRADIO_TEMP_DIR is set by explore.py.
HEEDED = ("GRADIO_", "FASTAPI_", "OTEL_", "SPACE_", "SPACES_", "OAUTH_")

# A hidden button holds the file that a visible one has asked for: this presses it.
PRESS = "() => setTimeout(() => document.querySelector('#{0} a, a#{0}, button#{0}').click(), 150)"
ANOTHER = f"() => Math.floor(Math.random() * {SEEDS})"


def import_gradio():
    """The module gradio, which asks no other host and heeds no variable of the environment.

    Raises:
        UserError: where it is not installed.
    """
    for name in [*os.environ]:
        if name.startswith(HEEDED) and name != "GRADIO_TEMP_DIR" or name == "SYSTEM":
            del os.environ[name]
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    try:
        import gradio  # slow, and an option
    except Exception as error:  # it may be there, of another Python or NumPy
        raise UserError(
            f"the page needs the package gradio ({reason_of(error)}): "
            f"pip install -r requirements-explore.txt"
        ) from None
    return gradio


def _any_value():
    """Gradio's model of a value that may be anything: what it must be the checks say."""
    from gradio.data_classes import GradioRootModel

    class AnyValue(GradioRootModel):
        root: Any

    return AnyValue


class Controls:
    """The model, the folder of files that are served, who is answered; makes parts of tabs."""

    def __init__(self, model, folder):
        self.gradio = import_gradio()
        self.anything = _any_value()
        self.model, self.folder = model, folder
        self.answers, self.encodings = Answers(), Encodings()
        self.labels = model.choices_of_label(NONE)

    # ---- what is entered

    def seed(self, label="Seed", info="The same seed, the same noise"):
        return self.gradio.Number(
            0, label=label, info=info, precision=0, minimum=0, maximum=SEEDS, min_width=120
        )

    def label(self, info):
        """A choice of label, or None for a model without."""
        if names := [*self.labels]:
            return self.gradio.Dropdown(names, value=names[0], label="Label", info=info)

    def mean(self):
        return self.gradio.Checkbox(
            False, label="Without noise of pixels", info="Their mean in place of a sample"
        )

    def temperature(self, value, label, info=None):
        return self.gradio.Slider(0, 1.5, value, step=0.05, label=label, info=info)

    def picture(self, label, part):
        """A place for an upload."""
        image = self.gradio.Image(
            label=label, type="filepath", sources=["upload", "clipboard"], height=240, buttons=[],
            elem_classes="pixels", elem_id=part, min_width=150,
        )  # fmt: skip
        image.data_model = self.anything  # the place's own would end what is none in a traceback
        return image

    def shared_checks(self, seed, label, mean):
        """The checks of controls that all tabs have."""
        checks = {"seed": (seed, whole("Seed", 0, SEEDS))}
        if label:
            checks["label"] = label, choice("Label", self.labels)
        return checks | {"mean": (mean, yes_or_no("Without noise of pixels"))}

    # ---- what is shown

    def result(self, label, part):
        """A place for an image that is made."""
        return self.gradio.Image(
            label=label, format="png", interactive=False, height=240, elem_classes="pixels",
            elem_id=part, min_width=150, buttons=["fullscreen"],
        )  # fmt: skip

    def gallery(self, heading, part, info=""):
        """A place for several images, below a heading."""
        info = f" <span>{info}</span>" if info else ""
        self.gradio.HTML(f"<h2>{heading}{info}</h2>", padding=False)
        return self.gradio.Gallery(
            label=heading, show_label=False, format="png", height="auto", allow_preview=False,
            interactive=False, elem_classes="pixels", elem_id=part, buttons=["fullscreen"],
        )  # fmt: skip

    def status_and_stop(self):
        gr = self.gradio
        with gr.Row(elem_classes="status"):
            status = gr.HTML(padding=False, min_height=52)
            stop = gr.Button("Stop", size="sm", scale=0, min_width=80)
        return status, stop

    # ---- what answers

    def answer(self, events, name, function, checks, outputs, status, n_layers=None):
        """Has a function of checked values answer the events: its results, then a line of status.

        Args:
            name: that the HTTP API knows it by.
            checks, n_layers: as Answers.to takes them.
        """
        if "label" not in checks:  # the model has none
            function = partial(function, label=None)
        return self.gradio.on(
            events,
            self.answers.to(function, checks, n_layers),
            inputs={component for component, _ in checks.values()},
            outputs=[*outputs, status],
            api_name=name,
            preprocess=False,  # the checks do that
            trigger_mode="always_last",
            show_progress_on=status,
            concurrency_limit=1,
            concurrency_id="model",
        )

    def download(self, button, name, function, checks, status, n_layers=None):
        """Has a button save the file that function(path, **values) writes under the name."""
        part = f"file-{name.replace('.', '-')}"
        hidden = self.gradio.DownloadButton(visible="hidden", elem_id=part)

        def write(**values):
            path = os.path.join(self.folder, secrets.token_hex(16), name)
            os.mkdir(os.path.dirname(path))
            function(path, **values)
            return path, said(f"{name}: {os.path.getsize(path) / 1e3:,.3g} kB")

        event = self.answer(button.click, name.replace(".", "_"), write, checks, [hidden], status,
                            n_layers)  # fmt: skip
        event.success(None, js=PRESS.format(part), api_visibility="private")
        return event

    def stopping(self, stop, status, events):
        """Has a button stop what the events have begun."""
        stop.click(lambda: said("Stopped."), outputs=status, cancels=events,
                   api_visibility="private")  # fmt: skip


def changes_of(*parts):
    """The events of a user's changes of controls, of those that there are."""
    return [part.change for part in parts if part]


def timed(function):
    """function, whose last result, a sentence, becomes the line of status with its time."""

    def run(**values):
        start = time.monotonic()
        *results, sentence = function(**values)
        sentence = sentence[:1].upper() + sentence[1:]
        return *results, said(f"{sentence} ({time.monotonic() - start:.2g} s)")

    return run


# ---- images --------------------------------------------------------------------------------


def shown(image):
    """What a place for an image takes, of one (1, S, S, channels)."""
    return as_rgb(image)[0]


def all_shown(images, captions=None):
    """What a gallery takes."""
    images = [*as_rgb(images)]
    return [*zip(images, captions, strict=True)] if captions else images


def save_image(path, image):
    """Writes an image (1, S, S, channels) in its own size."""
    Image.fromarray(shown(image)).save(path)


def save_grid(path, model, images, title, captions=()):
    """Writes images with words: a row with captions, or eight a row with their numbers."""
    images = as_rgb(images)
    width = len(images) if captions else min(len(images), 8)
    starts = range(0, len(images), width)
    rows = [images[i : i + width] for i in starts]
    labels = [""] if captions else [str(i) for i in starts]
    captions = captions or [f"+{i}" for i in range(width)]
    labelled_grid(rows, labels, captions, f"{model.vae.H.hparam_sets}: {title}").save(path)
