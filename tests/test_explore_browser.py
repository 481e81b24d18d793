"""explore.py in a browser, Debian's Chromium: clicked, slid, uploaded, downloaded; what is seen."""

import io
import shutil
import signal

import numpy as np
import pytest
from explorer import Explorer, png, write_weights
from PIL import Image

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("no chromium: apt-get install chromium", allow_module_level=True)

playwright = pytest.importorskip("playwright.sync_api")

DEEP, LAYERS = "1x1,4m1,4x2,8m4,8x40", 45


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "a.png").write_bytes(png(0))
    (folder / "b.png").write_bytes(png(1))
    (folder / "bad.png").write_text("no picture")
    # Slow enough to be stopped: 64 samples, one at a time, of many layers.
    weights = write_weights(folder, "digits", dec_blocks=DEEP)
    page = Explorer(weights, folder, "--n_batch", "1", "--hps", "digits", "--dec_blocks", DEEP)
    page.folder = folder
    yield page
    assert page.end(signal.SIGINT) == 130


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 400], ids=lambda width: f"{width} pixels")
def page(request, explorer, browser):
    """The page at a width, open; at the end there were no errors, no request to another host."""
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    page, wrong = context.new_page(), []
    page.set_default_timeout(90_000)
    page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda r: r.failure != "net::ERR_ABORTED" and wrong.append(r.url))
    mine = (
        f"http://127.0.0.1:{explorer.port}/",
        "data:",
        f"blob:http://127.0.0.1:{explorer.port}/",
    )
    page.on("request", lambda r: r.url.startswith(mine) or wrong.append(r.url))
    page.on("websocket", lambda socket: wrong.append(socket.url))
    page.goto(mine[0])
    page.wait_for_selector("#samples img")
    yield page
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, f"{overflow} pixels stand out to the right"
    context.close()
    assert wrong == []


def pictures(page, part):
    """What the images of a part show: the addresses of their files, which their content names."""
    return page.eval_on_selector_all(f"#{part} img", "all => all.map(img => img.src)")


class Changes:
    """with Changes(page, "samples"): in the body something changes what that part shows."""

    def __init__(self, page, part):
        self.page, self.part = page, part

    def __enter__(self):
        self.before = pictures(self.page, self.part)

    def __exit__(self, kind, *_):
        if kind is None:
            js = """([part, before]) => {
                const now = [...document.querySelectorAll(`#${part} img`)].map(img => img.src)
                return now.length && String(now) != String(before)
            }"""
            self.page.wait_for_function(js, arg=[self.part, self.before])


def slide(page, label, value):
    """Moves a slider as a hand does, by its keys."""
    slider = page.get_by_role("slider", name=label).locator("visible=true")
    slider.focus()
    slider.press("Home")
    for _ in range(value):
        slider.press("ArrowRight")


def choose(page, part, path):
    page.locator(f"#{part} input[type=file]").first.set_input_files(path)


def test_samples_follow_the_controls(page):
    assert len(pictures(page, "samples")) == 12
    with Changes(page, "samples"):
        slide(page, "Temperature at 1x1", 4)
    with Changes(page, "samples"):
        page.get_by_role("button", name="Another seed").click()
    with Changes(page, "samples"):
        page.get_by_label("Without noise of pixels").locator("visible=true").check()
    with Changes(page, "samples"):
        page.get_by_label("Label").locator("visible=true").click()
        page.get_by_role("option", name="7").click()
    with Changes(page, "variations"):
        page.locator("#samples button").nth(3).click()
    assert page.get_by_label("Chosen picture").input_value() == "3"
    assert len(pictures(page, "variations")) == 12
    with Changes(page, "variations"):
        page.get_by_role("button", name="Draw the rest anew").click()
    with Changes(page, "variations"):
        page.get_by_label("1x1", exact=True).check()


def test_files_are_downloaded(page):
    for i, (name, button) in enumerate([("samples.png", "Save (PNG)"),
                                        ("samples.npz", "Save latents (.npz)")]):  # fmt: skip
        with page.expect_download() as download:
            page.get_by_role("button", name=button).first.click()
        assert download.value.suggested_filename == name, i
        data = open(download.value.path(), "rb").read()
        if name.endswith("png"):
            assert Image.open(io.BytesIO(data)).width >= 8 * 64
        else:
            assert np.load(io.BytesIO(data))["z000"].shape[0] == 12


def test_what_takes_long_is_stopped(page):
    slide(page, "Pictures", 0)
    page.wait_for_function("document.querySelectorAll('#samples img').length == 1")
    before = pictures(page, "samples")
    page.get_by_role("slider", name="Pictures").press("End")  # 64
    page.locator(".progress-level").first.wait_for()  # its layers are being counted
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    page.get_by_text("Stopped.").wait_for()
    assert pictures(page, "samples") == before
    slide(page, "Pictures", 3)
    page.wait_for_function("document.querySelectorAll('#samples img').length == 4")


def test_a_picture_is_uploaded_and_taken_apart(page, explorer):
    page.get_by_role("tab", name="Picture").click()
    with Changes(page, "kept"):
        choose(page, "upload", explorer.folder / "a.png")
    page.get_by_text("bits/dim").first.wait_for()
    page.wait_for_selector("#added img")
    assert len(pictures(page, "added")) == 3 and len(pictures(page, "original")) == 1
    assert page.locator("#bars .gone").count() == 0
    with Changes(page, "kept"):
        slide(page, "Layers kept", 2)
    page.wait_for_function(f"document.querySelectorAll('#bars .gone').length == {LAYERS - 2}")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save kept (PNG)").click()
    assert Image.open(download.value.path()).size == (8, 8)


def test_a_bad_upload_ends_in_a_sentence(page, explorer):
    page.get_by_role("tab", name="Picture").click()
    choose(page, "upload", explorer.folder / "bad.png")
    page.get_by_text("This file cannot be decoded").wait_for()
    page.reload()
    page.wait_for_selector("#samples img")


def test_two_pictures_are_mixed(page, explorer):
    page.get_by_role("tab", name="Mix").click()
    choose(page, "a", explorer.folder / "a.png")
    page.get_by_text("Now choose picture B").wait_for()
    with Changes(page, "way"):
        choose(page, "b", explorer.folder / "b.png")
    assert len(pictures(page, "mixture")) == 1 and len(pictures(page, "way")) == 8
    with Changes(page, "mixture"):
        slide(page, "Layers of A", 0)
    with Changes(page, "mixture"):
        slide(page, "Layers of A", 6)
    with Changes(page, "way"):
        slide(page, "Steps from A to B", 2)
    page.wait_for_function("document.querySelectorAll('#way img').length == 4")
