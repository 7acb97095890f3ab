"""One paper, one file, one class; ``MODELS`` maps the name on the command line to the class."""

from __future__ import annotations

from dream_pyg.errors import ConfigError, did_you_mean
from dream_pyg.models.addease import AddEASE
from dream_pyg.models.base import Batch, DualRepresentations, Embeddings, ItemWeights, Recommender, Scorer
from dream_pyg.models.bm3 import BM3
from dream_pyg.models.bpr import BPR
from dream_pyg.models.buir import BUIR
from dream_pyg.models.dragon import DRAGON
from dream_pyg.models.dream import DREAM
from dream_pyg.models.dualgnn import DualGNN
from dream_pyg.models.ease import EASE
from dream_pyg.models.freedom import FREEDOM
from dream_pyg.models.grcn import GRCN
from dream_pyg.models.itemknn import ItemKNN
from dream_pyg.models.lattice import LATTICE
from dream_pyg.models.lightgcn import LightGCN
from dream_pyg.models.mgcn import MGCN
from dream_pyg.models.micro import MICRO
from dream_pyg.models.mmgcn import MMGCN
from dream_pyg.models.popularity import MostPopular
from dream_pyg.models.slmrec import SLMRec
from dream_pyg.models.vbpr import VBPR

__all__ = [
    "BM3",
    "BPR",
    "BUIR",
    "DRAGON",
    "DREAM",
    "EASE",
    "FREEDOM",
    "GRCN",
    "LATTICE",
    "MGCN",
    "MICRO",
    "MMGCN",
    "MODELS",
    "VBPR",
    "AddEASE",
    "Batch",
    "DualGNN",
    "DualRepresentations",
    "Embeddings",
    "ItemKNN",
    "ItemWeights",
    "LightGCN",
    "MostPopular",
    "Recommender",
    "SLMRec",
    "Scorer",
    "find_model",
]

MODELS: dict[str, type[Recommender]] = {
    "dream": DREAM,
    "mgcn": MGCN,
    "freedom": FREEDOM,
    "micro": MICRO,
    "lattice": LATTICE,
    "dragon": DRAGON,
    "dualgnn": DualGNN,
    "bm3": BM3,
    "slmrec": SLMRec,
    "grcn": GRCN,
    "mmgcn": MMGCN,
    "vbpr": VBPR,
    "lightgcn": LightGCN,
    "buir": BUIR,
    "bpr": BPR,
    "addease": AddEASE,
    "ease": EASE,
    "itemknn": ItemKNN,
    "popularity": MostPopular,
}


def find_model(name: str) -> type[Recommender]:
    """The class registered as ``name``.

    Raises:
        ConfigError: If there is none; the message lists those there are.
    """
    if name in MODELS:
        return MODELS[name]
    raise ConfigError(f"Unknown model {name!r}; expected one of {', '.join(MODELS)}.{did_you_mean(name, MODELS)}")
