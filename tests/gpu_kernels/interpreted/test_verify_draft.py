import math

import pytest
import torch
import triton
import triton.language as tl
from helpers.table import p_value
from personafast._triton import launch
from personafast._triton.verify_draft import _first_above, verify_draft_config

from personafast import _triton, ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _verify_draft

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BLOCK = pytest.mark.parametrize("block", [False, True], ids=["token", "block"])


def make(B, k, V, *, near=1.0, holes=False, certain=False, dtypes=(F32, F32), seed=0):
    """Target, draft, tokens of the draft, lengths, seeds, positions."""
    g = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(B, k + 1, V, generator=g)
    draft = target[:, :k] + near * torch.randn(B, k, V, generator=g)
    if holes:
        target[:, :, 1:][torch.rand(B, k + 1, V - 1, generator=g) < 0.3] = -math.inf
        draft[:, :, 1:][torch.rand(B, k, V - 1, generator=g) < 0.2] = -math.inf
    target, draft = (x.log_softmax(-1).to(dtype) for x, dtype in zip((target, draft), dtypes, strict=True))
    tokens = torch.zeros(B, k, dtype=torch.int64)
    if B * k:
        tokens = torch.multinomial(draft.double().exp().reshape(B * k, V), 1, generator=g).view(B, k)
    lengths = torch.arange(B, dtype=torch.int32).flip(0) % (k + 1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    positions = torch.randint(0, 2**40, (B,), generator=g)
    return target, None if certain else draft, tokens, lengths, seeds, positions


@BLOCK
@pytest.mark.parametrize(
    ("B", "k", "V", "options"),
    [
        (16, 3, 5, {}),
        (12, 2, 33, {"near": 0.3, "holes": True}),
        (8, 3, 40, {"certain": True, "near": 0.0}),
        (4, 4, 130, {"dtypes": (F16, F16)}),
        (4, 2, 64, {"dtypes": (BF16, F32), "near": 0.5}),
        (3, 1, 1, {}),
        (4, 0, 7, {}),
        (0, 2, 5, {}),
        # More than one block of the vocabulary, with a tail.
        (3, 2, 5500, {"near": 0.2}),
        (2, 2, 4100, {"certain": True, "holes": True}),
    ],
    ids=str,
)
def test_decides_as_the_reference(block, B, k, V, options):
    args = make(B, k, V, **options)
    expected, kept = _verify_draft.reference(*args, block)
    out, accepted = ops.verify_draft(*args, block)
    assert out.dtype == torch.int64 and accepted.dtype == torch.int32
    assert torch.equal(accepted, kept) and torch.equal(out, expected)


def test_draws_from_every_block_of_the_vocabulary():
    target, draft, tokens, _, seeds, positions = make(12, 1, 9000, seed=3)
    none = torch.zeros(12, dtype=torch.int32)
    out, _ = ops.verify_draft(target, draft, tokens, none, seeds, positions)
    assert torch.equal(out, _verify_draft.reference(target, draft, tokens, none, seeds, positions, False)[0])
    assert len(set((out[:, 0] // 4096).tolist())) >= 3


def test_a_token_without_weight_is_never_drawn_even_at_the_end_of_a_sum():
    """One token has all the weight, before and behind others that have none."""
    target = torch.full((6, 1, 5000), -math.inf)
    for row, token in enumerate((0, 1, 700, 4095, 4096, 4999)):
        target[row, 0, token] = 0.0
    rows = torch.arange(6)
    out, _ = ops.verify_draft(target, None, rows[:, None][:, :0], rows.int() * 0, rows, rows)
    assert out[:, 0].tolist() == [0, 1, 700, 4095, 4096, 4999]


@triton.jit
def first_above_kernel(p_out, p_weight, p_goal, SIZE: tl.constexpr):
    o_v = tl.arange(0, SIZE)
    tl.store(p_out, _first_above(tl.load(p_weight + o_v), o_v, tl.load(p_goal), SIZE))


@pytest.mark.parametrize(
    ("weights", "goal", "token"),
    [
        ([0, 1, 0, 1], 0.0, 1),
        ([0, 1, 0, 1], 1.0, 3),
        ([0, 1, 0, 1], 1.5, 3),
        # Rounding has put the goal on the whole sum.
        ([1, 1, 0, 0], 2.0, 1),
        ([0, 0, 0, 0], 0.0, 4),
    ],
)
def test_the_goal_lies_within_the_token(weights, goal, token):
    out = torch.full((1,), -9, dtype=torch.int32)
    weight, goal = torch.tensor(weights, dtype=F64), torch.tensor([goal], dtype=F64)
    launch.launch(first_above_kernel, (1, 1, 1), launch.Config({"SIZE": 4}), out, weight, goal)
    assert out.tolist() == [token]


@BLOCK
def test_a_draft_that_is_the_target_stands_and_a_residual_of_nothing_gives_way(block):
    target, _, tokens, _, seeds, positions = make(5, 3, 20, seed=5)
    full = torch.full((5,), 3, dtype=torch.int32)
    assert (ops.verify_draft(target, target[:, :3], tokens, full, seeds, positions, block)[1] == 3).all()
    # A draft that claims more than all there is for every token: whatever falls is drawn from the target.
    args = target, target[:, :3] + 3, tokens, full, seeds, positions, block
    out, accepted = ops.verify_draft(*args)
    assert (accepted < 3).any() and torch.equal(out, _verify_draft.reference(*args)[0])


@BLOCK
def test_impossible_tokens_are_no_nan(block):
    target = torch.tensor([[[-math.inf, 0.0], [0.0, -math.inf], [-math.inf, 0.0]]]).expand(3, 3, 2)
    draft = torch.tensor([[[-math.inf, 0.0], [-math.inf, 0.0]]]).expand(3, 2, 2)
    drafted = torch.tensor([[1, 0], [0, 0], [1, 1]])
    full = torch.full((3,), 2, dtype=torch.int32)
    out, _ = ops.verify_draft(target, draft, drafted, full, torch.arange(3), torch.arange(3), block)
    assert out.tolist() == [[1, 0, 1], [1, -1, -1], [1, 0, -1]]


@BLOCK
def test_a_row_that_has_nothing_to_draw_ends_in_minus_one_and_raises_on_a_cpu(block):
    target, draft, tokens, _, seeds, positions = make(4, 2, 9, seed=6)
    lengths = torch.tensor([0, 0, 2, 1], dtype=torch.int32)
    target[0, 0] = -math.inf
    target[1, 0, 4] = math.nan
    target[2, 0, int(tokens[2, 0])] = math.nan
    args = target, draft, tokens, lengths, seeds, positions, block
    out, accepted = _triton.verify_draft(*args)
    assert out[:3].tolist() == [[-1, -1, -1]] * 3 and accepted[:3].tolist() == [0, 0, 0] and out[3, 0] >= 0
    with pytest.raises(PersonafastError, match="`target_logp` of row 0 leaves no token to draw"):
        ops.verify_draft(*args)


@BLOCK
def test_lengths_and_tokens_out_of_range_are_clamped(block):
    target, draft, tokens, _, seeds, positions = make(4, 2, 9, seed=7)
    lengths = torch.tensor([-3, 99, 2, 1], dtype=torch.int32)
    tokens[2, 0], tokens[2, 1], tokens[3, 1] = -5, 2**40, -1
    out, accepted = _triton.verify_draft(target, draft, tokens, lengths, seeds, positions, block)
    inside = target, draft, tokens.clamp(0, 8), lengths.clamp(0, 2), seeds, positions, block
    expected, kept = _verify_draft.reference(*inside)
    assert torch.equal(accepted, kept)
    drawn = accepted[:, None].long()
    assert torch.equal(out.gather(1, drawn), expected.gather(1, drawn))
    with pytest.raises(PersonafastError, match="`lengths` of row 0 is -3"):
        ops.verify_draft(target, draft, tokens, lengths, seeds, positions, block)


@BLOCK
def test_every_layout_is_read_in_place(block):
    target, draft, tokens, lengths, seeds, positions = args = make(5, 2, 30, seed=9)
    expected = ops.verify_draft(*args, block)[0]
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, draft))
    wide = torch.cat([tokens, tokens], 1)[:, :2]
    found = ops.verify_draft(*strided, wide, lengths.repeat(2, 1).T[:, 0], seeds, positions, block)[0]
    assert torch.equal(found, expected)
    turned = torch.stack([tokens, tokens], 2)[..., 0]
    assert torch.equal(ops.verify_draft(target, draft, turned, lengths, seeds, positions, block)[0], expected)
    for row in (1, 4):
        alone = ops.verify_draft(*(x[row : row + 1] for x in args), block)[0]
        assert torch.equal(alone[0], expected[row])


def test_float64_is_refused():
    args = make(1, 1, 4, dtypes=(F64, F32))
    with pytest.raises(BackendError, match="verify_draft: backend 'triton' cannot take dtype torch.float64"):
        ops.verify_draft(*args)


def test_blocks_depend_on_the_vocabulary_alone():
    for V, block in ((3, 32), (500, 512), (128256, 4096), (262144, 4096)):
        masses, draw = verify_draft_config(V, 16, False)
        assert masses.constants["BLOCK"] == draw.constants["BLOCK"] == block
        assert block * draw.constants["BLOCKS"] >= V


@pytest.mark.parametrize("multiprocessors", [1, 2])
def test_places_side_by_side_and_in_turn_are_the_same(multiprocessors, monkeypatch):
    """With few rows a program has one place, with many it takes several."""
    args = make(5, 4, 20, seed=11)
    expected = _verify_draft.reference(*args, True)
    monkeypatch.setattr(launch, "INTERPRETED", launch.INTERPRETED._replace(multiprocessors=multiprocessors))
    out, accepted = ops.verify_draft(*args, True)
    assert torch.equal(out, expected[0]) and torch.equal(accepted, expected[1])


@pytest.mark.slow
@BLOCK
@pytest.mark.parametrize("certain", [False, True])
def test_texts_follow_the_target(block, certain):
    """Texts of two tokens over three, by enumeration; a second token that was not verified is drawn from the target."""
    rows, g = 800, torch.Generator().manual_seed(1)
    first, second = 1.5 * torch.randn(3, generator=g), 1.5 * torch.randn(3, 3, generator=g)
    target = [first.log_softmax(-1), second.log_softmax(-1)]
    draft = [x.add(torch.randn(x.shape, generator=g)).log_softmax(-1) for x in target]
    x1 = torch.zeros(rows, dtype=torch.long) if certain else torch.multinomial(draft[0].exp(), rows, True, generator=g)
    x2 = x1 if certain else torch.multinomial(draft[1].exp()[x1], 1, generator=g)[:, 0]
    q = torch.stack([target[0].expand(rows, 3), target[1][x1], target[0].expand(rows, 3)], 1)
    p = None if certain else torch.stack([draft[0].expand(rows, 3), draft[1][x1]], 1)
    two = torch.full((rows,), 2, dtype=torch.int32)
    seeds = torch.randint(2**62, (rows,), generator=g)
    out, _ = ops.verify_draft(q, p, torch.stack([x1, x2], 1), two, seeds, torch.zeros_like(seeds), block)
    rest = torch.multinomial(target[1].exp()[out[:, 0]], 1, generator=g)[:, 0]
    code = 3 * out[:, 0] + torch.where(out[:, 1] >= 0, out[:, 1], rest)
    joint = (target[0][:, None] + target[1]).double().exp().flatten()
    assert p_value(code, joint) > 1e-3
