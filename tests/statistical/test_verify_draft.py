"""verify_draft against the target's joint law: tiny vocabularies, every prefix with tables of its own."""

import itertools
import math

import pytest
import torch
from helpers.table import p_value

from personafast import ops
from personafast.ops import _verify_draft, philox

SAMPLES = 2**18


class Tables:
    """Next-token log probabilities of target and draft after every prefix of up to `places` - 1 tokens."""

    def __init__(self, vocabulary, places, seed, holes=False, near=1.0):
        g = torch.Generator().manual_seed(seed)
        self.vocabulary, self.places = vocabulary, places
        self.offsets = [sum(vocabulary**j for j in range(n)) for n in range(places)]
        size = sum(vocabulary**j for j in range(places))
        target, draft = torch.randn(2, size, vocabulary, generator=g)
        draft = target + near * draft
        if holes:
            # As the support mask of a blend leaves them: of all tokens but one in every table.
            target[:, 1:][torch.rand(size, vocabulary - 1, generator=g) < 0.4] = -math.inf
        self.target, self.draft = target.log_softmax(-1), draft.log_softmax(-1)

    def after(self, table, code, place):
        return table[self.offsets[place] + code]

    def joint(self):
        """Probability of every text of `places` tokens under the target."""
        found = []
        for text in itertools.product(range(self.vocabulary), repeat=self.places):
            logp, code = 0.0, 0
            for place, token in enumerate(text):
                logp += float(self.after(self.target, code, place)[token].double())
                code = code * self.vocabulary + token
            found.append(logp)
        return torch.tensor(found, dtype=torch.float64).exp()


def sample(logp, generator):
    return torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]


def texts(
    tables, verify, *, block, rows=SAMPLES, seed=0, chunk=None, deterministic=False, ragged=False, skew=0.0, rounds=99
):
    """Codes of whole texts, made round by round, and the mean number of tokens kept in the first round.

    `skew` is a log factor by which the draft is said to be less probable than it is; after `rounds` rounds it stops.
    """
    g = torch.Generator().manual_seed(seed)
    places, chunk = tables.places, chunk or tables.places - 1
    seeds = torch.randint(2**62, (rows,), generator=g)
    code, length = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    offsets = torch.tensor([*tables.offsets, 0])
    kept = None
    while bool((length < places).any()) and rounds > 0:
        rounds -= 1
        open_ = (length < places).nonzero()[:, 0]
        at, size = code[open_], length[open_]
        drafted, target, draft = [], [], []
        for _ in range(chunk + 1):
            index = torch.where(size < places, offsets[size.clamp(max=places)] + at, 0)
            target.append(tables.target[index])
            draft.append(tables.draft[index])
            token = index % tables.vocabulary if deterministic else sample(draft[-1], g)
            drafted.append(token)
            at, size = at * tables.vocabulary + token, size + 1
        tokens = torch.stack(drafted[:chunk], 1)
        limit = (places - 1 - length[open_]).clamp(max=chunk)
        wanted = torch.randint(0, chunk + 1, limit.shape, generator=g) if ragged else limit
        lengths = torch.minimum(wanted, limit).to(torch.int32)
        out, accepted = verify(
            torch.stack(target, 1),
            None if deterministic else torch.stack(draft[:chunk], 1) - skew,
            tokens,
            lengths,
            seeds[open_],
            length[open_],
            block,
        )
        if kept is None:
            kept = float(accepted.double().mean())
            assert bool((accepted <= lengths).all())
        for j in range(chunk + 1):
            adds = out[:, j] >= 0
            assert torch.equal(adds, accepted >= j)
            row = open_[adds]
            code[row] = code[row] * tables.vocabulary + out[adds, j]
            length[row] += 1
    return code, kept


