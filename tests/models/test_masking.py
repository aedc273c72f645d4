"""Masks at work: hard, soft and mixed gates, row by row, against weights that are multiplied by hand."""

import pytest
import torch
from helpers import gates, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import personafast as pf
from personafast.errors import PersonafastError

HARD, SOFT, OTHER = pf.Persona(mask="hard"), pf.Persona(mask="soft"), pf.Persona(mask="other")
MIXED = pf.Persona(mask={"hard": 0.7, "soft": 0.3})


def made(net):
    return {
        "hard": gates.random_mask(net, 1),
        "soft": gates.random_mask(net, 2, gamma=0.3),
        "other": gates.random_mask(net, 3, gamma=0.6, leave=("q_proj", "down_proj")),
    }


@pytest.fixture
def masks(net):
    return made(net)


def library_of(net, masks):
    library = pf.PersonaLibrary(tiny.anatomy(net).shape)
    for name, mask in masks.items():
        library.add_mask(name, mask)
    return library


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (6, 5), generator=torch.Generator().manual_seed(4))


ROWS = [HARD, None, SOFT, MIXED, OTHER, pf.Persona(mask={"other": 3.0, "hard": 1.0, "soft": 0.0})]
SHARES = [{"hard": 1.0}, {}, {"soft": 1.0}, {"hard": 0.7, "soft": 0.3}, {"other": 1.0}, {"other": 0.75, "hard": 0.25}]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_row_speaks_through_its_own_gate(family, backend, ids):
    net = tiny.model(family)
    masks = {
        "hard": gates.random_mask(net, 1),
        "soft": gates.random_mask(net, 2, gamma=0.3),
        "other": gates.random_mask(net, 3, gamma=0.6, leave=("q_proj", "c_proj", "dense")),
    }
    expected = [
        gates.gated(net, masks, shares)(ids[row : row + 1]).logits[0] if shares else net(ids[row : row + 1]).logits[0]
        for row, shares in enumerate(SHARES)
    ]
    with pf.ops.use_backend(backend), pf.attach(net, library_of(net, masks)):
        found = net(ids, personas=ROWS).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
@pytest.mark.usefixtures("reference_backend")
def test_texts_are_those_of_the_models_multiplied_by_hand(net, masks, ids, graphs):
    three = {"hard": 0.25, "soft": 0.25, "other": 0.5}
    ids = torch.cat([ids, ids[:1]])
    personas, all_shares = [*ROWS, pf.Persona(mask=three)], [*SHARES, three]
    expected = [
        stock(gates.gated(net, masks, shares) if shares else net, ids[row : row + 1])[0]
        for row, shares in enumerate(all_shares)
    ]
    # What is recorded for rows of single masks must not be replayed for mixtures, nor that of two masks for three.
    singles, twos, threes = [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [6, 3, 6, 0, 1, 2]
    for orders in ([singles, twos, threes, singles], [[6], singles, twos[::-1]]):
        with pf.attach(net, library_of(net, masks), graphs=graphs) as handle:
            for order in orders:
                found = spoken(net, handle, ids[order], [personas[row] for row in order])
                assert torch.equal(found, torch.stack([expected[row] for row in order]))


def stock(net, ids, **options):
    return net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options)


def spoken(net, handle, ids, personas, **options):
    return stock(net, ids, custom_generate=handle.generate, personas=personas, **options)


@torch.no_grad()
def test_rows_of_one_mask_keep_their_bits_beside_a_mixture(net, masks, ids):
    with pf.attach(net, library_of(net, masks)):
        alone = net(ids, personas=[HARD, None, SOFT, HARD, OTHER, None]).logits
        beside = net(ids, personas=[HARD, None, SOFT, MIXED, OTHER, None]).logits
    assert torch.equal(alone[[0, 1, 2, 4, 5]], beside[[0, 1, 2, 4, 5]])
    assert not torch.equal(alone[3], beside[3])


