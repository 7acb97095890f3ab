"""A graph store that the tests of training share."""

from __future__ import annotations

import pytest

from dream_pyg.graph.store import StoredGraph
from tests.graphs import PlantedBlocks


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> StoredGraph:
    """Planted blocks with two modalities: 144 train pairs, 5 steps of 32."""
    return PlantedBlocks().store(tmp_path_factory.mktemp("planted"))
