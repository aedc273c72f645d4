"""The same directions as other packages, where they are installed: see benchmarks/peers_vectors.py for how."""

import json
import warnings

import pytest

from benchmarks import peers_vectors
from benchmarks.results import FOLDER

MODULES = {"repeng": "repeng", "steering-vectors": "steering_vectors", "scikit-learn": "sklearn"}


@pytest.mark.parametrize("peer", peers_vectors.PEERS)
def test_a_peer_finds_the_same_direction(peer):
    package = MODULES[peers_vectors.PEERS[peer][0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            __import__(package)
        except ImportError:
            pytest.skip(f"{package} is not installed")
        except AttributeError as error:  # repeng 0.4 uses a name that NumPy 2 removed
            pytest.skip(f"{package} does not import here ({error})")
    found = peers_vectors.compare(peer, "warm")
    assert len(found) >= 2 and min(found.values()) > peers_vectors.REACHED


def test_the_recorded_figures_say_so_too():
    record = json.loads((FOLDER / "peers" / "vectors.json").read_text())["cosines"]
    assert set(record) == set(peers_vectors.PEERS)
    for peer, row in record.items():
        values = [value for by_block in row["by_trait_and_block"].values() for value in by_block.values()]
        assert min(values) == row["lowest"] > peers_vectors.REACHED, peer
