"""What a config names, made: data, model, objective, measures."""

import torch

from asynception.config import EvaluationConfig, TrainConfig
from model.errors import InputError
from model.flat import FlatModule
from worker.class_weights import read_class_weights, read_classes
from worker.data.loader import BatchLoader
from worker.data.manifest_source import ManifestSource
from worker.data.open import open_source
from worker.data.order import EpochOrder
from worker.data.source import ImageSource
from worker.data.transform import Transform
from worker.evaluator import Evaluator
from worker.objective import Objective, create_objective
from worker.ranking import MapDefinition


def open_train(config: TrainConfig) -> ImageSource:
    """The training images. Raises InputError."""
    source = _open(config, config.data.train, "data.train")
    if isinstance(source, ManifestSource):
        # A window is read while the next one's shards are fetched.
        source.check_room(2 * train_order(config, source).max_window_shards)
    return source


def open_val(config: TrainConfig) -> ImageSource:
    """The held-out images. Raises InputError."""
    return _open(config, config.data.val, "data.val")


def _open(config: TrainConfig, path: str, setting: str) -> ImageSource:
    data = config.data
    return open_source(
        path,
        setting=setting,
        cached_shards=data.cached_shards,
        fetch=data.fetch,
        indexed_samples=max(250_000, 4 * data.shuffle_window),
        function=data.functions.get(setting.rpartition(".")[2]),
    )


def train_order(config: TrainConfig, source: ImageSource) -> EpochOrder:
    """The order of the training images."""
    return EpochOrder(source.shard_sizes, config.training.seed, config.data.shuffle_window)


def train_loader(config: TrainConfig, source: ImageSource) -> BatchLoader:
    """Shuffled, augmented batches by leased position. Raises InputError."""
    data, seed = config.data, config.training.seed
    return BatchLoader(
        source,
        train_order(config, source),
        Transform(data.image_size, seed, data.augment, data.max_pixels, data.resize),
        batch_size=data.batch_size,
        num_threads=data.num_threads,
        prefetch_batches=data.prefetch_batches,
        cache_images_mb=data.cache_images_mb,
        skip_lost=data.max_lost_shards > 0,
        pin_memory=config.scaling.use_gpu,
    )


def val_loader(config: TrainConfig, source: ImageSource) -> BatchLoader:
    """The held-out images, unchanged and in stored order."""
    data = config.data
    return BatchLoader(
        source,
        EpochOrder(source.shard_sizes, seed=0, shuffle_window=0),
        Transform(data.image_size, max_pixels=data.max_pixels, resize=data.resize),
        batch_size=config.evaluation.batch_size,
        num_threads=data.num_threads,
        prefetch_batches=data.prefetch_batches,
        cache_images_mb=data.cache_images_mb,
    )


def build_flat(config: TrainConfig, num_classes: int, device: str = "cpu") -> FlatModule:
    """The model with its initial parameters, which follow from training.seed, flattened."""
    torch.manual_seed(config.training.seed)
    return FlatModule(config.model.build(num_classes).to(device))


def build_objective(config: TrainConfig, num_classes: int) -> Objective:
    """Reads the file of label weights, if there is one. Raises InputError."""
    training, weights = config.training, None
    if training.label_weights is not None:
        weights = read_class_weights(
            training.label_weights, num_classes, setting="training.label_weights", complete=True
        )
    return create_objective(training.objective, num_classes, training.label_smoothing, weights)


def build_map_definition(config: TrainConfig, num_classes: int) -> MapDefinition:
    """Reads the files of class weights and of the subset, if there are any. Raises InputError."""
    evaluation, weights, classes = config.evaluation, None, None
    if config.training.objective == "softmax":
        _refuse_map_files(evaluation)
    if (path := evaluation.class_weights) is not None:
        weights = read_class_weights(path, num_classes, setting="evaluation.class_weights")
    if (path := evaluation.classes) is not None:
        classes = read_classes(path, num_classes, setting="evaluation.classes")
    definition = MapDefinition(evaluation.map_k, weights, classes)
    if not definition.class_weights(num_classes).any():
        raise InputError(
            f"evaluation.class_weights={evaluation.class_weights!r} weighs every class of "
            f"evaluation.classes={evaluation.classes!r} 0, so no image would count: weigh or name "
            "others"
        )
    return definition


def _refuse_map_files(evaluation: EvaluationConfig) -> None:
    for name in ("class_weights", "classes"):
        path = getattr(evaluation, name)
        if path is not None:
            raise InputError(
                f"evaluation.{name}={path!r} is for MAP@k and has no effect with objective "
                "softmax: remove it or choose multilabel"
            )


def build_evaluator(config: TrainConfig, num_classes: int) -> Evaluator:
    """Of the held-out images. Raises InputError."""
    source = open_val(config)
    return Evaluator(
        build_flat(config, num_classes),
        build_objective(config, num_classes),
        val_loader(config, source),
        sum(source.shard_sizes),
        build_map_definition(config, num_classes),
        config.compute,
    )
