"""docs/tour.ipynb: a notebook that trains, then uses the model, as it stands."""

import os
import runpy
import sys

import IPython.display
import nbformat
from fakes import RGB_RUN, write_digits_run
from nbclient import NotebookClient
from runs import ENV, ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


def pictures(notebook):
    """How many pictures the outputs of a notebook hold; none of them is of an error."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_given_weights_are_toured(tmp_path, monkeypatch, capsys):
    """Without a training, in this process: of coloured digits, and of what is no data set's."""
    cells = nbformat.read(TOUR, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    (tmp_path / "tour.py").write_text(code)
    monkeypatch.chdir(TOUR.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    shown = []
    monkeypatch.setattr(IPython.display, "display_png", shown.append)
    own = write_digits_run(tmp_path / "run")
    for folder in (RGB_RUN, own):
        monkeypatch.setenv("WEIGHTS", str(folder / "latest-model-ema.th"))
        runpy.run_path(str(tmp_path / "tour.py"))
        said = capsys.readouterr().out
        assert "equal again: True" in said and "bits/dim in the mean" in said
    assert len(shown) == 2 * 6 and all(image.width > 128 for image in shown)


def test_the_tour_goes_through(tmp_path, monkeypatch):
    kept = nbformat.read(TOUR, as_version=4)
    assert pictures(kept) == 6 and os.path.getsize(TOUR) <= 500_000
    for name, value in (ENV | {"RUNS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WEIGHTS", raising=False)
    place = {"metadata": {"path": str(TOUR.parent)}}
    made = NotebookClient(kept, timeout=600, kernel_name="python3", resources=place).execute()
    assert pictures(made) == 6
    nbformat.write(made, tmp_path / "made.ipynb")
    assert os.path.getsize(tmp_path / "made.ipynb") <= 500_000
