"""The strings that define a network: its blocks, its widths."""

import re

from errors import UserError


def tokens(s):
    """The tokens of a block string: (token, resolution, kind, number), kind one of x, m, d, None.

    Raises:
        UserError: quoting the token that is none of RxK, RmS, RdK and R.
    """
    for token in s.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:(x)(\d+)|([md])([1-9]\d*))?", token.strip(), re.ASCII)
        if not match:
            raise UserError(
                f"block string token {token!r} is not RxK, RmS, RdK or R with whole numbers, "
                f"such as 32x11, 8m4 or 32d2; it stands in {s!r}"
            )
        resolution, *kind_and_number = (group for group in match.groups() if group)
        kind, number = kind_and_number or (None, None)
        yield token.strip(), int(resolution), kind, number and int(number)


def parse_layer_string(s):
    """A block string as a list of (resolution, None | resolution mixed in | pooling rate).

    Raises:
        UserError: quoting the token that is none of RxK, RmS, RdK and R.
    """
    layers = []
    for _, resolution, kind, number in tokens(s):
        if kind == "x":
            layers += [(resolution, None)] * number
        else:
            layers.append((resolution, number))
    return layers


def decoder_layers(s):
    """dec_blocks as a list of (resolution, None or the resolution mixed in); RdK is R."""
    return [
        (resolution, number if kind == "m" else None)
        for _, resolution, kind, number in tokens(s)
        for _ in range(number if kind == "x" else 1)
    ]


class _Widths(dict):
    """Resolution → width, with a default for resolutions not named."""

    def __init__(self, default, named):
        super().__init__(named)
        self.default = default

    def __missing__(self, resolution):
        return self.default

    def __reduce__(self):
        return _Widths, (self.default, dict(self))


def get_width_settings(width, s):
    """Mapping resolution → width: those that s ("R:width,R:width", or None) names, else `width`.

    Raises:
        UserError: quoting the pair that is not R:width.
    """
    named = {}
    for pair in s.split(",") if s else ():
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pair.strip(), re.ASCII)
        if not match:
            raise UserError(
                f"custom_width_str {s!r}: {pair!r} is not R:width with whole numbers of at least "
                f"1, such as 512:32"
            )
        named[int(match[1])] = int(match[2])
    return _Widths(width, named)


def check_blocks(H):
    """Holds the block strings against the image size and each other, before anything is built.

    Raises:
        UserError: quoting the option, the token and the rule.
    """
    widths = get_width_settings(H.width, H.custom_width_str)
    for option in ("enc_blocks", "dec_blocks"):
        if not getattr(H, option):
            raise UserError(f"{option} is {getattr(H, option)!r}: a block string is needed")
    if widths[H.image_size] != H.width:
        raise UserError(
            f"custom_width_str {H.custom_width_str!r} gives image_size {H.image_size} the width "
            f"{widths[H.image_size]}: there it must be --width, {H.width}"
        )

    encoded, size = {H.image_size}, H.image_size
    for token, resolution, kind, number in tokens(H.enc_blocks):
        where = f"enc_blocks token {token!r}"
        if kind == "m":
            raise UserError(f"{where}: RmS belongs in dec_blocks; the encoder takes RxK and RdK")
        if resolution != size:
            raise UserError(f"{where}: the resolution there is {size} (image_size {H.image_size})")
        if kind == "d":
            if size % number:
                raise UserError(f"{where}: {size} pixels can't be pooled by {number}")
            size //= number
        if widths[resolution] > widths[size]:
            raise UserError(
                f"{where}: width {widths[resolution]} at {resolution} does not fit width "
                f"{widths[size]} at {size}; widths grow as resolutions shrink"
            )
        encoded.add(size)
    decoded = set()
    biased = {r for r, _ in parse_layer_string(H.dec_blocks) if r <= H.no_bias_above}
    for token, resolution, kind, number in tokens(H.dec_blocks):
        where = f"dec_blocks token {token!r}"
        if kind == "x" and not number:
            continue
        if resolution not in encoded:
            raise UserError(f"{where}: the encoder has no activations at {resolution}")
        if kind == "m":
            if number not in decoded | biased:
                raise UserError(f"{where}: no state of resolution {number} exists before it")
            if resolution % number:
                raise UserError(f"{where}: {resolution} is no multiple of {number}")
            if widths[number] < widths[resolution]:
                raise UserError(
                    f"{where}: width {widths[number]} at {number} is below width "
                    f"{widths[resolution]} at {resolution}; widths grow as resolutions shrink"
                )
        decoded.add(resolution)
    if H.image_size not in decoded:
        raise UserError(f"dec_blocks {H.dec_blocks!r} never reach image_size {H.image_size}")
