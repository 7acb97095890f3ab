"""DREAM (arXiv 2404.11119) and its peers: multimodal recommendation on PyTorch Geometric.

The public names::

    config = DatasetConfig.load("datasets/baby/dataset.toml")
    stored, _ = build_store(config, "graphs/baby", data_dir="data/baby")
    train(RunConfig.create(graph="graphs/baby", model="dream"), "runs/dream")
    run = load_run("runs/dream")
    recommend_table(run, k=10)
"""

from dream_pyg import environment  # noqa: F401 - comes before PyTorch

# isort: split
from dream_pyg.analysis.figures import make_figure
from dream_pyg.analysis.reproduce import reproduce
from dream_pyg.analysis.tune import tune
from dream_pyg.config import RunConfig, SamplingConfig, TeacherConfig, TrainingConfig
from dream_pyg.data.dataset import Dataset, DatasetConfig, load_dataset
from dream_pyg.data.synthetic import make_synthetic
from dream_pyg.errors import (
    ConfigError,
    DataError,
    DreamPygError,
    Interrupted,
    ResumeError,
    SearchError,
    StoreError,
    TrainingError,
)
from dream_pyg.evaluation import evaluate
from dream_pyg.graph.build import build_graph
from dream_pyg.graph.store import StoredGraph, build_store, load_graph
from dream_pyg.graph.update import update_store
from dream_pyg.models import (
    BPR,
    DREAM,
    EASE,
    MODELS,
    Batch,
    Embeddings,
    ItemWeights,
    LightGCN,
    MostPopular,
    Recommender,
    Scorer,
    find_model,
)
from dream_pyg.ranking import recommend
from dream_pyg.serving import export_run, recommend_table
from dream_pyg.training.run import Run, load_run
from dream_pyg.training.trainer import TrainResult, train

__all__ = [
    "BPR",
    "DREAM",
    "EASE",
    "MODELS",
    "Batch",
    "ConfigError",
    "DataError",
    "Dataset",
    "DatasetConfig",
    "DreamPygError",
    "Embeddings",
    "Interrupted",
    "ItemWeights",
    "LightGCN",
    "MostPopular",
    "Recommender",
    "ResumeError",
    "Run",
    "RunConfig",
    "SamplingConfig",
    "Scorer",
    "SearchError",
    "StoreError",
    "StoredGraph",
    "TeacherConfig",
    "TrainResult",
    "TrainingConfig",
    "TrainingError",
    "build_graph",
    "build_store",
    "evaluate",
    "export_run",
    "find_model",
    "load_dataset",
    "load_graph",
    "load_run",
    "make_figure",
    "make_synthetic",
    "recommend",
    "recommend_table",
    "reproduce",
    "train",
    "tune",
    "update_store",
]
