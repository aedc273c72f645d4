"""Cases small enough for tests."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Absent, Case, Contender, nbytes


def traffic(inputs):
    return nbytes(inputs.x, inputs.weight)


def plain(inputs):
    return F.linear(inputs.x, inputs.weight)


def make(draw):
    return SimpleNamespace(x=draw.normal(3, 64), weight=draw.normal(16, 64))


def never(inputs):
    raise Absent("its library is not installed")


def case(ours=plain, *baselines, **options):
    """A linear of 16 x 64 whose operator is `ours`."""
    mine = Contender("ours", ours, traffic, resident=lambda inputs: nbytes(inputs.weight))
    first = Contender("F.linear", plain, traffic, resident=lambda inputs: 2 * nbytes(inputs.weight), goal=0.01)
    settings = {
        "name": "small",
        "operator": "masked_linear",
        "shape": {"T": 3},
        "make": make,
        "plain": plain,
        **options,
    }
    return Case(ours=mine, baselines=(first, *baselines), **settings)


def integers(ours):
    """A case whose result is made of whole numbers and infinities."""

    def right(inputs):
        return inputs.x.argmax(1), torch.where(inputs.x > 0, inputs.x, -torch.inf)

    return case(ours, plain=right)