@torch.no_grad()
def test_hard_masks_are_run_without_gammas(net, masks, ids, monkeypatch):
    given = []
    monkeypatch.setattr("personafast.models.masking.masked_linear", spy(given))
    with pf.attach(net, library_of(net, masks)):
        net(ids[:2], personas=[HARD, None])
        assert given
        assert all(gamma is None for gamma in given)
        given.clear()
        net(ids[:2], personas=[HARD, SOFT])
        assert all(gamma.tolist() == pytest.approx([0.0, 0.6, 0.3]) for gamma in given)


def spy(given):
    def linear(x, weight, words, slots, gamma, bias):
        given.append(gamma)
        return pf.ops.masked_linear(x, weight, words, slots, gamma, bias)

    return linear


@torch.no_grad()
def test_a_mask_added_after_attaching_costs_its_own_bits(net, masks, ids):
    plain, library = tiny.model(), library_of(net, masks)
    bank = pf.attach(net, library).cast.patch.masks
    for seed in range(4):
        late = gates.random_mask(plain, 10 + seed, gamma=0.1 * seed)
        library.add_mask(f"late{seed}", late)
        before = addresses(bank)
        found = net(ids[:3], personas=[pf.Persona(mask=f"late{seed}"), HARD, MIXED]).logits
        # The second one finds the room that the first one has made for half as many masks again as there were.
        assert (addresses(bank) == before) == (seed in (1, 3))
        # Made again: those that are attached have their bits in the bank.
        known = {**made(plain), "late": gates.random_mask(plain, 10 + seed, gamma=0.1 * seed)}
        for row, shares in enumerate(({"late": 1.0}, {"hard": 1.0}, {"hard": 0.7, "soft": 0.3})):
            expected = gates.gated(plain, known, shares)(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, rtol=2e-4, atol=2e-4)


def addresses(bank):
    return {path: words.data_ptr() for path, words in bank.tensors.items()}


@torch.no_grad()
def test_a_replaced_mask_is_heard_and_the_old_one_keeps_its_bits(net, masks, ids):
    plain, library = tiny.model(), library_of(net, masks)
    kept = {path: words.clone() for path, words in masks["hard"].words.items()}
    pf.attach(net, library)
    net(ids[:2], personas=[HARD, MIXED])
    for seed in (20, 21, 22):
        new = gates.random_mask(plain, seed)
        library.add_mask("hard", new)
        found = net(ids[:2], personas=[HARD, MIXED]).logits
        known = {"hard": gates.random_mask(plain, seed), "soft": made(plain)["soft"]}
        for row, shares in enumerate(({"hard": 1.0}, {"hard": 0.7, "soft": 0.3})):
            expected = gates.gated(plain, known, shares)(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, rtol=2e-4, atol=2e-4)
    assert all(torch.equal(masks["hard"].words[path], words) for path, words in kept.items())


@torch.no_grad()
def test_masks_and_bank_share_one_memory_and_are_saved_as_before(net, masks, ids, tmp_path):
    before = {name: {path: words.clone() for path, words in mask.words.items()} for name, mask in masks.items()}
    library = library_of(net, masks)
    with pf.attach(net, library) as handle:
        bank = handle.cast.patch.masks.tensors
        held = {tensor.untyped_storage().data_ptr() for tensor in bank.values()}
        of_masks = {w.untyped_storage().data_ptr() for mask in masks.values() for w in mask.words.values()}
        assert of_masks == held
        library.save_pretrained(tmp_path / "library")
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library")
    for name, words in before.items():
        assert again.masks[name].gamma == masks[name].gamma
        for path, own in words.items():
            assert torch.equal(again.masks[name].words[path], own)
            assert torch.equal(masks[name].words[path], own)


