"""Models whose weights accelerate has put elsewhere."""

import pytest
from helpers import tiny

HOW = ["one device", "cpu offload", "some on disk", "all on disk"]


def placed(net, how, folder):
    accelerate = pytest.importorskip("accelerate")
    if how == "one device":
        return accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    if how == "cpu offload":
        return accelerate.cpu_offload(net, execution_device="cpu")
    if how == "some on disk":
        parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        parts |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(tiny.BLOCKS)}
        return accelerate.dispatch_model(net, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return accelerate.disk_offload(net, str(folder), execution_device="cpu")
