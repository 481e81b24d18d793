"""Passes through a network that somebody watches: how far they are, whether to stop, what z was.

The layers themselves tell, by hooks that stand where they cost nothing: before each block of the
encoder, before each z enters the decoder's state. So the passes are the library's own, whichever
function makes them, and stop between two layers. What is watched is the calling thread's business
alone (context variables): passes elsewhere in the process go on unwatched.
"""

import contextlib
import contextvars
import threading

_watch = contextvars.ContextVar("the Watch over the passes in work", default=None)
_noted = contextvars.ContextVar("the list that each z is appended to", default=None)


class Stopped(Exception):
    """A pass was stopped between two layers."""


class Watch:
    """What is known of some passes: layers done of those to come, and whether they are to stop.

    Args:
        tell: called before each layer with the number of layers done.
    """

    def __init__(self, tell=None):
        self.done, self.tell = 0, tell
        self._stop = threading.Event()

    def stop(self):
        """Has the passes raise Stopped before their next layer; from any thread."""
        self._stop.set()

    def layer(self):
        if self._stop.is_set():
            raise Stopped
        if self.tell:
            self.tell(self.done)
        self.done += 1


@contextlib.contextmanager
def _being(variable, value):
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def watching(watch):
    """The context in which `watch` is told of each layer."""
    return _being(_watch, watch)


def noting():
    """The context whose value is a list of the z, (N, Z, R, R), of the passes in its body."""
    return _being(_noted, [])


def _before_encoder_block(module, args):
    if watch := _watch.get():
        watch.layer()


def _before_z(module, args):
    if watch := _watch.get():
        watch.layer()
    if (noted := _noted.get()) is not None:
        noted += args  # z (N, Z, R, R)


def watched(model):
    """The VAE itself, whose passes can be watched from now on (call it once)."""
    for block in model.encoder.enc_blocks:
        block.register_forward_pre_hook(_before_encoder_block)
    for block in model.decoder.dec_blocks:
        block.z_proj.register_forward_pre_hook(_before_z)
    return model


def layers_of(model):
    """(layers of a pass that encodes, of one that decodes alone), as a Watch counts them."""
    decoder = len(model.decoder.dec_blocks)
    return len(model.encoder.enc_blocks) + decoder, decoder