@torch.no_grad()
def test_mixtures_leave_the_table_when_it_is_full(net, masks, ids):
    plain = tiny.model()
    pf.attach(net, library_of(net, masks), max_personas=2)
    for share in (0.1, 0.2, 0.3, 0.4, 0.1):
        personas = [pf.Persona(mask={"hard": share, "soft": 1 - share}), MIXED]
        found = net(ids[:2], personas=personas).logits
        for row, shares in enumerate(({"hard": share, "soft": 1 - share}, {"hard": 0.7, "soft": 0.3})):
            expected = gates.gated(plain, masks, shares)(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, rtol=2e-4, atol=2e-4)
    three = [pf.Persona(mask={"hard": share, "soft": 1.0}) for share in (1.0, 2.0, 3.0)]
    with pytest.raises(PersonafastError, match="more than 2 different mixtures of masks.*max_personas"):
        net(ids[:3], personas=three)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hard": float("nan")}, r"mask\['hard'\]: nan"),
        ({"hard": float("inf"), "soft": 1.0}, r"mask\['hard'\]: inf"),
        ({"hard": 0.0, "soft": 0.0}, "mask: no weight is above 0"),
        ({}, "mask: no weight is above 0"),
        ({"hard": 1.5, "soft": -0.5}, r"mask\['soft'\]: the weight -0.5 is negative"),
        ({"": 1.0}, "mask: a name is empty"),
        (["hard"], "expected the name of a mask, a mapping"),
        ("", "expected the name of a mask, a mapping"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(given, message):
    with pytest.raises(PersonafastError, match=message):
        pf.Persona(mask=given)


def test_what_cannot_be_run_is_refused_by_name(net, masks, ids):
    library = library_of(net, masks)
    with pf.attach(net, library), pytest.raises(PersonafastError, match="no mask 'nobody' in the library; there are"):
        net(ids[:1], personas=[pf.Persona(mask={"hard": 1.0, "nobody": 1.0})])
    with pytest.raises(PersonafastError, match="keep_dense: the mask 'soft' is soft, gamma 0.3"):
        pf.attach(net, library_of(net, {"soft": masks["soft"]}), keep_dense=False)
    pf.attach(net, library_of(net, {"hard": masks["hard"]}), keep_dense=False)
    with pytest.raises(PersonafastError, match="'hard', but only its weights were kept"):
        net(ids[:1], personas=[None])


@torch.no_grad()
def test_shares_are_normalised(net, masks, ids):
    with pf.attach(net, library_of(net, masks)):
        given = [pf.Persona(mask={"hard": 7.0, "soft": 3.0}), pf.Persona(mask={"soft": 3e30, "hard": 7e30}), MIXED]
        found = net(ids[:1].expand(3, -1), personas=given).logits
        torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-5)
        one = net(ids[:2], personas=[pf.Persona(mask={"hard": 0.4}), HARD]).logits
        assert torch.equal(one[0], net(ids[:2], personas=[HARD, HARD]).logits[0])


class Made(TorchDispatchMode):
    """The sizes of all tensors that operators give back."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [part.untyped_storage().nbytes() for part in tree_leaves(found) if isinstance(part, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return found


def test_letting_another_mask_speak_makes_and_changes_nothing_of_a_weights_size(net, masks):
    weights = list(net.parameters())
    smallest = min(weight.numel() for weight in weights if weight.dim() > 1)
    with pf.attach(net, library_of(net, masks), max_personas=4) as handle:
        bank = handle.cast.patch.masks.tensors
        versions = [tensor._version for tensor in (*weights, *bank.values())]
        with Made() as sizes:
            for personas in (
                [HARD] * 4,
                [SOFT, None, OTHER, HARD],
                [MIXED] * 4,
                [pf.Persona(mask={"hard": 1, "soft": 1})],
            ):
                with handle.using(personas):
                    pass
                handle.cast.rows(handle.cast.spread(personas, len(personas)), [[1]] * len(personas), "direct", "auto")
        assert 0 < sizes.largest <= 4 * 4 * 2 < smallest
        assert versions == [tensor._version for tensor in (*weights, *bank.values())]
        assert all(bank[path] is own for path, own in handle.cast.patch.masks.tensors.items())
