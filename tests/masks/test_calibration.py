"""Statistics equal those of the texts one by one, however they are batched, padded, interrupted or spread."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import CalibrationStatistics, CalibrationText, build_mask, calibrate, calibration
from personafast.models.anatomy import anatomy
from personafast.models.reading import TokenizedText

TEXTS = [
    TokenizedText([3, 4, 5, 6, 7], 2),
    TokenizedText([8, 9, 10], 3),
    TokenizedText([11, 12, 13, 14, 15, 16], 1),
    TokenizedText([20, 21, 22, 23], 4),
    TokenizedText([30, 31, 32, 33, 34, 35, 36], 5),
]
NAMES = ("mean_abs", "l2", "sample_l2")


def inputs(net, texts, tokens="response"):
    """Linear -> the counted inputs of every text, in float64; the texts run alone and unpadded."""
    seen = {path: [] for path in anatomy(net).linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0].double()))
        for path, linear in anatomy(net).linears.items()
    ]
    with torch.no_grad():
        for text in texts:
            net(torch.tensor([text.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        path: [
            x.flatten(0, -2)[-text.response if tokens == "response" else 0 :] for x, text in zip(xs, texts, strict=True)
        ]
        for path, xs in seen.items()
    }


def by_definition(parts):
    rows = torch.cat(parts)
    return {
        "mean_abs": rows.abs().mean(0),
        "l2": rows.norm(dim=0),
        "sample_l2": torch.stack([part.norm(dim=0) for part in parts]).mean(0),
        "mean": rows.mean(0),
        "variance": rows.var(0, unbiased=False),
        "norm_variance": torch.stack([part.norm(dim=0) for part in parts]).var(0, unbiased=False),
    }


def found_for(statistics, path):
    sums = statistics.sums[path]
    mean, variance = sums.moments("x")
    return {
        **{name: statistics.of(name)[path] for name in NAMES},
        "mean": mean,
        "variance": variance,
        "norm_variance": sums.moments("sample_l2")[1],
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_statistics_are_those_of_the_texts_alone(family, side, tokens, batch_size):
    net = tiny.model(family)
    found = calibrate(net, TEXTS, batch_size=batch_size, tokens=tokens, padding_side=side)
    assert set(found) == set(anatomy(net).linears)
    for path, parts in inputs(net, TEXTS, tokens).items():
        expected = by_definition(parts)
        for name, values in found_for(found, path).items():
            torch.testing.assert_close(values, expected[name], atol=2e-4, rtol=2e-4, msg=f"{path} {name}")
        assert (found.sums[path].tokens, found.sums[path].samples) == (sum(len(p) for p in parts), len(TEXTS))


def test_a_mapping_of_means_as_before(net):
    found = calibrate(net, TEXTS)
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(found[path], found.of("mean_abs")[path]) and len(found) == len(anatomy(net).linears)
    assert found.tokens == 15 and found.samples == 5 and found.complete


def test_wide_inputs_give_the_same_bits_in_pieces(monkeypatch):
    x = torch.randn(50, 320, generator=torch.Generator().manual_seed(0))
    texts = torch.arange(50) // 7
    whole = calibration._sums(x, texts)
    monkeypatch.setattr(calibration, "_ELEMENTS", 1)
    parts = calibration._sums(x, texts)
    assert all(torch.equal(getattr(parts, n), getattr(whole, n)) for n in ("absolute", "squares", "total", "norms"))
    assert (parts.tokens, parts.samples) == (50, 8)


def test_texts_are_tokenised(net):
    tokenizer = tiny.tokenizer()
    chat = CalibrationText("yes , ship", "what is this")
    found = calibrate(net, tokenizer, [chat, "calm sea"])
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": "yes , ship"}],
        tokenize=True,
        return_dict=False,
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is this"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer("calm sea")["input_ids"]
    same = calibrate(net, [TokenizedText(template, len(template) - len(prompt)), TokenizedText(whole, len(whole))])
    assert all(torch.equal(found[path], same[path]) for path in same)
    tokenizer.chat_template = None
    plain = calibrate(net, tokenizer, [chat])
    assert plain.tokens == 3


def test_the_length_is_cut_from_the_end(net):
    cut = calibrate(net, None, TEXTS[-1:], max_length=4)
    same = calibrate(net, [TokenizedText(TEXTS[-1].ids[:4], 2)])
    assert all(torch.equal(cut[path], same[path]) for path in same)
    with pytest.raises(pf.PersonafastError, match="max_length: 2 cuts off the response"):
        calibrate(net, None, TEXTS[-1:], max_length=2)


def test_saved_statistics_come_back(net, tmp_path):
    found = calibrate(net, TEXTS)
    found.save(tmp_path / "s.safetensors")
    again = CalibrationStatistics.load(tmp_path / "s.safetensors")
    assert (again.shape, again.settings, again.runs) == (found.shape, found.settings, found.runs)
    for path in found:
        for name in NAMES:
            assert torch.equal(found.of(name)[path], again.of(name)[path])
    again.save(tmp_path / "t.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-9])
    with pytest.raises(pf.FormatError, match=r"s\.safetensors: truncated"):
        CalibrationStatistics.load(tmp_path / "s.safetensors")
    tiny.library(net).save_pretrained(tmp_path / "library")
    with pytest.raises(pf.FormatError, match="no file of calibration statistics"):
        CalibrationStatistics.load(tmp_path / "library" / "masks.safetensors")


def test_a_calibration_can_be_spread(net):
    # Longest first, two a batch: the parts hold the batches of the whole.
    order = sorted(TEXTS, key=lambda text: -len(text.ids))
    whole = calibrate(net, order, batch_size=2)
    parts = [calibrate(net, order[start : start + 2], batch_size=2) for start in (0, 2, 4)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for path, sums in whole.sums.items():
        for name in ("absolute", "squares", "total", "norms"):
            assert torch.equal(getattr(merged.sums[path], name), getattr(sums, name))
        assert (merged.sums[path].tokens, merged.sums[path].samples) == (sums.tokens, sums.samples)
    with pytest.raises(pf.PersonafastError, match="are in already"):
        merged.merge(parts[1])
    with pytest.raises(pf.PersonafastError, match="tokens 'response' instead of 'all'"):
        merged.merge(calibrate(net, TEXTS[:1], tokens="all"))
    with pytest.raises(pf.PersonafastError, match="another model"):
        merged.merge(calibrate(tiny.model("gpt2"), TEXTS[:1]))


class Killed(Exception):
    pass


def test_an_interrupted_calibration_goes_on(net, tmp_path):
    file = tmp_path / "s.safetensors"

    def kill(done, _):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        calibrate(net, TEXTS, batch_size=1, save_to=file, save_every=2, progress=kill)
    half = CalibrationStatistics.load(file)
    assert not half.complete and half.samples == 2
    passes = []
    hook = net.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = calibrate(net, TEXTS, batch_size=1, save_to=file, save_every=2)
    assert len(passes) == 3
    calibrate(net, TEXTS, batch_size=1, save_to=file)
    hook.remove()
    assert len(passes) == 3
    whole = calibrate(net, TEXTS, batch_size=1)
    for found in (resumed, CalibrationStatistics.load(file)):
        assert found.complete and all(torch.equal(found[path], whole[path]) for path in whole)


def test_a_file_of_other_settings_is_left_alone(net, tmp_path):
    file = tmp_path / "s.safetensors"
    calibrate(net, TEXTS, batch_size=2, save_to=file)
    before = file.read_bytes()
    for options, match in (
        ({"batch_size": 3}, "batch_size 2 instead of 3"),
        ({"batch_size": 2, "tokens": "all"}, "tokens 'response' instead of 'all'"),
        ({"batch_size": 2, "max_length": 40}, "max_length None instead of 40"),
        ({"batch_size": 2, "padding_side": "left"}, "padding_side 'right' instead of 'left'"),
    ):
        with pytest.raises(pf.PersonafastError, match=match):
            calibrate(net, TEXTS, save_to=file, **options)
    with pytest.raises(pf.PersonafastError, match="other texts"):
        calibrate(net, TEXTS[:4], batch_size=2, save_to=file)
    with pytest.raises(pf.PersonafastError, match="another model"):
        calibrate(tiny.model("gpt2"), TEXTS, batch_size=2, save_to=file)
    assert file.read_bytes() == before


def test_progress_counts_batches(net):
    seen = []
    calibrate(net, TEXTS, batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_dropout_has_no_part_in_it():
    net = tiny.model("gpt2")
    assert net.config.resid_pdrop > 0
    still = calibrate(net, TEXTS)
    net.train()
    net.transformer.h[0].eval()
    found = calibrate(net, TEXTS)
    assert all(torch.equal(found[path], still[path]) for path in still)
    assert net.training and not net.transformer.h[0].training and net.transformer.h[1].training
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_bad_input_is_named(net):
    for options, match in (
        ({"tokens": "some"}, "tokens: 'some'"),
        ({"padding_side": "top"}, "padding_side: 'top'"),
        ({"batch_size": 0}, "batch_size: 0"),
    ):
        with pytest.raises(pf.PersonafastError, match=match):
            calibrate(net, TEXTS, **options)
    with pytest.raises(pf.PersonafastError, match="texts: empty"):
        calibrate(net, tiny.tokenizer(), [])
    with pytest.raises(pf.PersonafastError, match="a text is empty"):
        calibrate(net, tiny.tokenizer(), ["calm sea", " "])
    with pytest.raises(pf.PersonafastError, match="no response tokens"):
        calibrate(net, [TokenizedText([3, 4], 0)])
    with pytest.raises(pf.PersonafastError, match="tokenizer: missing"):
        calibrate(net, None, ["calm sea"])
    with pytest.raises(pf.PersonafastError, match="statistic: 'max' is unknown"):
        calibrate(net, TEXTS).of("max")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_activation_that_is_no_number_names_its_linear(net, value):
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(pf.PersonafastError, match=r"model\.layers\.1\.mlp\.down_proj are NaN or infinite"):
        calibrate(net, TEXTS)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_statistics_of_another_model_are_refused(net):
    other = calibrate(tiny.model("qwen2"), TEXTS)
    with pytest.raises(pf.PersonafastError, match="made for a model with model_type qwen2, this one has llama"):
        build_mask(net, other)
    with pytest.raises(pf.PersonafastError, match="model_type qwen2"):
        other.check(net)
    calibrate(net, TEXTS).check(net)


def test_a_tokenizer_without_tokens_is_named(net):
    silent = SimpleNamespace(chat_template=None)
    with pytest.raises(pf.PersonafastError, match="has no tokens"):
        calibrate(net, type("Silent", (), {"__call__": lambda *_, **__: {"input_ids": []}, **vars(silent)})(), ["x"])
