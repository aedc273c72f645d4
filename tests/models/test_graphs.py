"""Recording and replaying without a GPU: what would go wrong in a CUDA graph goes wrong on the tape."""

import pytest
import torch

from personafast import ops
from personafast.models.graphs import CudaGraph, GraphError, Tape, recorder


def test_a_replay_works_on_what_the_inputs_hold_now():
    x, weight = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tape = Tape(lambda: (x @ weight).relu() + 1, {"x": x})
    address = tape.output.data_ptr()
    x.copy_(torch.tensor([-1.0, 1.0]))
    assert torch.equal(tape.replay(), torch.tensor([3.0, 3.0]))
    x.copy_(torch.tensor([0.0, 1.0]))
    assert torch.equal(tape.replay(), torch.tensor([4.0, 5.0])) and tape.output.data_ptr() == address


def test_recording_leaves_the_inputs_alone_and_a_replay_changes_them():
    count = torch.zeros(3)
    tape = Tape(lambda: count.add_(1) * 2, {"count": count})
    assert count.tolist() == [0, 0, 0]
    tape.replay()
    assert torch.equal(tape.replay(), torch.full((3,), 4.0)) and count.tolist() == [2, 2, 2]


def test_views_and_results_of_results_are_followed():
    x = torch.arange(6.0).view(2, 3)
    hold = torch.zeros(3, 2)

    def work():
        turned = x.t()
        hold[1:] = turned[1:]
        return hold.flatten()[2:] + turned.sum()

    tape = Tape(work, {"x": x, "hold": hold})
    x.mul_(2)
    assert torch.equal(tape.replay(), torch.tensor([2.0, 8.0, 4.0, 10.0]) + 30)


def test_our_operators_are_recorded_too():
    hidden, bank = torch.zeros(2, 4), torch.ones(3, 4)
    slots = torch.tensor([0, -1], dtype=torch.int32)
    tape = Tape(lambda: ops.inject_(hidden, bank, slots) + 0, {"hidden": hidden, "slots": slots})
    slots.copy_(torch.tensor([-1, 2]))
    assert torch.equal(tape.replay(), torch.tensor([[0.0], [1.0]]).expand(2, 4))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * 2 if bool((x > 0).any()) else x,
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor(x.tolist()),
        lambda x: x * torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_python_may_not_read_a_value(read):
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(GraphError, match="reads a tensor's value while a graph is captured"):
        Tape(lambda: read(x), {"x": x})


def test_an_input_that_moves_is_noticed():
    x = torch.ones(2)
    tape = Tape(lambda: x * 2, {"x": x})
    x.data = torch.ones(2)
    with pytest.raises(GraphError, match="`x` has moved since it was recorded; update it in place"):
        tape.replay()


def test_an_input_that_is_rebound_is_not_seen():
    """As in a CUDA graph: the recording knows the tensor that was there."""
    hold = {"x": torch.ones(2)}
    tape = Tape(lambda: hold["x"] * 2, {"x": hold["x"]})
    hold["x"] = torch.full((2,), 5.0)
    assert torch.equal(tape.replay(), torch.full((2,), 2.0))


def test_cuda_captures_after_warming_up_on_a_stream_of_its_own(monkeypatch):
    happened = []

    class Stream:
        def wait_stream(self, other):
            happened.append("wait")

        def __enter__(self):
            happened.append("enter")

        def __exit__(self, *_):
            happened.append("leave")

    class Graph:
        def replay(self):
            happened.append("replay")

    class Capture:
        def __init__(self, graph, pool):
            happened.append(pool)

        def __enter__(self):
            happened.append("capture")

        def __exit__(self, *_):
            happened.append("captured")

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    x = torch.ones(2)

    def work():
        happened.append("work")
        return x.add_(1)

    recorded = CudaGraph(work, {"x": x}, "pool")
    assert happened == ["wait", "enter", "work", "work", "leave", "wait", "pool", "capture", "work", "captured"]
    assert recorded.replay() is recorded.output and happened[-1] == "replay"

    def broken():
        if "captured" in happened and happened[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x

    with pytest.raises(GraphError, match="cannot be captured: operation not permitted when stream is capturing$"):
        CudaGraph(broken, {"x": x})


def test_the_device_says_what_records():
    assert recorder(torch.device("cpu")) is Tape and recorder(torch.device("cuda")) is CudaGraph
