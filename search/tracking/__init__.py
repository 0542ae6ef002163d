"""Trackers: what follows a search from outside. One file each, and one line here."""

from secateur.search.tracking.mlflow import MLflow, MLflowConfig
from secateur.search.tracking.tensorboard import TensorBoard, TensorBoardConfig
from secateur.search.tracking.wandb import WeightsAndBiases, WeightsAndBiasesConfig

TRACKERS = {
    "tensorboard": (TensorBoardConfig, TensorBoard),
    "mlflow": (MLflowConfig, MLflow),
    "wandb": (WeightsAndBiasesConfig, WeightsAndBiases),
}
"""{name in `output.trackers`: (class of its options, what makes it)}."""
