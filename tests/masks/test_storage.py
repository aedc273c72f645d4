"""Masks on disk: one base, differences that come back bit for bit, and as few bytes as the arithmetic says."""

import json
import struct

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast._io import read_safetensors, write_safetensors
from personafast.masks import PersonaMask, delta, storage
from personafast.masks.majority import majority

# Llama-2-7B: 32 blocks of q, k, v, o [4096, 4096] and gate, up, down [11008, 4096].
SEVEN_B = [4096 * 4096] * (4 * 32) + [4096 * 11008] * (3 * 32)


def draw(seed):
    return torch.Generator().manual_seed(seed)


def random_words(rows, columns, seed):
    return pf.ops.pack_mask(torch.rand(rows, columns, generator=draw(seed)) < 0.5)


def flipped(words, columns, share, seed):
    """The words with a random share of their bits flipped."""
    return words ^ pf.ops.pack_mask(torch.rand(words.shape[0], columns, generator=draw(seed)) < share)


@pytest.mark.parametrize("share", [0, 0.0005, 0.0134, 0.05, 0.3, 0.5, 0.97, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (64, 37), (129, 1000)])
def test_a_difference_comes_back_bit_for_bit(shape, share):
    base = random_words(*shape, 0)
    words = flipped(base, shape[1], share, 1)
    stream = delta.encode(words, base)
    assert stream.dtype == torch.uint8 and torch.equal(delta.decode(stream, base), words)
    assert torch.equal(base, random_words(*shape, 0))


def test_the_ends_of_a_mask_and_bits_beyond_its_width_are_kept():
    base = torch.zeros(2, 2, dtype=torch.int32)
    for words in ([[1, 0], [0, 0]], [[0, 0], [0, -(2**31)]], [[1, 0], [0, -(2**31)]], [[-1, -1], [-1, -1]]):
        words = torch.tensor(words, dtype=torch.int32)
        assert torch.equal(delta.decode(delta.encode(words, base), base), words)


def test_a_difference_from_a_larger_mask_is_refused():
    base = torch.zeros(2, 3, dtype=torch.int32)
    words = base.clone()
    words[1, 2] = 1
    with pytest.raises(pf.FormatError, match="does not fit its base"):
        delta.decode(delta.encode(words, base), base[:, :2].contiguous())


