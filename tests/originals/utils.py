"""Stand-in for the original's `utils`, in one process: nothing is reduced, logs write at once.

Its logger neither holds lines back nor makes the folder they go to.
"""

import json
import os
import time
import urllib.request

import numpy as np
import torch


def mpi_size():
    return 1


def mpi_rank():
    return 0


def local_mpi_rank():
    return 0


def num_nodes():
    return 1


def gpus_per_node():
    return 1


class Hyperparams(dict):
    """As in `hps`, from which this module imports nothing."""

    def __getattr__(self, name):
        return self.get(name)

    def __setattr__(self, name, value):
        self[name] = value


def allreduce(x, average):
    """x: the sum of one process's, and its mean."""
    return x


def get_cpu_stats_over_ranks(stat_dict):
    """Means over the processes of a dict of 0-dim tensors or numbers, as floats."""
    values = torch.stack([torch.as_tensor(v).detach().cpu().float() for v in stat_dict.values()])
    return dict(zip(stat_dict, allreduce(values, average=True).tolist(), strict=True))


def logger(log_prefix):
    """log(*args, pprint=False, **kwargs), which prints and appends to log_prefix.txt and .jsonl."""

    def log(*args, pprint=False, **kwargs):
        event = {"time": time.ctime()}
        if args:
            event["message"] = " ".join(map(str, args))
        event.update(kwargs)
        if pprint:
            event = {key: event[key] for key in sorted(event)}
        text = ", ".join(f"{key}: {value}" for key, value in event.items())
        print(text)
        with open(f"{log_prefix}.txt", "a") as file:
            print(text, file=file)
        with open(f"{log_prefix}.jsonl", "a") as file:
            print(json.dumps(event), file=file)

    return log


def maybe_download(path, filename=None):
    """`path`, or for a URL the file that it is fetched to, unless that is there already."""
    if "://" not in path:
        return path
    filename = filename or os.path.basename(path)
    if not os.path.exists(filename):
        urllib.request.urlretrieve(path, filename)
    return filename


def tile_images(images, d1=4, d2=4, border=1):
    """d1 rows of d2 pictures, each uint8 (h, w, c), on white."""
    h, w, c = images[0].shape
    tiled = np.full((d1 * (h + border) + border, d2 * (w + border) + border, c), 255, np.uint8)
    for row in range(d1):
        for column in range(d2):
            y, x = border + row * (h + border), border + column * (w + border)
            tiled[y : y + h, x : x + w] = images[row * d2 + column]
    return tiled
