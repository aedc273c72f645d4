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


def scorer(patch, texts, references, policies, split):
    """Rows with texts as prompts; `references` says who has one, `policies` lists every row's adapters."""
    return ModelScorer(
        patch,
        [Member(text, -1, -1, -1) if has else None for text, has in zip(texts, references, strict=True)],
        [[Member(text, -1, -1, slot) for slot in slots] for text, slots in zip(texts, policies, strict=True)],
        split=split,
        stats=GenerationStats(),
        device=CPU,
    )


def logits(known, draft, split):
    """Everything a scorer says in one round over a draft."""
    proposed = [known.propose(draft[:, :j]) for j in range(draft.shape[1])] if split else []
    return proposed + [part for part in known.score(draft[:, :-1], reference=not split) if part is not None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("split", "references"),
    [(True, [True] * 6), (False, [True] * 6), (False, [True, False, True, True, False, True])],
)
@pytest.mark.parametrize("leave", [[[1, 2, 4, 5], [0, 2, 3]], [[0, 3, 5], [1, 2]]])
def test_members_stay_with_their_rows_when_others_leave(patch, split, references, leave):
    generator = torch.Generator().manual_seed(6)
    texts = [torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in (4, 2, 5, 3, 4, 1)]
    policies = [[0, 1], [1], [0], [1, 0], [0], [1, 0]]
    running = scorer(patch, texts, references, policies, split)
    for rows in [*leave, None]:
        width = 1 if not split else 3
        draft = torch.randint(3, tiny.VOCAB, (len(texts), width), generator=generator)
        fresh = scorer(patch, texts, references, policies, split)
        pairs = list(zip(logits(running, draft, split), logits(fresh, draft, split), strict=True))
        assert len(pairs) == (4 if split else 2)
        for found, wanted in pairs:
            # The widest row may have left: a running scorer keeps room for its policies.
            found = found[: wanted.shape[0]] if found.dim() == 4 else found
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        counts = torch.randint(0, width + 1, (len(texts),), generator=generator)
        running.commit(draft, counts)
        texts = [text + new[:n] for text, new, n in zip(texts, draft.tolist(), counts.tolist(), strict=True)]
        if rows is not None:
            running.keep(torch.tensor(rows))
            texts, references, policies = ([part[row] for row in rows] for part in (texts, references, policies))


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
