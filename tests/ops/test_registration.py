import pytest
import torch

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _backend


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    kept = normal(2 * 6, 40) > 0
    return {
        "inject_": (normal(5, 7), normal(3, 7), int32(0, -1, 2, 1, 0), normal(5)),
        "pack_mask": (kept,),
        "unpack_mask": (ops.pack_mask(kept), 40),
        "masked_linear": (
            normal(3, 40),
            normal(6, 40),
            ops.pack_mask(kept).view(2, 6, 2),
            int32(0, -1, 1),
            normal(2),
            normal(6),
        ),
        "lora_delta_": (
            normal(5, 6),
            normal(5, 7),
            normal(2, 3, 7),
            normal(2, 6, 3),
            int32(0, -1, 1, 1, 0),
            normal(2),
            int32(3, 2),
        ),
        "chunk_scores": (normal(2, 4), normal(3, 2, 4), normal(2, 3).abs(), normal(2, 3), int32(0, 2), torch.ones(2)),
        "chunk_accept": (normal(2, 4), normal(2, 4), normal(2, 4), int32(4, 2)),
        "chunk_scores_accept": (
            normal(2, 4),
            normal(3, 2, 4),
            normal(2, 3).abs(),
            None,
            int32(0, 2),
            torch.ones(2),
            normal(2, 4),
            normal(2, 4),
            int32(4, 2),
        ),
        "aggregate_logits": (
            normal(2, 9),
            normal(3, 2, 9),
            normal(2, 3).abs(),
            normal(2, 3),
            int32(1, 3),
            torch.ones(2),
            torch.tensor([0.0, 0.1]),
        ),
        "compress": (normal(6, 40), ops.pack_mask(kept)[:6]),
        "sparse_linear": (normal(3, 40), *ops.compress(normal(6, 40), ops.pack_mask(kept)[:6]), normal(6)),
        "steer_": (
            normal(5, 7),
            normal(4, 7),
            int32(0, -1, 2, 1, 3),
            torch.arange(4, dtype=torch.int8),
            normal(4, 2).sort(1).values,
            normal(5),
        ),
        "add_inject_rms_norm": (
            normal(5, 7),
            normal(5, 7),
            normal(3, 7),
            int32(0, -1, 2, 1, 0),
            normal(5),
            normal(7),
            1e-6,
        ),
        "token_logprobs": (normal(4, 8), normal(9, 8), torch.arange(4), normal(4).abs() + 0.5, normal(9), 0.5, 9.0),
        "verify_draft": (
            normal(2, 4, 9).log_softmax(-1),
            normal(2, 3, 9).log_softmax(-1),
            torch.tensor([[1, 2, 3], [4, 5, -1]]),
            int32(3, 2),
            torch.tensor([5, 6]),
            torch.tensor([0, 7]),
            True,
        ),
    }


ARGUMENTS = arguments()


def fresh(name):
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in ARGUMENTS[name])


def test_every_operator_is_here():
    assert set(ARGUMENTS) == set(_backend.KERNELS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, backend):
    with ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.personafast, name).default, fresh(name))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_compiles_into_one_graph(name):
    operator = getattr(ops, name)

    def program(*args):
        doubled = [2 * args[0] if args[0].is_floating_point() else args[0], *args[1:]]
        result = operator(*doubled)
        return tuple(part + 0 for part in result) if isinstance(result, tuple) else result + 0

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*fresh(name)), program(*fresh(name)), equal_nan=True)


@pytest.mark.slow
def test_in_place_operators_survive_the_default_compiler():
    def program(hidden, bank, slots):
        hidden = hidden * 2
        ops.inject_(hidden, bank, slots)
        return hidden + 1

    torch._dynamo.reset()
    args = fresh("inject_")[:3]
    torch.testing.assert_close(torch.compile(program, fullgraph=True)(*args), program(*args))


def test_compiled_code_refuses_gradients_too():
    hidden, bank, slots, _ = fresh("inject_")
    bank.requires_grad_()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no gradient"):
        torch.compile(lambda h: ops.inject_(h * 2, bank, slots), fullgraph=True, backend="aot_eager")(hidden)


def test_fakes_check_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(PersonafastError, match="`bank` has shape"):
        ops.inject_(torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(2, dtype=torch.int32))
