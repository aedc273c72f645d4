"""What a row's target depends on, and what drafts for it."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.density.model_scorer import Member
from personafast.models.rows import RowSlots
from personafast.row import Row

MEMBER = Member([1], (), -1, -1)
ROWS = 16


@pytest.mark.parametrize(
    ("aggregator", "weights", "on_base", "needed"),
    [
        ("geometric", [0.6, 0.4], False, False),
        ("geometric", [1.0, 1.0], False, True),
        # On a base the reference's exponent is -sum alpha, and no longer 1 - sum alpha.
        ("geometric", [0.6, 0.4], True, True),
        ("geometric", [1.0, -1.0], True, False),
        ("linear", [0.6, 0.4], False, False),
        ("linear", [0.6, 0.4], True, True),
        ("harmonic", [1.0, 1.0], False, False),
        ("jensen_shannon", [0.5, 0.5], False, True),
        (lambda ratios, alpha: ratios[0], [1.0], False, True),
        ("geometric", [], False, True),
        ("geometric", [], True, False),
    ],
)
def test_the_reference_takes_part_where_the_target_depends_on_it(aggregator, weights, on_base, needed):
    row = Row(MEMBER, [MEMBER] * len(weights), weights, True, aggregator, base=MEMBER if on_base else None)
    assert row.needs_reference is needed


@pytest.mark.usefixtures("reference_backend")
def test_on_a_base_with_weights_that_sum_to_one_the_ratio_is_over_the_reference(net, library):
    """Greedy: log b + log pi - log pi_0 by hand, from each policy's own logits."""
    ids = torch.randint(3, tiny.VOCAB, (ROWS, 6), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 1, "do_sample": False, "min_p": 0.0}
    with torch.no_grad(), pf.attach(net, library) as handle:
        persona = pf.Persona(policies={"warm": 1.0}, base="formal")
        row = handle.cast.rows([persona], [[3]], "direct", "reference")[0]
        logps = []
        for member in (row.base, row.policies[0], row.reference):
            with handle.cast.patch.rows(RowSlots.of([()] * ROWS, [-1] * ROWS, [member.adapter] * ROWS)):
                logps.append(net(ids).logits[:, -1].log_softmax(-1))
        wanted = (logps[0] + logps[1] - logps[2]).argmax(-1)
        found = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=handle.generate,
            personas=persona,
            **options,
        )
    assert torch.equal(found[:, -1], wanted)


def test_a_base_takes_part_in_the_merge_that_drafts(net, library):
    with pf.attach(net, library) as handle:
        based = pf.Persona(policies={"warm": 1.0}, base="formal")
        both = pf.Persona(policies={"warm": 1.0, "formal": 1.0})
        draft = handle.cast.rows([based], [[3, 4]], "block", "merge", 1.0)[0].draft
        merged = handle.cast.rows([both], [[3, 4]], "merge", "reference")[0].reference
        alone = handle.cast.rows([pf.Persona(policies={"warm": 1.0})], [[3, 4]], "merge", "reference")[0].reference
    assert draft == merged != alone
