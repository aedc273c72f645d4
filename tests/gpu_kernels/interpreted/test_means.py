import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from personafast._triton import elementary, means

from personafast.ops import Aggregator, _means

INF = math.inf
EXPONENTS = [-1e30, -3.0, -1.0, -1e-6, 0.0, 1e-30, 1e-6, 0.5, 1.0, 2.0, 40.0]


@triton.jit
def elementwise_kernel(p_out, p_x, X: tl.constexpr):
    o_x = tl.arange(0, X)
    b_x = tl.load(p_x + o_x)
    tl.store(p_out + o_x, elementary.expm1(b_x))
    tl.store(p_out + X + o_x, elementary.log1p(b_x))
    tl.store(p_out + 2 * X + o_x, elementary.log_sigmoid(b_x))
    tl.store(p_out + 3 * X + o_x, elementary.tanh(b_x))


def test_elementary_functions_over_all_magnitudes():
    small = torch.logspace(-38, 4, 400)
    x = torch.cat([small, -small, torch.tensor([0.0, -0.0, 1.0, -1.0, -INF, INF, 0.49999, 0.5, -0.5, -0.99999])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    out = torch.full((4, 1024), math.nan)
    elementwise_kernel[(1,)](out, x, X=1024)
    wide = x.double()
    for found, exact in zip(
        out.double(), (wide.expm1(), wide.log1p(), torch.nn.functional.logsigmoid(wide), wide.tanh()), strict=True
    ):
        exact = torch.where(exact.abs() > 3.4e38, exact.sign() * INF, exact)
        torch.testing.assert_close(found, exact, rtol=4e-7, atol=1e-44, equal_nan=True)


@triton.jit
def join_kernel(p_out, p_fault, p_logs, p_weight, p_rule, p_p, N, X, NB: tl.constexpr, XB: tl.constexpr):
    i_b = tl.program_id(0)
    o_n, o_x = tl.arange(0, NB), tl.arange(0, XB)
    m_n, m_x = o_n < N, o_x < X
    b_rule, b_p = tl.load(p_rule + i_b), tl.load(p_p + i_b)
    b_weight = tl.load(p_weight + i_b * N + o_n, mask=m_n, other=0.0)
    m = m_n[:, None] & m_x[None, :]
    b_logs = tl.load(p_logs + (i_b * N + o_n)[:, None] * X + o_x[None, :], mask=m, other=0.0)
    b_joined = means.join(b_logs, b_weight[:, None], b_rule, b_p)
    tl.store(p_out + i_b * X + o_x, b_joined, mask=m_x)
    tl.store(p_fault + i_b, means.at_fault(b_rule, b_weight, b_p).to(tl.int32))


def join(logs, weight, aggregator, p):
    """`logs` [N, B, X] and the rest as `_means.join` takes them."""
    N, B, X = logs.shape
    out, fault = torch.full((B, X), math.nan), torch.full((B,), -1, dtype=torch.int32)
    join_kernel[(B,)](
        out, fault, logs.transpose(0, 1).contiguous(), weight[:, :, 0].T.contiguous(), aggregator, p, N, X,
        NB=triton.next_power_of_2(N), XB=triton.next_power_of_2(X),
    )  # fmt: skip
    return out, fault


@pytest.mark.parametrize("members", [1, 3, 4])
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_means_are_those_of_torch(members, size):
    others = (Aggregator.LINEAR, Aggregator.JENSEN_SHANNON, Aggregator.MIN, Aggregator.MAX)
    kinds = [*((int(rule), math.nan) for rule in others), *((int(Aggregator.POWER), p) for p in EXPONENTS)]
    rows = [(kind, carried) for kind, carried in itertools.product(kinds, (0.0, 30.0, -30.0))]
    g = torch.Generator().manual_seed(members)
    B, X = len(rows), 37
    logs = size * torch.randn(members, B, X, generator=g)
    logs[torch.rand(logs.shape, generator=g) < 0.05] = -INF
    logs[:, :, 3] = -INF
    logs[:, :, 4] = logs[:1, :, 4]
    logs += torch.tensor([carried for _, carried in rows])[:, None]
    weight = torch.rand(members, B, 1, generator=g)
    if members > 1:
        weight[1, ::2] = 0
        logs[1, ::2, 7] = math.nan
        logs[0, :, 9] = math.nan
        logs[1:, :, 9] = 0
    aggregator = torch.tensor([kind[0] for kind, _ in rows], dtype=torch.int32)
    p = torch.tensor([kind[1] for kind, _ in rows])
    if members == 4:
        weight[3, (aggregator == int(Aggregator.LINEAR))] *= -0.5
    weight = _means.normalised(weight)
    found, fault = join(logs, weight, aggregator, p)
    exact = _means.join(logs.double(), weight.double(), aggregator, p.double(), set(range(6)))
    plain = _means.join(logs, weight, aggregator, p, set(range(6)))
    assert not fault.any()
    assert torch.equal(found.isnan(), plain.isnan())
    # Where float32 says that a difference is rounding float64 may still see it.
    exact = torch.where(plain == -INF, -INF, exact)
    error = torch.where(found == exact, 0.0, (found - exact).abs()).nan_to_num(nan=0.0)
    allowed = torch.where(plain == exact, 0.0, (plain - exact).abs()).nan_to_num(nan=0.0)
    linear = (aggregator == int(Aggregator.LINEAR))[:, None] & (members == 4)
    size = torch.cat([logs, exact[None]]).abs().nan_to_num(nan=0.0, posinf=0.0).amax(0)
    assert (error <= 2 * allowed + torch.where(linear, 2e-4, 3e-7) * (1 + size)).all()


def test_what_cancels_counts_as_nothing():
    logs = torch.zeros(2, 2, 3)
    weight = torch.tensor([[0.5, -0.5], [0.500003, -0.499997]]).T[:, :, None]
    linear = torch.zeros(2, dtype=torch.int32)
    out, _ = join(logs, weight, linear, torch.ones(2))
    assert (out[0] == -INF).all() and out[1].isfinite().all()


def test_rows_at_fault():
    cases = [(-1, 1, 1, True), (6, 1, 1, True), (0, -1, INF, False), (1, -1, INF, False), (2, 1, 1, False),
             (2, -1, 1, True), (2, 1, INF, True), (2, 1, math.nan, True), (3, -1, 1, True), (4, -1, 1, True),
             (5, -1, 1, True), (5, 1, math.nan, False)]  # fmt: skip
    weight = torch.tensor([[1.0, c[1]] for c in cases]).T[:, :, None]
    aggregator = torch.tensor([c[0] for c in cases], dtype=torch.int32)
    _, fault = join(torch.zeros(2, len(cases), 1), weight, aggregator, torch.tensor([float(c[2]) for c in cases]))
    assert fault.bool().tolist() == [c[3] for c in cases]
