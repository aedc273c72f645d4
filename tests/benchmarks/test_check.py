import pytest
import torch
from helpers import small

from benchmarks import measure as measuring
from benchmarks.case import Contender, Draw
from benchmarks.check import CheckFailed, check, references
from benchmarks.measure import checked, measure
from benchmarks.results import Suite


def off_by(factor):
    """As wrong as `factor` times plain torch's largest error."""

    def ours(inputs):
        exact = inputs.x.double() @ inputs.weight.double().T
        largest = (small.plain(inputs).double() - exact).abs().max()
        return exact + factor * largest

    return ours


def nan(inputs):
    result = small.plain(inputs)
    result[1, 2] = torch.nan
    return result


def test_the_right_kernel_passes_and_its_error_is_given():
    errors, absent = checked(small.case())
    assert absent == {} and 0 < errors["ours"].largest <= errors["ours"].allowed
    assert errors["ours"] == errors["F.linear"]


@pytest.mark.parametrize(
    "wrong",
    [
        off_by(2.5),
        off_by(-2.5),
        nan,
        lambda inputs: small.plain(inputs) * 1.05,
        lambda inputs: small.plain(inputs)[:, :-1],
        lambda inputs: small.plain(inputs).roll(1, 0),
        lambda inputs: torch.full_like(small.plain(inputs), torch.inf),
        lambda inputs: (small.plain(inputs), small.plain(inputs)),
    ],
)
def test_a_wrong_kernel_is_refused_and_never_timed(wrong, monkeypatch):
    def timed(*_, **__):
        raise AssertionError("a red case was timed")

    monkeypatch.setattr(measuring, "interleave", timed)
    monkeypatch.setattr(measuring, "timed_calls", timed)
    with pytest.raises(CheckFailed, match="small: ours: "):
        measure(small.case(wrong), 0.01)


def test_the_rule_allows_twice_the_error_of_plain_torch():
    errors, _ = checked(small.case(off_by(1.9)))
    assert errors["ours"].largest > errors["F.linear"].largest


def test_a_wrong_baseline_is_refused_too_unless_it_is_a_yardstick():
    doubled = Contender("doubled", lambda inputs: 2 * small.plain(inputs), small.traffic)
    with pytest.raises(CheckFailed, match="small: doubled: error"):
        checked(small.case(small.plain, doubled))
    yardstick = Contender("doubled", doubled.run, small.traffic, same=False)
    errors, _ = checked(small.case(small.plain, yardstick))
    assert set(errors) == {"ours", "F.linear"}


def test_a_quantised_baseline_has_a_limit_of_its_own():
    def rough(limit):
        return Contender("rough", lambda inputs: 1.1 * small.plain(inputs), small.traffic, approximate=limit)

    errors, _ = checked(small.case(small.plain, rough(0.2)))
    assert errors["rough"].relative == pytest.approx(0.1, rel=0.05)
    with pytest.raises(CheckFailed, match="relative error"):
        checked(small.case(small.plain, rough(0.05)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda inputs: (inputs.x.argmin(1), torch.where(inputs.x > 0, inputs.x, -torch.inf)),
        lambda inputs: (inputs.x.argmax(1), inputs.x),
        lambda inputs: (inputs.x.argmax(1), torch.where(inputs.x > 0, inputs.x, torch.inf)),
        lambda inputs: (inputs.x.argmax(1), torch.where(inputs.x > 0, inputs.x, torch.nan)),
    ],
)
def test_whole_numbers_and_infinities_have_to_be_the_same(wrong):
    right = small.integers(lambda inputs: (inputs.x.argmax(1), torch.where(inputs.x > 0, inputs.x, -torch.inf)))
    inputs = right.make(Draw(0))
    check(right, right.ours, inputs, *references(right, inputs))
    with pytest.raises(CheckFailed):
        check(right, small.integers(wrong).ours, inputs, *references(right, inputs))


def test_what_a_call_changes_is_given_anew():
    def add_(inputs):
        return inputs.x.add_(1)

    inputs = small.make(Draw(0))
    before = inputs.x.clone()
    case = small.case(add_, plain=add_, mutates=("x",))
    exact, plain = references(case, inputs)
    check(case, case.ours, inputs, exact, plain)
    assert torch.equal(inputs.x, before) and torch.equal(exact[0], before.double() + 1)


def test_a_red_case_has_no_record(tmp_path):
    suite = Suite("ops", ["small"])
    with pytest.raises(CheckFailed):
        suite.add(measure(small.case(nan), 0.01).record)
    assert suite.records == {}
