import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers import tiny

from personafast import ops


@pytest.fixture
def reference_backend():
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def net():
    return tiny.model()


@pytest.fixture
def library(net):
    return tiny.library(net)


@pytest.fixture
def batch():
    """Rows of 7, 4 and 6 tokens: the second padded at the left, the third at the right."""
    ids = torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