CASES = [
    pytest.param(3, 2, {}, id="one token"),
    pytest.param(4, 3, {}, id="two tokens"),
    pytest.param(3, 4, {}, id="three tokens"),
    pytest.param(5, 3, {"deterministic": True}, id="deterministic"),
    pytest.param(3, 4, {"ragged": True}, id="ragged"),
    pytest.param(3, 4, {"deterministic": True, "ragged": True}, id="deterministic and ragged"),
    pytest.param(3, 5, {"chunk": 2}, id="rounds of two tokens"),
    pytest.param(3, 5, {"chunk": 3, "ragged": True}, id="ragged rounds"),
]


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize("holes", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize(("vocabulary", "places", "more"), CASES)
def test_texts_follow_the_target(vocabulary, places, more, holes, block):
    tables = Tables(vocabulary, places, seed=places, holes=holes)
    code, _ = texts(tables, ops.verify_draft, block=block, seed=1, **more)
    assert p_value(code, tables.joint()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize(("vocabulary", "places", "more"), CASES)
def test_texts_of_the_torch_form_follow_the_target(vocabulary, places, more, block):
    tables = Tables(vocabulary, places, seed=places, holes=True)
    code, _ = texts(tables, _verify_draft._vectorised, block=block, seed=1, **more)
    assert p_value(code, tables.joint()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
@pytest.mark.parametrize("more", [{"ragged": True}, {"deterministic": True}], ids=["drafted", "deterministic"])
def test_texts_of_the_reference_follow_the_target(more, block):
    tables = Tables(3, 4, seed=4)
    code, _ = texts(tables, _verify_draft.reference, block=block, seed=1, **more)
    assert p_value(code, tables.joint()) > 1e-3


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_an_acceptance_off_by_five_percent_is_caught(block):
    """Positive control: min(1, 1.05 q / p) must fail the same test."""
    tables = Tables(3, 4, seed=4)
    code, _ = texts(tables, ops.verify_draft, block=block, seed=1, skew=math.log(1.05))
    assert p_value(code, tables.joint()) < 1e-6


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_a_missing_residual_is_caught(block, monkeypatch):
    """Positive control: after a rejection a draw from the target itself must fail the same test."""
    residual = _verify_draft._residual
    calls = []

    def none_left(logp, draft, token, scale):
        calls.append(scale)
        # In a block the residuals of the inner places decide what stands; only the last one is drawn from.
        return residual(logp, draft, token, scale) * (block and len(calls) % 3 != 0)

    monkeypatch.setattr(_verify_draft, "_residual", none_left)
    tables = Tables(3, 4, seed=4)
    code, _ = texts(tables, _verify_draft._vectorised, block=block, seed=1)
    assert p_value(code, tables.joint()) < 1e-6


def test_uniforms_used_again_in_the_next_round_are_caught(monkeypatch):
    """Positive control: a block has looked at the uniforms of the places it rejected, so they may not serve again."""
    uniform = philox.uniform

    def by_place(seeds, positions, stream, n=1):
        return torch.cat([uniform(seeds, positions + j, stream) for j in range(n)], 1)

    tables = Tables(3, 5, seed=5)
    monkeypatch.setattr(philox, "uniform", by_place)
    code, _ = texts(tables, _verify_draft._vectorised, block=True, seed=1, chunk=3)
    assert p_value(code, tables.joint()) < 1e-6


@pytest.mark.parametrize("near", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_block_keeps_at_least_as_many_tokens(near, deterministic):
    more = 0.0
    for seed in range(4):
        tables = Tables(4, 5, seed=seed, near=near)
        kept = [
            texts(tables, ops.verify_draft, block=block, seed=2, deterministic=deterministic, rounds=1)[1]
            for block in (False, True)
        ]
        # Same drafts and uniforms: what is left of chance in the difference of two means of up to 4 tokens.
        assert kept[1] > kept[0] - 3 * 4 / SAMPLES**0.5
        more += kept[1] - kept[0]
    assert more > (0 if deterministic else 0.01)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_acceptance_of_one_token_is_what_target_and_draft_share(block):
    tables = Tables(4, 2, seed=9)
    _, kept = texts(tables, ops.verify_draft, block=block, seed=3)
    shared = float(torch.minimum(tables.target[0].exp(), tables.draft[0].exp()).sum())
    assert abs(kept - shared) < 4 * (shared * (1 - shared) / SAMPLES) ** 0.5


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_a_draft_from_the_target_is_kept_whole(block):
    tables = Tables(4, 4, seed=9)
    tables.draft = tables.target
    _, kept = texts(tables, ops.verify_draft, block=block, rows=2**14)
    assert kept == 3
