import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.density.draws import Stream, choose
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _verify_draft, philox

INF = math.inf
FORMS = {
    "kernel": ops.verify_draft,
    "vectorised": _verify_draft._vectorised,
    "reference": _verify_draft.reference,
}


@pytest.fixture(params=FORMS)
def verify(request):
    if request.param != "kernel":
        yield FORMS[request.param]
        return
    pytest.importorskip("personafast._C")
    with ops.use_backend("cpu"):
        yield ops.verify_draft


def make(B, k, V, seed, *, dtype=torch.float32, holes=False, deterministic=False, near=1.0, pad=0):
    """Target, draft, tokens of the draft, lengths, seeds, positions; `pad` columns lie between rows."""
    g = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(B, k + 1, V, generator=g)
    draft = target[:, :k] + near * torch.randn(B, k, V, generator=g)
    if holes and V > 1:
        target[:, :, 1:][torch.rand(B, k + 1, V - 1, generator=g) < 0.3] = -INF
        draft[:, :, 1:][torch.rand(B, k, V - 1, generator=g) < 0.2] = -INF
    target, draft = (torch.nn.functional.pad(x.log_softmax(-1), (0, pad)).to(dtype)[..., :V] for x in (target, draft))
    tokens = torch.multinomial(draft.double().exp().reshape(B * k, V), 1, generator=g).view(B, k) if B * k else None
    tokens = torch.zeros(B, k, dtype=torch.int64) if tokens is None else tokens
    lengths = torch.randint(0, k + 1, (B,), generator=g, dtype=torch.int32)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    positions = torch.randint(0, 2**40, (B,), generator=g)
    return target, None if deterministic else draft, tokens, lengths, seeds, positions


