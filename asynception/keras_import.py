"""Weights that Keras wrote, as this project's safetensors."""

from pathlib import Path

import torch

from asynception.export import describe_model, replacing, save_state
from model.keras_files import read_keras_weights
from model.keras_weights import load_keras_weights
from model.registry import create_model


def import_keras(path: Path, name: str, out: Path) -> int:
    """Write a Keras `.h5` or `.weights.h5` file of model `name` by state dict name.

    Batch norm's counters, which Keras has not, are zero. `out` is replaced only by a whole file.
    Returns the number of classes, which the file tells. Raises InputError.
    """
    with torch.device("meta"):
        shape = create_model(name, num_classes=1)
    arrays = read_keras_weights(path, shape)
    # Keras's last array is the last layer's bias; in a file without that layer, what the number
    # of arrays will be refused for doesn't depend on it.
    num_classes = max(1, arrays[-1].size) if arrays else 1
    module = create_model(name, num_classes)
    load_keras_weights(module, arrays)
    with replacing(out) as incomplete:
        save_state(module.state_dict(), incomplete, describe_model(name, {}, num_classes))
    return num_classes