@pytest.mark.parametrize("share", [0.001, 0.0134, 0.05, 0.2, 0.6])
def test_no_other_number_of_low_bits_is_smaller(share):
    bits = torch.rand(100_000, generator=draw(5)) < share
    places = bits.nonzero().flatten()
    gaps = places.diff(prepend=torch.tensor([-1])) - 1
    sizes = [k * -(-len(gaps) // 8) + -(-(int((gaps >> k).sum()) + len(gaps)) // 8) for k in range(24)]
    words = pf.ops.pack_mask(bits[None])
    assert len(delta.encode(words, torch.zeros_like(words))) == delta.HEAD_BYTES + min(sizes)


def test_the_layout_of_a_difference():
    """Places 0, 5 and 70: gaps 0, 4 and 64, of which k = 4 bits each lie in planes and the quotients are 0, 0, 4."""
    words = torch.tensor([[0b100001, 0, 1 << 6]], dtype=torch.int32)
    stream = delta.encode(words, torch.zeros_like(words))
    assert bytes(stream.tolist()) == struct.pack("<QB", 3, 4) + bytes([0, 0, 0b010, 0]) + bytes([0b1000011])


def test_a_random_difference_costs_what_the_arithmetic_says_and_little_more_than_its_entropy():
    for share in (0.0134, 0.05):
        base = random_words(512, 2048, 2)
        stream = delta.encode(flipped(base, 2048, share, 3), base)
        entropy = -(share * torch.tensor(share).log2() + (1 - share) * torch.tensor(1 - share).log2()).item()
        assert len(stream) == pytest.approx(delta.expected_bytes(512 * 2048, share), rel=0.02)
        assert 0.99 < len(stream) * 8 / (512 * 2048 * entropy) < 1.04
    assert delta.expected_bytes(4096, 0) == delta.HEAD_BYTES
    assert delta.expected_bytes(4096, 1) == delta.HEAD_BYTES + 512


def test_bytes_a_persona_adds_to_a_7b_model():
    """By arithmetic: the masks of the authors are a byte a weight, ours as a whole a bit."""
    assert sum(SEVEN_B) == 6_476_005_376
    assert storage.expected_bytes(SEVEN_B, 0.5) == sum(SEVEN_B) // 8 == 809_500_672
    near, far = (storage.expected_bytes(SEVEN_B, share) for share in (0.0134, 0.05))
    assert near == pytest.approx(83.8e6, rel=0.005) and far == pytest.approx(234.2e6, rel=0.005)
    assert sum(SEVEN_B) / near == pytest.approx(77, abs=0.5) and sum(SEVEN_B) / far == pytest.approx(27.7, abs=0.2)


@pytest.mark.parametrize("share", [0.0134, 0.05])
def test_a_scaled_down_7b_library_adds_what_the_arithmetic_says(tmp_path, share):
    """A block of the same proportions at a sixteenth of the width: what the second persona adds to the files."""
    shapes = {f"model.layers.0.self_attn.{name}_proj": (256, 256) for name in "qkvo"}
    shapes |= {f"model.layers.0.mlp.{name}_proj": (688, 256) for name in ("gate", "up")}
    shapes["model.layers.0.mlp.down_proj"] = (256, 688)
    widths = {path: columns for path, (_, columns) in shapes.items()}
    first = {path: random_words(*shape, seed) for seed, (path, shape) in enumerate(shapes.items())}
    second = {path: flipped(words, widths[path], share, 99 + i) for i, (path, words) in enumerate(first.items())}
    library = pf.PersonaLibrary()
    library.add_mask("one", PersonaMask(first, widths))
    library.save_pretrained(tmp_path / "one")
    library.add_mask("two", PersonaMask(second, widths))
    library.save_pretrained(tmp_path / "two")

    def on_disk(folder):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    added, (by_mask, base) = (
        on_disk(tmp_path / "two") - on_disk(tmp_path / "one"),
        storage.stored_bytes(tmp_path / "two"),
    )
    expected = storage.expected_bytes([rows * columns for rows, columns in shapes.values()], share)
    assert by_mask["two"] == pytest.approx(expected, rel=0.03)
    assert base == sum(4 * words.numel() for words in first.values())
    # The first mask is the base, so its own difference is empty. Headers of the files come on top.
    assert by_mask["one"] == delta.HEAD_BYTES * len(shapes) and by_mask["one"] <= added - by_mask["two"] < 3000


def test_the_base_is_what_most_masks_have():
    for count in range(1, 12):
        bits = [torch.rand(3, 70, generator=draw(10 * count + i)) < 0.5 for i in range(count)]
        votes = sum(part.int() for part in bits)
        expected = torch.where(2 * votes == count, bits[0], 2 * votes > count)
        assert torch.equal(pf.ops.unpack_mask(majority([pf.ops.pack_mask(part) for part in bits]), 70), expected)


def family(count, share=0.02, paths=("model.layers.0.a", "model.layers.1.b"), columns=300):
    """Masks that each differ from one another by a random share."""
    core = {path: random_words(200, columns, i) for i, path in enumerate(paths)}
    widths = dict.fromkeys(paths, columns)
    return {
        f"p{n}": PersonaMask(
            {path: flipped(words, columns, share, 50 * n + i) for i, (path, words) in enumerate(core.items())}, widths
        )
        for n in range(count)
    }


def save(masks, folder):
    library = pf.PersonaLibrary()
    for name, mask in masks.items():
        library.add_mask(name, mask)
    library.save_pretrained(folder)
    return folder


def assert_same(masks, folder):
    again = pf.PersonaLibrary.from_pretrained(folder).masks
    assert set(again) == set(masks)
    for name, mask in masks.items():
        assert again[name].in_features == mask.in_features and dict(again[name].metadata) == dict(mask.metadata)
        assert all(torch.equal(again[name].words[path], words) for path, words in mask.words.items())


def version(folder):
    return json.loads((folder / "library.json").read_text())["format_version"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_masks_that_differ_little_share_a_base(tmp_path, count):
    masks = family(count)
    folder = save(masks, tmp_path / "library")
    assert_same(masks, folder)
    by_mask, base = storage.stored_bytes(folder)
    assert version(folder) == 2 and base == 2 * 200 * 10 * 4
    assert sum(by_mask.values()) < 0.15 * count * base
    # Whatever order they were added in, the bytes are the same.
    other = save(dict(reversed(masks.items())), tmp_path / "other")
    for file in folder.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_masks_that_have_nothing_in_common_are_stored_as_they_are(tmp_path):
    masks = {name: next(iter(family(1, paths=(f"model.layers.{i}.a",)).values())) for i, name in enumerate("ab")}
    masks["c"] = PersonaMask({"model.layers.0.a": random_words(200, 300, 77)}, {"model.layers.0.a": 300})
    folder = save(masks, tmp_path / "library")
    assert_same(masks, folder)
    assert version(folder) == 1 and not (folder / storage.BASE).exists()
    assert storage.stored_bytes(folder) == ({name: 200 * 10 * 4 for name in "abc"}, 0)


def test_a_stranger_among_them_is_stored_whole_beside_the_base(tmp_path):
    masks = family(4)
    paths = list(masks["p0"].words)
    masks["stranger"] = PersonaMask({paths[0]: random_words(200, 300, 78)}, {paths[0]: 300}, {"gamma": 0.25})
    masks["narrow"] = PersonaMask({paths[1]: random_words(200, 290, 79)}, {paths[1]: 290})
    folder = save(masks, tmp_path / "library")
    assert_same(masks, folder)
    tensors, _ = read_safetensors(folder / storage.MASKS)
    assert tensors[f"stranger::{paths[0]}"].dtype == torch.int32
    assert tensors[f"p3::{paths[0]}"].dtype == torch.uint8


def test_the_zoos_masks_of_the_first_format_are_read_and_get_smaller(tmp_path):
    library = pf.zoo.load()[2]
    assert version(pf.zoo.path() / "library") == 1
    library.save_pretrained(tmp_path / "library")
    assert_same(library.masks, tmp_path / "library")
    by_mask, base = storage.stored_bytes(tmp_path / "library")
    before, _ = storage.stored_bytes(pf.zoo.path() / "library")
    assert version(tmp_path / "library") == 2
    assert sum(by_mask.values()) + base < 0.4 * sum(before.values())


def change(file, edit):
    tensors, metadata = read_safetensors(file)
    edit(tensors)
    write_safetensors(file, tensors, metadata)


def cut(key, keep):
    def edit(tensors):
        tensors[key] = tensors[key][: keep(len(tensors[key]))]

    return edit


def put(key, index, value):
    def edit(tensors):
        tensors[key].view(-1)[index] = value

    return edit


ONE = "p1::model.layers.0.a"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / storage.BASE).unlink(), r"mask_base\.safetensors: no such file"),
        (lambda f: change(f / storage.BASE, put("model.layers.0.a", 3, 5)), r"mask_base\.safetensors: not the base"),
        (lambda f: change(f / storage.BASE, lambda t: t.pop("model.layers.0.a")), "not the base that the masks"),
        (
            lambda f: change(f / storage.MASKS, cut(ONE, lambda n: 5)),
            r"masks\.safetensors: 'p1' of .*0\.a: .* cut short",
        ),
        (lambda f: change(f / storage.MASKS, cut(ONE, lambda n: n - 1)), "'p1' of .*cut short or damaged"),
        (lambda f: change(f / storage.MASKS, cut(ONE, lambda n: 12)), "'p1' of .*cut short or damaged"),
        (lambda f: change(f / storage.MASKS, put(ONE, 7, 255)), "'p1' of .*does not fit its base"),
        (lambda f: change(f / storage.MASKS, put(ONE, 8, 200)), "'p1' of .*does not fit its base"),
        (lambda f: change(f / storage.MASKS, put(ONE, 8, 20)), "'p1' of .*(cut short|does not fit)"),
        (lambda f: change(f / storage.MASKS, lambda t: t.pop(ONE)), r"lacks the mask 'p1' of model\.layers\.0\.a"),
        (lambda f: (f / storage.MASKS).write_bytes((f / storage.MASKS).read_bytes()[:-9]), "truncated"),
    ],
)
def test_a_damaged_difference_is_named_in_one_line(tmp_path, damage, message):
    folder = save(family(3), tmp_path / "library")
    damage(folder)
    with pytest.raises(pf.FormatError, match=message) as caught:
        pf.PersonaLibrary.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_index_that_forgets_the_base_is_refused(tmp_path):
    folder = save(family(3), tmp_path / "library")
    index = json.loads((folder / "library.json").read_text())
    del index["mask_base"]
    (folder / "library.json").write_text(json.dumps(index))
    with pytest.raises(pf.FormatError, match=r"'p0' of model\.layers\.0\.a is a difference from mask_base"):
        pf.PersonaLibrary.from_pretrained(folder)


def test_a_real_pair_of_opposing_masks(tmp_path):
    net = tiny.model()
    library = tiny.library(net)
    library.add_mask("extrovert", library.masks["introvert"].with_metadata(method="same"))
    library.save_pretrained(tmp_path / "library")
    assert_same(library.masks, tmp_path / "library")
    by_mask, _ = storage.stored_bytes(tmp_path / "library")
    assert set(by_mask.values()) == {delta.HEAD_BYTES * len(library.masks["introvert"].words)}
