"""AdamW and Apex: which is chosen, the files of both, the warm-up."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from golden import inputs, model

import train
from errors import UserError
from hps import Hyperparams
from optimizers import convert_optimizer_state, linear_warmup, make_optimizer, restore_optimizer
from train_helpers import load_opt, save_model


def test_warm_up_starts_at_one_step_and_ends_at_one():
    assert [linear_warmup(4.0)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_warmup(0)(0) == 1


def test_the_warm_up_is_a_pure_function_of_the_step():
    factor = linear_warmup(100)
    assert [factor(s) for s in (0, 49, 99, 10**6)] == [0.01, 0.5, 1, 1] and math.isfinite(factor(0))


# ---- files -----------------------------------------------------------------------------------


def _trained(steps=3):
    H, vae = model("tiny")
    H.update(lr=2e-4, adam_beta1=0.9, adam_beta2=0.9, wd=0.01, ema_rate=0.99, warmup_iters=100)
    H.update(grad_clip=200.0, skip_threshold=400.0, device="cpu", local_rank=0, mpi_size=1)
    ema = copy.deepcopy(vae)
    optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
    for i in range(steps):
        torch.manual_seed(i)
        train.training_step(H, *inputs(H, 3, i), vae, ema, optimizer, i)
    return H, vae, ema, optimizer


def _apex_layout(optimizer):
    """What Apex's FusedAdam would have saved in the place of this AdamW."""
    content = copy.deepcopy(optimizer.state_dict())
    [group] = content["param_groups"]
    [step] = {int(entry.pop("step")) for entry in content["state"].values()}
    names = ("lr", "betas", "eps", "weight_decay", "params")
    apex = {name: group[name] for name in names}
    apex |= {"bias_correction": True, "initial_lr": group["lr"], "step": step}
    return {"state": content["state"], "param_groups": [apex]}


@pytest.mark.parametrize("layout", ["AdamW", "Apex", "Apex, legacy file"])
def test_training_goes_on_exactly_from_a_restored_optimizer(layout, tmp_path):
    H, vae, ema, optimizer = _trained()
    H.restore_optimizer_path = str(tmp_path / "opt.th")
    content = optimizer.state_dict() if layout == "AdamW" else _apex_layout(optimizer)
    torch.save(
        content, H.restore_optimizer_path, _use_new_zipfile_serialization="legacy" not in layout
    )
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"type": "train_loss", "step": 3, "epoch": 7}) + "\n")
    H.restore_log_path = str(log)
    other, other_ema = copy.deepcopy(vae), copy.deepcopy(ema)
    restored, scheduler, best, iterate, epoch = load_opt(H, other, print)
    assert (best, iterate, epoch) == (math.inf, 3, 7)
    assert scheduler.get_last_lr() == [pytest.approx(2e-4 * 4 / 100)]  # no second warm-up
    assert restored.param_groups[0]["fused"]
    restored.param_groups[0]["lr"] = 2e-4
    for v, e, o in ((vae, ema, optimizer), (other, other_ema, restored)):
        torch.manual_seed(9)
        train.training_step(H, *inputs(H, 3, 9), v, e, o, 3)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True))


def test_conversion_there_and_back():
    _, vae, _, optimizer = _trained(2)
    apex = _apex_layout(optimizer)
    there, step = convert_optimizer_state(apex, vae.parameters(), per_parameter_step=True)
    assert step == 2
    for position, entry in optimizer.state_dict()["state"].items():
        for name, t in entry.items():
            assert torch.equal(there[position][name], t)
            assert there[position][name].dtype == torch.float32
            assert there[position][name] is not t
    back, step = convert_optimizer_state(
        optimizer.state_dict(), vae.parameters(), per_parameter_step=False
    )
    assert step == 2 and back[0].keys() == {"exp_avg", "exp_avg_sq"}


def test_an_optimizer_file_of_another_model_is_refused(tmp_path):
    _, vae, _, optimizer = _trained(1)
    path = tmp_path / "opt.th"
    torch.save(optimizer.state_dict(), path)
    _, other = model("tiny_res2")
    other_optimizer, _ = make_optimizer(
        other.parameters(), Hyperparams(lr=1, adam_beta1=0.9, adam_beta2=0.9, wd=0), False
    )
    with pytest.raises(UserError, match="parameters"):
        restore_optimizer(other_optimizer, str(path))


