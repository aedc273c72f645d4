import pytest
import torch
from helpers import small

from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.case import Contender, Draw, held_bytes, nbytes
from benchmarks.measure import FEWEST, TIMES_CACHE, _buffers, measure
from benchmarks.memory import peaks


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.machine.last_level_cache", lambda: 64 << 10)
    monkeypatch.setattr("benchmarks.bandwidth.last_level_cache", lambda: 1 << 20)
    reader.cache_clear()
    yield
    reader.cache_clear()


def test_a_case_becomes_a_record():
    slow = Contender("slow", lambda inputs: [small.plain(inputs) for _ in range(20)][0], small.traffic)
    absent = Contender("absent", small.plain, small.traffic, small.never)
    found = measure(small.case(small.plain, slow, absent), 0.05)
    record = found.record
    assert set(found.samples) == {"ours", "F.linear", "slow"}
    assert {len(samples) for samples in found.samples.values()} == {record["rounds"]}
    assert (
        record["baselines"]["absent"]
        == {"absent": "its library is not installed"}
        == {"absent": found.absent["absent"]}
    )
    ours, first = record["ours"], record["baselines"]["F.linear"]
    assert ours["bytes"] == 2 * 64 * (3 + 16) and ours["relative_error"] > 0
    assert ours["gb_s"] == pytest.approx(ours["bytes"] / ours["microseconds"]["median"] / 1e3, rel=1e-2)
    assert 0 < ours["share_of_read_bandwidth"]["median"] < 1
    assert first["share_of_its_memory"] == 0.5 and first["goal"] == 0.01
    assert record["baselines"]["slow"]["times_faster"]["median"] > 5
    assert "times_faster" not in ours
    assert record["buffers"]["times_last_level_cache"] >= TIMES_CACHE and record["buffers"]["count"] >= FEWEST


def test_buffers_differ_and_are_no_more_than_memory_holds(monkeypatch):
    case = small.case()
    first, second, *_ = _buffers(case)
    assert not torch.equal(first.x, second.x) and not torch.equal(first.weight, second.weight)
    monkeypatch.setattr("benchmarks.measure.machine.available_memory", lambda: 6 * held_bytes(first))
    assert len(_buffers(case)) == 3


def test_weights_are_shared_by_the_cases_of_a_shape_only():
    weight = Draw(0).weight(8, 32)
    assert Draw(0).weight(8, 32) is weight
    assert not torch.equal(Draw(1).weight(8, 32), weight)
    Draw(0).weight(8, 64)
    assert Draw(0).weight(8, 32) is not weight


def test_held_bytes_counts_a_storage_once():
    tensor = torch.zeros(100)
    inputs = small.make(Draw(0))
    inputs.views = [tensor, tensor[:10], (tensor.view(10, 10),)]
    assert held_bytes(inputs) == nbytes(inputs.x, inputs.weight, tensor)


@pytest.mark.skipif(not machine.Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_what_a_call_allocates_is_seen():
    def hungry(inputs):
        torch.empty(96 << 20, dtype=torch.uint8).fill_(1)
        return small.plain(inputs)

    grown = peaks(small.case(small.plain, Contender("hungry", hungry, small.traffic)))
    assert grown["ours"] < 16 << 20 and 90 << 20 < grown["hungry"] < 112 << 20


def test_torch_under_another_policy_is_refused(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with pytest.raises(RuntimeError, match="torch was imported without OMP_WAIT_POLICY=passive"):
        machine.require_passive_waiting()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    machine.require_passive_waiting()


def test_facts_of_the_machine():
    hardware = machine.hardware()
    assert hardware["threads"] == torch.get_num_threads() and hardware["memory_bytes"] > 0
    # A distribution's metadata may leave out what stands behind the plus of its build.
    assert machine.versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    name = machine.machine_name()
    assert name == name.lower() and "/" not in name and f"{torch.get_num_threads()}-threads" in name
