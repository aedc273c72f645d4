import pytest

from personafast import zoo
from personafast.errors import PersonafastError
from personafast.zoo import build as building
from personafast.zoo.build import build, missed_bars

pytest.importorskip("trl")


@pytest.mark.slow
def test_quick_builds_are_equal_and_resume(tmp_path):
    stages = []
    first = build(tmp_path / "a", quick=True, progress=lambda stage, done, total: stages.append(stage))
    assert {"reference", "policy warm", "library", "measure"} <= set(stages)

    def stop_at_warm(stage, done, total):
        if stage == "policy warm":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", quick=True, progress=stop_at_warm)
    assert not (tmp_path / "b").exists()
    stages.clear()
    second = build(tmp_path / "b", quick=True, progress=lambda stage, done, total: stages.append(stage))
    assert "reference" not in stages and "policy formal" not in stages and "policy warm" in stages
    assert second["files"] == first["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    model, _, library = zoo.load(tmp_path / "b")
    assert model.config.vocab_size == library.shape.vocab_size


@pytest.mark.slow
def test_a_zoo_below_its_bars_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "Settings", lambda: building.QUICK)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "kept").write_text("kept")
    with pytest.raises(PersonafastError, match="reference grammar is"):
        build(tmp_path / "zoo")
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == ["kept"]


def test_bars_name_what_was_missed():
    quality = zoo.info()["quality"]
    worse = quality | {"reference": quality["reference"] | {"grammar": 0.5}}
    assert missed_bars(worse) == ["reference grammar is 0.500, below 0.98"]