# ---- Apex ------------------------------------------------------------------------------------


APEX_PACKAGES = {
    "absent": None,
    "an empty folder": {},
    "unrelated": {"__init__.py": "raise ImportError('cannot import UnencryptedCookieSession')"},
    "Python-only": {
        "__init__.py": "",
        "optimizers.py": "class FusedAdam:\n"
        "    def __init__(self, *a, **k): raise RuntimeError('apex.optimizers needs cuda')",
    },
}


def _forget_apex(monkeypatch):
    """Whatever an earlier test imported under that name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("kind", APEX_PACKAGES)
def test_an_unusable_apex_falls_back_to_adamw_and_says_why(kind, tmp_path, monkeypatch):
    files = APEX_PACKAGES[kind]
    _forget_apex(monkeypatch)
    if files is not None:
        (tmp_path / "apex").mkdir()
        for name, text in files.items():
            (tmp_path / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    _, vae = model("tiny")
    H = Hyperparams(lr=1e-3, adam_beta1=0.9, adam_beta2=0.8, wd=0.5)
    optimizer, name = make_optimizer(vae.parameters(), H, use_apex=True)
    assert isinstance(optimizer, torch.optim.AdamW) and "no usable NVIDIA Apex" in name


def test_a_usable_apex_is_taken(tmp_path, monkeypatch):
    _forget_apex(monkeypatch)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text(
        "import torch\n"
        "class FusedAdam(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):\n"
        "        assert adam_w_mode and eps == 1e-8 and betas == (0.9, 0.8)\n"
        "        super().__init__(params, lr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, vae = model("tiny")
    H = Hyperparams(lr=1e-3, adam_beta1=0.9, adam_beta2=0.8, wd=0.5)
    assert make_optimizer(vae.parameters(), H, use_apex=True)[1] == "NVIDIA Apex FusedAdam"
    assert make_optimizer(vae.parameters(), H, use_apex=False)[1] == "torch.optim.AdamW"


# ---- layout ----------------------------------------------------------------------------------


def test_moments_take_the_layout_of_channels_last_weights(tmp_path):
    """A step from a file's contiguous moments is that of a model of contiguous weights."""
    H, vae, ema, optimizer = _trained()
    save_model(str(tmp_path / "iter-1"), vae, ema, optimizer, Hyperparams(H, save_dir=tmp_path))
    updated = []
    for layout in (torch.contiguous_format, torch.channels_last):
        other, other_ema = (copy.deepcopy(m).to(memory_format=layout) for m in (vae, ema))
        restored, _ = make_optimizer(other.parameters(), H, use_apex=False)
        restore_optimizer(restored, tmp_path / "iter-1-opt.th")
        for p, state in restored.state.items():
            assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == p.stride()
        torch.manual_seed(9)
        for p in other.parameters():  # alike for both, but for the layout
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
        restored.step()
        updated.append([p.detach().contiguous() for p in other.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*updated, strict=True))
    strides = [p.stride() for p in other.parameters()]
    assert strides != [p.stride() for p in vae.parameters()]


def test_files_are_contiguous_whatever_the_layout_in_memory(tmp_path):
    """The same names, numbers and strides, in the same order; what trains stays as it is."""
    contents = []
    for layout in (torch.contiguous_format, torch.channels_last):
        H, vae, ema, optimizer = _trained(0)
        vae, ema = (m.to(memory_format=layout) for m in (vae, ema))
        optimizer, _ = make_optimizer(vae.parameters(), H, use_apex=False)
        for p in vae.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        stem = str(tmp_path / "iter-1")
        save_model(stem, vae, ema, optimizer, Hyperparams(H, save_dir=tmp_path))
        assert vae.encoder.enc_blocks[0].c2.weight.is_contiguous(memory_format=layout)
        moment = optimizer.state[vae.encoder.enc_blocks[0].c2.weight]["exp_avg"]
        assert moment.is_contiguous(memory_format=layout)
        names = ("model.th", "model-ema.th", "opt.th")
        contents.append([Path(f"{stem}-{name}").read_bytes() for name in names])
    assert contents[0] == contents[1]
