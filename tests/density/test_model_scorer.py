"""`ModelScorer`: members stay with their rows when rows leave the batch, in mixed and ragged batches."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.density.model_scorer import Member, ModelScorer
from personafast.density.transcript import GenerationStats
from personafast.models.anatomy import anatomy
from personafast.models.patch import Patch

pytestmark = pytest.mark.usefixtures("reference_backend")
CPU = torch.device("cpu")


@pytest.fixture
def patch(net):
    found = Patch(net, anatomy(net), 4)
    found.install()
    library = tiny.library(net, masks=False)
    names = ("formal", "warm")
    found.set_adapters([{p: (f.a, f.b, f.scale) for p, f in library.policies[n].factors.items()} for n in names])
    yield found
    found.remove()


@pytest.fixture
def other(library):
    """Another model of the same family, with the same adapters."""
    second = tiny.model("llama", 7)
    found = Patch(second, anatomy(second), 4)
    found.install()
    policies = [tiny.policy(second, seed) for seed in (1, 2)]
    found.set_adapters([{p: (f.a, f.b, f.scale) for p, f in policy.factors.items()} for policy in policies])
    yield found
    found.remove()


def scorer(patch, texts, references, policies, ahead, other=None):
    """Rows with texts as prompts; `references` says who has one, `policies` lists every row's adapters.

    `ahead` lists the adapter that proposes in every row, -1 for the reference; policy slots of 10 and more are those of
    the patch `other`.
    """

    def member(text, slot):
        return Member(text, (), -1, slot) if slot < 10 else Member(text, (), -1, slot - 10, other)

    return ModelScorer(
        patch,
        [member(text, -1) if has else None for text, has in zip(texts, references, strict=True)],
        [[member(text, slot) for slot in slots] for text, slots in zip(texts, policies, strict=True)],
        ahead=None if ahead is None else [member(text, slot) for text, slot in zip(texts, ahead, strict=True)],
        stats=GenerationStats(),
        device=CPU,
    )


def logits(known, draft, ahead, last):
    """Everything a scorer says in one round over a draft, of which the `last` tokens are not fed."""
    proposed = [known.propose(draft[:, :j]) for j in range(draft.shape[1])] if ahead else []
    return proposed + list(known.score(draft[:, : draft.shape[1] - last], reference=True))


def draw(generator, rows, width):
    return torch.randint(3, tiny.VOCAB, (rows, width), generator=generator)


TEXTS = [4, 2, 5, 3, 4, 1]
POLICIES = [[0, 1], [1], [0], [1, 0], [0], [1, 0]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("ahead", "references", "policies"),
    [
        pytest.param([-1] * 6, [True] * 6, POLICIES, id="reference ahead"),
        pytest.param([0, -1, 1, -1, 0, 1], [True] * 6, POLICIES, id="some references ahead"),
        pytest.param([1] * 6, [True, False, True, True, False, True], POLICIES, id="a policy ahead"),
        pytest.param(None, [True] * 6, POLICIES, id="nobody ahead"),
        pytest.param(None, [True] * 6, [[0, 1]] * 6, id="the same policies everywhere"),
        pytest.param(None, [False] * 6, [[0, 1]] * 6, id="no reference"),
        pytest.param(None, [True, False, True, True, False, True], POLICIES, id="some references"),
        pytest.param(None, [True] * 6, [[10, 1], [11], [0], [1, 10], [], [11, 0]], id="two models"),
        pytest.param([-1] * 6, [True] * 6, [[10], [11], [], [10, 11], [10], [11]], id="policies elsewhere"),
    ],
)
@pytest.mark.parametrize("leave", [[[1, 2, 4, 5], [0, 2, 3]], [[0, 3, 5], [1, 2]]])
@pytest.mark.parametrize("last", [0, 1])
def test_members_stay_with_their_rows_when_others_leave(patch, other, ahead, references, policies, leave, last):
    """A running scorer, rolled back row by row, says what a fresh one says of the same texts."""
    generator = torch.Generator().manual_seed(6)
    texts = [draw(generator, 1, n)[0].tolist() for n in TEXTS]
    running = scorer(patch, texts, references, policies, ahead, other)
    for rows in [*leave, None]:
        width = 3 if ahead else 1 + last
        draft = draw(generator, len(texts), width)
        fresh = scorer(patch, texts, references, policies, ahead, other)
        said, wanted = (logits(known, draft, ahead, last) for known in (running, fresh))
        assert len(said) == len(wanted) == (5 if ahead else 2)
        for one, two in zip(said, wanted, strict=True):
            # The widest row may have left: a running scorer keeps room for its policies.
            one = one[: two.shape[0]] if one.dim() == 4 else one
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        # One token may come that was not in the draft, and take the place of one that was.
        new = torch.cat([draft, draw(generator, len(texts), 1)], dim=1)
        counts = torch.randint(0, width - last + 2, (len(texts),), generator=generator)
        for row, count in enumerate(counts.tolist()):
            if count:
                new[row, count - 1] = draw(generator, 1, 1)
        running.commit(new, counts)
        texts = [text + more[:n] for text, more, n in zip(texts, new.tolist(), counts.tolist(), strict=True)]
        if rows is not None:
            running.keep(torch.tensor(rows))
            texts, references, policies = ([part[row] for row in rows] for part in (texts, references, policies))
            ahead = ahead and [ahead[row] for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("policies", [[[0, 1]] * 4, [[10, 11, 0], [11, 0, 1], [0, 10, 1], [1, 10, 11]]])
def test_one_policy_a_row_speaks_and_the_others_catch_up(patch, other, policies):
    generator = torch.Generator().manual_seed(3)
    texts = [draw(generator, 1, n)[0].tolist() for n in (3, 1, 4, 2)]
    running = scorer(patch, texts, [False] * 4, policies, None, other)
    for leave in (None, None, [0, 2, 3], None, [1, 2], None):
        member = torch.randint(0, len(policies[0]), (len(texts),), generator=generator)
        draft = draw(generator, len(texts), 3)
        fresh = scorer(patch, texts, [False] * len(texts), policies, None, other)
        for j in range(4):
            said, wanted = (known.speak(member, draft[:, :j]) for known in (running, fresh))
            torch.testing.assert_close(said, wanted, atol=1e-4, rtol=1e-4)
        new = torch.cat([draft, draw(generator, len(texts), 1)], dim=1)
        counts = torch.randint(0, 5, (len(texts),), generator=generator)
        running.commit(new, counts)
        texts = [text + more[:n] for text, more, n in zip(texts, new.tolist(), counts.tolist(), strict=True)]
        if leave is not None:
            running.keep(torch.tensor(leave))
            texts, policies = ([part[row] for row in leave] for part in (texts, policies))


def test_rows_that_end_at_different_times_speak_as_they_do_alone(net, library):
    """Some rows need the reference, some do not, some have no policy at all."""
    ids = torch.randint(3, tiny.VOCAB, (9, 4), generator=torch.Generator().manual_seed(1))
    kinds = [{"formal": 1.0, "warm": 1.0}, {"formal": 0.6, "warm": 0.4}, {}]
    personas = [pf.Persona(policies=kinds[row % 3]) for row in range(9)]
    options = {"max_new_tokens": 14, "do_sample": True, "top_k": 0, "eos_token_id": list(range(3, 11))}
    with pf.attach(net, library) as handle:
        options |= {"custom_generate": handle.generate, "pad_token_id": 0}
        out = net.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), personas=personas, seeds=list(range(9)), **options
        )
        lengths = set()
        for row in range(9):
            one = ids[row : row + 1]
            alone = net.generate(
                input_ids=one, attention_mask=torch.ones_like(one), personas=personas[row], seeds=[row], **options
            )[0]
            lengths.add(alone.numel())
            assert out[row, : alone.numel()].tolist() == alone.tolist() and not out[row, alone.numel() :].any()
    assert len(lengths) > 4


def test_models_run_side_by_side_on_a_gpu_and_what_reads_their_logits_waits_for_all(monkeypatch):
    from personafast.density import model_scorer

    log, streams = [], []

    class Stream:
        def __init__(self, name="here"):
            self.name = name if isinstance(name, str) else f"side {len(streams)}"
            if not isinstance(name, str):
                streams.append(self)

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            log.append(f"enter {self.name}")

        def __exit__(self, *_):
            log.append(f"leave {self.name}")

    here = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    net, other = tiny.model(), tiny.model(seed=3)
    patches = [Patch(part, anatomy(part), 1) for part in (net, other)]
    for patch in patches:
        patch.install()
    rows = [Member([5, 6], (), -1, -1), Member([7], (), -1, -1)]
    policies = [[Member([5, 6], (), -1, -1, patches[1])], [Member([7], (), -1, -1, patches[1])]]

    def scores(fork):
        scorer = ModelScorer(patches[0], rows, policies, stats=GenerationStats(), device=torch.device("cpu"))
        if fork:
            scorer._device = torch.device("cuda")
        with torch.no_grad():
            return scorer.score(torch.zeros(2, 0, dtype=torch.long), reference=True)

    expected = scores(fork=False)
    assert log == []
    found = scores(fork=True)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert log == [
        "side 0 waits for here",
        "enter side 0",
        "kept for here",
        "leave side 0",
        "side 1 waits for here",
        "enter side 1",
        "kept for here",
        "leave side 1",
        "here waits for side 0",
        "here waits for side 1",
    ]
    log.clear()
    monkeypatch.setattr(model_scorer, "FORK", False)
    scores(fork=True)
    assert log == []
