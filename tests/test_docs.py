"""The pages: their links and tables, and what they do with a trained model, in their order."""

import json
import re
import shlex
import sys

import imageio.v3 as imageio
import pytest
import torch
from golden import weight
from pages import FIRST, PAGES, README, REPO, blocks, commands, is_use, prose
from runs import environment, free_port, python, run_until
from test_plot import steps, write_log

from hps import get_hparams
from vae import VAE

# ---- commands and examples -----------------------------------------------------------------


def test_the_first_block_is_what_all_others_stand_on():
    assert commands(README)[:3] == FIRST
    for page, text in PAGES.items():
        assert page == "README.md" or "[README's first block](../README.md)" in text, page


def uses(text):
    """What a page does with a trained model: its bash commands and its Python examples."""
    for kind, block in blocks(text):
        if kind == "python":
            yield kind, block
        elif kind == "bash":
            yield from ((kind, line) for line in commands(f"```bash\n{block}```") if is_use(line))


@pytest.fixture
def folder(tmp_path):
    """What the first block leaves: saved_models/digits with weights and a log, and no more."""
    run = tmp_path / "saved_models" / "digits"
    run.mkdir(parents=True)
    H = get_hparams("digits") | {"label_counts": [100] * 10 + [0]}
    state = {k: weight(k, v.shape) for k, v in VAE(get_hparams("digits")).state_dict().items()}
    torch.save(state, run / "latest-model-ema.th")
    (run / "latest-state.json").write_text(json.dumps({"hparams": H}))
    write_log(run / "log.jsonl", steps(range(100, 2000, 100)))
    return tmp_path


def outputs(folder):
    """{path: time} of what lies in a folder, the runs aside."""
    return {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "saved_models"}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if any(uses(text))])
def test_a_page_works_in_its_order(page, folder):
    """Each of its uses finds what those before it have made, and replaces nothing of it."""
    for kind, text in uses(PAGES[page]):
        before = outputs(folder)
        done = python(["-c", text], folder) if kind == "python" else run_use(text, folder)
        if done is None:
            continue
        assert done.returncode == 0 and done.stderr == "", f"{text}\n{done.stderr}"
        if "train.py" in text:
            expected = "type: test_loss" if "--test_eval" in text else "memory    about"
            assert expected in done.stdout
            assert "--test_eval" not in text or "iw_bits_per_dim: " in done.stdout
            continue
        after = outputs(folder)
        [made] = after.keys() - before.keys()
        assert before.items() <= after.items(), text
        if kind == "python":
            assert [made.name] == re.findall(r'\.save\("(.*?)"\)', text)
        else:
            assert done.stdout.startswith(f"{made.name}: ")
        if made.is_dir():
            n = int(re.search(r"--n (\d+)", text)[1])
            assert sorted(made.glob("*.png")) == [made / f"{i:06}.png" for i in range(n)]
            made = made / "000000.png"
        if made.suffix == ".png":
            assert imageio.imread(made).std() > 10


def run_use(command, folder):
    """The finished command, with fewer samples, or None for what is ended: a training, a page."""
    command = re.sub(r"--n \d{3,}", "--n 20", command)
    words = shlex.split(re.sub(r"--iw_samples \d+", "--iw_samples 2", command))
    words = [str(REPO / words[1]), *words[2:]]
    command = [sys.executable, *words]
    if "--tensorboard" in words or "--init_from" in words:
        run_until(command, environment(), folder, "type: train_loss")
        return None
    if "explore.py" in words[0]:
        command += ["--port", str(free_port())]
        run_until(command, environment(), folder, "explore.py: http:")
        return None
    return python(words, folder)


# ---- pages ---------------------------------------------------------------------------------


def anchors(text):
    """The names under which a page's headings can be linked to."""
    headings = [line.lstrip("# ") for line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((.*?)\)", "\n".join(prose(PAGES[page]))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ((REPO / page).parent / name).resolve() if name else REPO / page
        assert path.is_file() and path.is_relative_to(REPO), f"{target} in {page}"
        linked = PAGES.get(path.relative_to(REPO).as_posix(), "")
        assert not anchor or anchor in anchors(linked), f"{target} in {page}"


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_tables_have_all_cells(page):
    rows = []
    for line in [*prose(PAGES[page]), ""]:
        if line.startswith("|"):
            rows.append((len(re.findall(r"(?<!\\)\|", line)), line))
        elif rows:
            assert len(rows) > 2 and re.fullmatch(r"\|(---\|)+", rows[1][1]), rows[0]
            assert all(n == rows[0][0] and line.endswith("|") for n, line in rows), rows
            rows = []


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_in_lines_of_100_characters(page):
    assert not [line for line in prose(PAGES[page]) if len(line) > 100 and line[0] != "|"]


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 240
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_the_map_names_every_file():
    [files] = [block for kind, block in blocks(README) if not kind]
    names = [line.split()[0] for line in files.splitlines() if line]
    assert len(names) == len(set(names)), "a file stands twice"
    for path in REPO.glob("*.py"):
        assert path.name in names, path.name


def test_every_test_that_a_page_names_is_there():
    named = {name for text in PAGES.values() for name in re.findall(r"tests/\w+\.py", text)}
    assert named and all((REPO / name).exists() for name in named), named
