"""Where tokens stand in their rows, however a pass says it, and what of a bank acts at them."""

import pytest
import torch

import personafast as pf
from personafast.models.places import Generation, Places, Prompts
from personafast.models.steps import END, NOBODY, HeldSteps, RowSteps, Step, Table, Window

CPU = torch.device("cpu")


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


LIVE = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
INDEX = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, -1, 3, 4], [0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("past", [0, 1, 4, torch.tensor(0), torch.tensor(4)])
@pytest.mark.parametrize("wider", [0, 3])
def test_a_mask_over_all_columns_tells_indices(past, wider):
    """A static cache tells its length as a tensor, and its mask may be as wide as the cache."""
    mask = torch.cat([LIVE, torch.zeros(3, wider, dtype=torch.long)], dim=1)
    places = Places({"attention_mask": mask, "past_key_values": Cache(past)}, None)
    start = int(past)
    assert torch.equal(places.index(3, 6 - start, CPU), INDEX[:, start:])
    assert places.begins == (start == 0)


def test_the_length_of_the_cache_is_that_before_the_pass():
    length = torch.tensor(2)
    places = Places({"past_key_values": Cache(length)}, None)
    length += 3
    assert places.index(2, 3, CPU).tolist() == [[2, 3, 4]] * 2


def test_a_mask_of_another_form_needs_positions_beside_it():
    mask, positions = torch.ones(2, 1, 3, 5), torch.tensor([[0, 1, 2], [2, 3, 4]])
    assert torch.equal(Places({"attention_mask": mask, "position_ids": positions}, None).index(2, 3, CPU), positions)
    for inputs in ({"attention_mask": mask}, {"attention_mask": {"full": mask}}):
        with pytest.raises(pf.PersonafastError, match=r"attention_mask: a mask that is not \[rows, columns\]"):
            Places(inputs, None).index(2, 3, CPU)
    with pytest.raises(pf.PersonafastError, match="attention_mask: 6 columns for 2 tokens in the cache and 6 new"):
        Places({"attention_mask": LIVE, "past_key_values": Cache(2)}, None).index(3, 6, CPU)


def lengths(inputs, generation=None, told=None):
    places = Places(inputs, generation)
    return Prompts(told).of(places, places.index(3, 6, CPU)).tolist()


def test_who_tells_the_prompts_length():
    masked = {"attention_mask": LIVE}
    assert lengths(masked) == [4, 5, 6]
    assert lengths(masked, Generation(4, None)) == [2, 3, 4]
    assert lengths(masked, Generation(4, LIVE[:, :4])) == [2, 3, 4]
    assert lengths({}, Generation(4, None)) == [4, 4, 4]
    # What the caller says comes first, and beams repeat rows.
    assert lengths(masked, Generation(4, None), [1]) == [1, 1, 1]
    assert lengths({"attention_mask": torch.ones(3, 1, 6, 6), "position_ids": INDEX}, Generation(4, None)) == [2, 3, 4]
    with pytest.raises(pf.PersonafastError, match="prompt_lengths: 2 given for a batch of 3"):
        lengths(masked, None, [1, 2])


def test_a_later_pass_remembers_the_prompts_and_another_text_forgets_them():
    prompts = Prompts()
    first, later = Places({"attention_mask": LIVE}, None), Places({"past_key_values": Cache(6)}, None)
    with pytest.raises(pf.PersonafastError, match="prompt_lengths: this pass goes on from a cache"):
        prompts.check(later)
    prompts.of(first, first.index(3, 6, CPU))
    prompts.check(later)
    assert prompts.of(later, later.index(3, 1, CPU)).tolist() == [4, 5, 6]
    shorter = Places({}, None)
    assert prompts.of(shorter, shorter.index(3, 2, CPU)).tolist() == [2, 2, 2]


def test_slots_and_scales_of_tokens():
    two_spans = Window(spans=(((0, 0), (1, 0)), ((-1, 1), (1, 1))))
    decaying = Window(first=3, strength=2.0, start=1.0, end=0.5, steps=2)
    table = Table.of([Step(0, 7, frozenset(), two_spans), None, Step(0, 3, frozenset(), decaying)])
    assert table.bounds.shape[1] == 2
    slots, scale = table.spread(INDEX, torch.tensor([3, 3, 2]), scaled=True)
    assert slots.view(3, 6).tolist() == [
        [NOBODY, NOBODY, 7, NOBODY, 7, 7],
        [NOBODY] * 6,
        [3, 3, 3, 3, NOBODY, NOBODY],
    ]
    assert scale.view(3, 6)[2].tolist() == [2.0, 2.0, 1.5, 1.0, 1.0, 1.0]
    assert scale.view(3, 6)[0].tolist() == [1.0] * 6
    assert table.spread(INDEX, torch.tensor([3, 3, 2]), scaled=False)[1] is None


def test_held_steps_are_those_of_rows_and_leave_nothing_behind():
    response = Window(spans=(((-1, 1), (END, 0)),), strength=0.5)
    first = RowSteps(
        [(Step(0, 1, frozenset({0})), Step(1, 2, frozenset({1}), response)), (Step(1, 6, frozenset({1}), response),)],
        Prompts([2, 2]),
    )
    second = RowSteps([(Step(1, 4, frozenset({1}), response),)], Prompts([1]))
    held = HeldSteps(3, CPU)
    index = torch.arange(3).expand(3, 3)
    kinds = []
    for rows, slots in (
        (first, {0: [1] * 3 + [NOBODY] * 6, 1: [NOBODY, 2, 2, NOBODY, 6, 6] + [NOBODY] * 3}),
        (second, {1: [4] * 3 + [NOBODY] * 6}),
    ):
        held.hold(rows)
        held.begin(index)
        lanes = held.over(3, 3, CPU, None)
        assert [lane.slots.tolist() for lane in lanes] == list(slots.values())
        assert [lane.adds for lane in lanes] == [lane % 2 == 0 for lane in slots]
        kinds.append(held.kind)
    assert kinds == [((0, 1, False, False), (1, 1, True, True)), ((1, 1, True, True),)]
