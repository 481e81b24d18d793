"""AdamW or Apex's FusedAdam: chosen, restored from either's files, warmed up."""

import torch

from errors import UserError, reason_of
from options import setting
from torch_files import read_torch_file, why_not_plain


def linear_warmup(warmup_iters):
    """Factor of the learning rate as a function of the step, from 0: up to 1 in warmup_iters."""

    def factor(step):
        return min(1.0, (step + 1) / warmup_iters) if warmup_iters else 1.0

    return factor


def make_optimizer(parameters, H, use_apex):
    """AdamW: NVIDIA Apex's FusedAdam if asked for and usable, else PyTorch's fused one.

    Returns:
        (optimizer, which one it is and, if Apex was asked for and is not used, why).
    """
    options = dict(lr=H.lr, betas=(H.adam_beta1, H.adam_beta2), eps=1e-8, weight_decay=H.wd)
    parameters = list(parameters)
    reason = ""
    if use_apex:
        try:
            from apex.optimizers import FusedAdam

            optimizer = FusedAdam(parameters, adam_w_mode=True, **options)
            optimizer.register_load_state_dict_post_hook(lay_out_moments)
            return optimizer, "NVIDIA Apex FusedAdam"
        # An unrelated package, an empty folder, a build without CUDA kernels: each of the names
        # `apex` fails in its own way, some only when constructed.
        except Exception as error:
            reason = f" (no usable NVIDIA Apex: {type(error).__name__}: {error})"
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    optimizer.register_load_state_dict_post_hook(lay_out_moments)
    return optimizer, f"torch.optim.AdamW{reason}"


def lay_out_moments(optimizer):
    """Gives an optimizer's moments, just loaded, their parameters' strides.

    Files have contiguous ones. A fused update goes through memory, not through indices: beside
    weights that are channels-last it would be wrong, without a word.
    """
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])


def all_finite(tensors):
    """Whether no number of the tensors is NaN or infinite, for one wait for the device."""
    largest = [t.detach().abs().amax() for t in tensors]
    return bool(torch.stack(largest).isfinite().all())


def applied_updates(optimizer):
    """Updates that an optimizer has applied: its own count, which its files keep.

    That is read once, for on a GPU it makes the CPU wait; `count_update` counts on.
    """
    counted = getattr(optimizer, "applied_updates", None)
    if counted is None:
        in_groups = [group.get("step", 0) for group in optimizer.param_groups]  # Apex
        in_state = [state.get("step", 0) for state in list(optimizer.state.values())[:1]]
        counted = max(map(int, in_groups + in_state), default=0)
    return counted


def count_update(optimizer):
    """Counts an update that an optimizer has just applied, and returns their number.

    An optimizer of a program's own may keep no count: it is counted from 0.
    """
    counted = getattr(optimizer, "applied_updates", None)
    counted = applied_updates(optimizer) or 1 if counted is None else counted + 1
    optimizer.applied_updates = counted
    return counted


def ema_rate_after(updates, H):
    """The rate of an EMA at the update that makes `updates`: H.ema_rate, with its warm-up or not.

    min(rate, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage: without it the first
    1 / (1 - rate) updates leave the EMA mostly initial weights. `updates` may be a 0-dim tensor.
    """
    if not setting(H, "ema_warmup"):
        return H.ema_rate
    if torch.is_tensor(updates):
        updates = updates.double()
        return ((1 + updates) / (10 + updates)).clamp(max=H.ema_rate)
    return min(H.ema_rate, (1 + updates) / (10 + updates))


# Tensors of an average that are moved together where the weight is one: each needs a copy as large.
TOGETHER = 128


@torch.no_grad()
def move_towards(averages, parameters, weight):
    """Moves each of a list of tensors by weight · (parameter − average), in place.

    weight: a number, or a 0-dim tensor, which nothing waits for.
    """
    if not torch.is_tensor(weight):
        torch._foreach_lerp_(averages, parameters, weight)
        return
    for start in range(0, len(averages), TOGETHER):
        part = averages[start : start + TOGETHER]
        change = torch._foreach_sub(parameters[start : start + TOGETHER], part)
        torch._foreach_mul_(change, weight.float())
        torch._foreach_add_(part, change)


def convert_optimizer_state(state, parameters, per_parameter_step):
    """The state part of an optimizer file, of Apex's or AdamW's layout, for either optimizer.

    Args:
        state: a file's content. Apex keeps one `step` in the group, AdamW one per parameter.
        parameters: the model's, in the order of the file's positions.
        per_parameter_step: the layout wanted.

    Returns:
        ({position: {exp_avg, exp_avg_sq} and, as asked, step, float32 0-dim}, applied updates).

    Raises:
        ValueError: for content of another layout, or moments of other shapes.
    """
    if isinstance(state, dict) and "param_groups" not in state:
        if any(map(torch.is_tensor, state.values())):
            raise ValueError("it holds weights, which --restore_path and --restore_ema_path take")
    [group] = state["param_groups"]
    parameters = list(parameters)
    if len(group["params"]) != len(parameters):
        raise ValueError(f"it is for {len(group['params'])} parameters, not {len(parameters)}")
    converted, step = {}, int(group.get("step", 0))
    for position, (key, p) in enumerate(zip(group["params"], parameters, strict=True)):
        if key not in state["state"]:  # no update was ever applied
            continue
        entry = state["state"][key]
        step = int(entry.get("step", step))
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        moments = {}
        for name in ("exp_avg", "exp_avg_sq"):
            if reason := why_not_plain(entry[name]):
                raise ValueError(f"{name} {position} is {reason}")
            moment = moments[name] = entry[name].float().clone()
            if moment.shape != p.shape:
                raise ValueError(
                    f"{name} {position} is {tuple(moment.shape)}, the parameter {tuple(p.shape)}"
                )
            if not moment.isfinite().all():
                raise ValueError(f"{name} {position} is not finite")
            if name == "exp_avg_sq" and (moment < 0).any():
                raise ValueError(f"{name} {position} is below 0, and it is a mean of squares")
        # In AdamW's own order, so that a resumed run writes the same file.
        own = {"step": torch.tensor(float(step))} if per_parameter_step else {}
        converted[position] = own | moments
    return converted, step


def restore_optimizer(optimizer, path):
    """Loads an opt.th, of ours or released; learning rate, betas and decay stay the run's.

    Raises:
        UserError: for a file that can't be read or belongs to another model.
    """
    content = read_torch_file(path)
    [group] = optimizer.param_groups
    apex = not isinstance(optimizer, torch.optim.AdamW)
    try:
        state, step = convert_optimizer_state(content, group["params"], not apex)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(
            f"{path} holds no optimizer state for this model ({reason_of(error)}): name the opt.th "
            f"that was saved with the weights"
        ) from None
    own = optimizer.state_dict()["param_groups"][0]
    if apex:
        own |= {"step": step, "bias_correction": True}
    optimizer.load_state_dict({"state": state, "param_groups": [own]})
