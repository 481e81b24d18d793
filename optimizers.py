"""AdamW or Apex's FusedAdam: chosen, restored from either's files, warmed up."""

import torch

from errors import UserError
from weights import read_torch_file


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

            return FusedAdam(parameters, adam_w_mode=True, **options), "NVIDIA Apex FusedAdam"
        # An unrelated package, an empty folder, a build without CUDA kernels: each of the names
        # `apex` fails in its own way, some only when constructed.
        except Exception as error:
            reason = f" (no usable NVIDIA Apex: {type(error).__name__}: {error})"
    return torch.optim.AdamW(parameters, fused=True, **options), f"torch.optim.AdamW{reason}"


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
        moments = {name: entry[name].float().clone() for name in ("exp_avg", "exp_avg_sq")}
        for name, moment in moments.items():
            if moment.shape != p.shape:
                raise ValueError(
                    f"{name} {position} is {tuple(moment.shape)}, the parameter {tuple(p.shape)}"
                )
            if not moment.isfinite().all():
                raise ValueError(f"{name} {position} is not finite")
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
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} holds no optimizer state for this model ({error}): name the opt.th that was "
            f"saved with the weights"
        ) from None
    own = optimizer.state_dict()["param_groups"][0]
    if apex:
        own |= {"step": step, "bias_correction": True}
    optimizer.load_state_dict({"state": state, "param_groups": [own]})