def by_hand(target, draft, tokens, length, seed, position, block):
    """One row in Python's numbers, from the definition: the tokens, and the gap between each u and what decides it."""
    V = target.shape[1]
    q = [[math.exp(float(x)) for x in row] for row in target]
    p = [
        [float(v == tokens[j]) for v in range(V)] if draft is None else [math.exp(float(x)) for x in draft[j]]
        for j in range(length)
    ]
    u = philox.uniform(seed, position, int(Stream.ACCEPT), length)[0].tolist()
    gaps, scales, kept = [], [1.0], 0
    for j in range(length):
        x = tokens[j]
        ratio = 0.0 if q[j][x] == 0 else INF if p[j][x] == 0 else q[j][x] / p[j][x]
        scales.append(min(1.0, scales[-1] * ratio) if scales[-1] else 0.0)
        limit = ratio
        if block:
            limit = scales[-1]
            if j + 1 < length and limit < 1:
                mass = sum(max(0.0, limit * a - b) for a, b in zip(q[j + 1], p[j + 1], strict=True))
                limit = mass / (mass + 1 - limit)
        gaps.append(abs(u[j] - limit))
        if u[j] < limit:
            kept = j + 1
        elif not block:
            break
    weights = q[kept]
    if kept < length:
        scale = scales[kept] if block else 1.0
        residual = [max(0.0, scale * a - b) for a, b in zip(q[kept], p[kept], strict=True)]
        weights = residual if sum(residual) > 0 else weights
    share = float(philox.uniform(seed, position + kept, int(Stream.SAMPLE))) * sum(weights)
    cumulated, drawn = 0.0, None
    for token, weight in enumerate(weights):
        cumulated += weight
        gaps.append(abs(cumulated - share) / sum(weights))
        if weight and drawn is None and cumulated > share:
            drawn = token
    return [*tokens[:kept], drawn], min(gaps)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(0, 4),
    k=st.integers(0, 4),
    V=st.sampled_from([1, 2, 5, 17, 33, 255, 600]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    holes=st.booleans(),
    deterministic=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_reference_is_the_definition(B, k, V, dtype, holes, deterministic, seed, block):
    args = make(B, k, V, seed, dtype=dtype, holes=holes, deterministic=deterministic)
    out, accepted = _verify_draft.reference(*args, block)
    assert out.dtype == torch.int64 and accepted.dtype == torch.int32
    for b in range(B):
        target, draft, tokens, lengths, seeds, positions = (None if x is None else x[b : b + 1] for x in args)
        length, draft = int(lengths), None if draft is None else draft[0]
        expected, gap = by_hand(target[0], draft, tokens[0].tolist(), length, seeds, positions, block)
        if gap > 1e-9:
            assert out[b].tolist() == expected + [-1] * (k + 1 - len(expected))
            assert int(accepted[b]) == len(expected) - 1


@pytest.mark.parametrize("form", ["kernel", "vectorised"])
@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@settings(deadline=None, max_examples=100)
@given(
    B=st.integers(0, 6),
    k=st.integers(0, 5),
    V=st.sampled_from([1, 2, 5, 17, 33, 255, 256, 257, 600, 1031]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    holes=st.booleans(),
    deterministic=st.booleans(),
    near=st.sampled_from([0.0, 0.3, 2.0]),
    pad=st.integers(0, 3),
    seed=st.integers(0, 10000),
)
def test_kernel_and_torch_form_decide_as_the_reference(
    form, block, B, k, V, dtype, holes, deterministic, near, pad, seed
):
    pytest.importorskip("personafast._C")
    args = make(B, k, V, seed, dtype=dtype, holes=holes, deterministic=deterministic, near=near, pad=pad)
    expected, kept = _verify_draft.reference(*args, block)
    with ops.use_backend("cpu"):
        out, accepted = FORMS[form](*args, block)
    assert out.dtype == torch.int64 and accepted.dtype == torch.int32
    for b in range(B):
        if not torch.equal(out[b], expected[b]):
            # fp32 may move a limit past its u: the row must be one that hangs on a hair.
            target, draft, tokens, lengths, seeds, positions = (None if x is None else x[b : b + 1] for x in args)
            length, draft = int(lengths), None if draft is None else draft[0]
            assert by_hand(target[0], draft, tokens[0].tolist(), length, seeds, positions, block)[1] < 1e-5
        else:
            assert accepted[b] == kept[b]


def test_kernel_seldom_differs_from_the_reference():
    pytest.importorskip("personafast._C")
    args = make(400, 4, 700, 0)
    for block in (False, True):
        with ops.use_backend("cpu"):
            out, _ = ops.verify_draft(*args, block)
        assert (out != _verify_draft.reference(*args, block)[0]).any(1).sum() <= 1


@pytest.mark.parametrize("block", [False, True])
def test_kernel_rows_do_not_depend_on_their_batch_or_on_threads(block):
    pytest.importorskip("personafast._C")
    args = make(9, 3, 40_000, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.use_backend("cpu"):
                results.append(ops.verify_draft(*args, block))
    finally:
        torch.set_num_threads(threads)
    for out, accepted in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(accepted, results[0][1])
    for b in range(9):
        with ops.use_backend("cpu"):
            out, _ = ops.verify_draft(*(x[b : b + 1] for x in args), block)
        assert torch.equal(out[0], results[0][0][b])


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_a_draw_belongs_to_its_seed_and_position(verify, block):
    target, draft, tokens, lengths, seeds, positions = make(64, 3, 50, 2)
    out, _ = verify(target, draft, tokens, lengths, seeds, positions, block)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled, _ = verify(*(x[order] for x in (target, draft, tokens, lengths, seeds, positions)), block)
    assert torch.equal(shuffled, out[order])
    assert not torch.equal(verify(target, draft, tokens, lengths, seeds + 1, positions, block)[0], out)
    assert not torch.equal(verify(target, draft, tokens, lengths, seeds, positions + 1, block)[0], out)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_without_a_draft_it_is_the_draw_of_the_direct_sampler(verify, block):
    target, _, tokens, lengths, seeds, positions = make(200, 2, 300, 3)
    out, accepted = verify(target, None, tokens, torch.zeros_like(lengths), seeds, positions, block)
    u = philox.uniform(seeds, positions, int(Stream.SAMPLE))[:, 0]
    assert not accepted.any() and (out[:, 1:] == -1).all()
    assert (out[:, 0] != choose(target[:, 0], u)).sum() <= 1
    empty, _ = verify(target[:, :1], None, tokens[:, :0], torch.zeros_like(lengths), seeds, positions, block)
    assert torch.equal(empty, out[:, :1])


def test_streams_are_those_of_the_samplers():
    assert (int(Stream.ACCEPT), int(Stream.SAMPLE)) == (_verify_draft.ACCEPT, _verify_draft.SAMPLE)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_token_that_the_target_excludes_neither_stands_nor_is_drawn(verify, block, deterministic):
    g = torch.Generator().manual_seed(4)
    B, k, V = 300, 2, 40
    ref = torch.randn(B * (k + 1), V, generator=g)
    policies = ref + 2 * torch.randn(2, B * (k + 1), V, generator=g)
    floor, ones = torch.full((B * (k + 1),), 0.4), torch.ones(B * (k + 1))
    rule = torch.ones(B * (k + 1), dtype=torch.int32)
    target = ops.aggregate_logits(ref, policies, torch.ones(B * (k + 1), 2), None, rule, ones, floor)
    target, draft = target.view(B, k + 1, V), ref.log_softmax(-1).view(B, k + 1, V)[:, :k]
    tokens = torch.multinomial(draft.reshape(-1, V).exp(), 1, generator=g).view(B, k)
    lengths = torch.full((B,), k, dtype=torch.int32)
    seeds, zeros = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    out, accepted = verify(target, None if deterministic else draft, tokens, lengths, seeds, zeros, block)
    excluded = target[:, :k].gather(2, tokens[..., None])[..., 0] == -INF
    assert excluded.any() and (~excluded).any()
    before = torch.where(excluded.any(1), excluded.int().argmax(1), k)
    assert (accepted <= before).all()
    logp = target.gather(2, out.clamp(min=0)[..., None])[..., 0]
    assert logp[out >= 0].isfinite().all()


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_a_draft_that_is_the_target_stands_and_a_residual_of_nothing_gives_way(verify, block, monkeypatch):
    target, _, tokens, _, seeds, positions = make(50, 3, 20, 5)
    full = torch.full((50,), 3, dtype=torch.int32)
    tokens = torch.multinomial(target[:, :3].reshape(-1, 20).exp(), 1).view(50, 3)
    assert (verify(target, target[:, :3], tokens, full, seeds, positions, block)[1] == 3).all()
    # A draft that claims more than all there is for every token: whatever falls is drawn from the target.
    above = target[:, :3] + 3
    out, accepted = verify(target, above, tokens, full, seeds, positions, block)
    assert (accepted < 3).any() and (out.gather(1, accepted[:, None].long()) >= 0).all()


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_an_impossible_draft_token_of_probability_zero_is_no_nan(verify, block):
    target = torch.tensor([[[-INF, 0.0], [0.0, -INF], [-INF, 0.0]]])
    draft = torch.tensor([[[-INF, 0.0], [-INF, 0.0]]])
    args = torch.tensor([2], dtype=torch.int32), torch.tensor([7]), torch.tensor([0]), block
    assert verify(target, draft, torch.tensor([[1, 0]]), *args)[0].tolist() == [[1, 0, 1]]
    assert verify(target, draft, torch.tensor([[0, 0]]), *args)[0].tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_nothing_to_draw_is_an_error(verify, block):
    for broken, where in ((float("nan"), slice(None)), (float("nan"), 4), (-INF, slice(None))):
        target, draft, tokens, lengths, seeds, positions = make(3, 2, 9, 6)
        lengths[:] = 0
        target[1, 0, where] = broken
        with pytest.raises(PersonafastError, match="`target_logp` of row 1 leaves no token to draw"):
            verify(target, draft, tokens, lengths, seeds, positions, block)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_values_out_of_range_are_named(verify, block):
    target, draft, tokens, lengths, seeds, positions = make(3, 2, 9, 7)
    lengths[:] = torch.tensor([0, 1, 2])
    tokens[1, 1] = tokens[0, 0] = 99  # do not count
    verify(target, draft, tokens, lengths, seeds, positions, block)
    for wrong in (-1, 9, 2**40):
        tokens[2, 1] = wrong
        with pytest.raises(PersonafastError, match=f"`tokens` of row 2 hold {wrong}, expected 0 to 8"):
            verify(target, draft, tokens, lengths, seeds, positions, block)
    for wrong in (-1, 3):
        lengths[1] = wrong
        with pytest.raises(PersonafastError, match=f"`lengths` of row 1 is {wrong}, expected 0 to 2"):
            verify(target, draft, tokens, lengths, seeds, positions, block)


@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("block", [False, True])
def test_kernel_writes_every_output_and_nothing_else(dtype, block):
    core = pytest.importorskip("personafast._C")
    kind = (torch.float32, torch.bfloat16, torch.float16)[dtype]
    target, draft, tokens, lengths, seeds, positions = make(4, 3, 21, 8, dtype=kind)
    out, accepted = torch.full((6, 4), -99), torch.full((6,), -99, dtype=torch.int32)
    wrong = core.verify_draft(
        out[1:].data_ptr(), accepted[1:].data_ptr(), target.data_ptr(), *target.stride()[:2], draft.data_ptr(),
        *draft.stride()[:2], tokens.data_ptr(), lengths.data_ptr(), seeds.data_ptr(), positions.data_ptr(), 2, 0, 4, 3,
        21, block, dtype, 2,
    )  # fmt: skip
    assert wrong == -1
    assert (out[1:5] != -99).all() and (out[[0, 5]] == -99).all()
    assert (accepted[1:5] >= 0).all() and (accepted[[0, 5]] == -99).all()


def test_layouts_without_adjacent_tokens_and_mixed_dtypes_are_served():
    pytest.importorskip("personafast._C")
    target, draft, tokens, lengths, seeds, positions = make(5, 3, 64, 9)
    with ops.use_backend("cpu"):
        expected = ops.verify_draft(target, draft, tokens, lengths, seeds, positions)
        strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, draft))
        wide = torch.stack([tokens, tokens], 2)[..., 0]
        found = ops.verify_draft(*strided, wide, lengths, seeds.repeat(2, 1).T[:, 0], positions)
        mixed = ops.verify_draft(target.bfloat16(), draft.bfloat16().float(), tokens, lengths, seeds, positions)
        plain = ops.verify_draft(target.bfloat16(), draft.bfloat16(), tokens, lengths, seeds, positions)
    assert torch.equal(found[0], expected[0]) and torch.equal(mixed[0], plain[0])


def test_float64_runs_in_torch_and_not_in_the_kernel():
    args = make(5, 3, 64, 9, dtype=torch.float64)
    for block in (False, True):
        assert torch.equal(ops.verify_draft(*args, block)[0], _verify_draft.reference(*args, block)[0])
    pytest.importorskip("personafast._C")
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="verify_draft: backend 'cpu' cannot take dtype"):
        ops.verify_draft(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3, 1, dtype=torch.int64)}, r"`tokens` has shape \[2, 3, 1\], expected \[B, k\]"),
        ({"tokens": torch.zeros(2, 3)}, "`tokens` has dtype float32, expected int64"),
        ({"target_logp": torch.zeros(2, 3, 9)}, r"`target_logp` has shape \[2, 3, 9\], expected \[B, k \+ 1, V\]"),
        ({"target_logp": torch.zeros(2, 4, 9, dtype=torch.int64)}, "`target_logp` has dtype int64"),
        ({"target_logp": torch.zeros(2, 4, 0), "draft_logp": None}, "expected at least one token"),
        ({"draft_logp": torch.zeros(2, 4, 9)}, r"`draft_logp` has shape \[2, 4, 9\], expected \[B, k, V\]"),
        ({"draft_logp": torch.zeros(2, 3, 9, dtype=torch.int32)}, "`draft_logp` has dtype int32"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "`lengths` has dtype int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"`lengths` has shape \[3\]"),
        ({"seeds": torch.zeros(2)}, "`seeds` has dtype float32"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"`positions` has shape \[3\]"),
        ({"target_logp": torch.zeros(2, 4, 9, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "target_logp": torch.zeros(2, 4, 9),
        "draft_logp": torch.zeros(2, 3, 9),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.verify_draft(**{**good, **change})
