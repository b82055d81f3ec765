"""The sections of the config tree that say what to train, and on what: [model] and [data]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, PrivateAttr, model_validator
from torch import nn

from model.factory import Factory, read_factory
from model.registry import check_settings, create_model
from model.settings import Settings
from model.user_code import UserFunction, read_user_function
from model.zoo import is_zoo_name
from worker.data.fetch import FetchSettings
from worker.data.transform import AugmentSettings, ResizeSettings
from worker.data.user_dataset import is_user_dataset

DEFAULT_MODEL = "xception"


class ModelConfig(Settings):
    """A model's name, or a function that builds one, and the model's own settings beside it."""

    model_config = ConfigDict(extra="allow")

    name: str = DEFAULT_MODEL
    """One of `asynception models`, timm:NAME or torchvision:NAME where those are installed."""
    factory: str | None = None
    """A model of your own instead: path/to/file.py:function. The function is called with
    num_classes and the other settings of [model], and returns any nn.Module."""
    weights: str | None = None
    """A .safetensors file, as `asynception export` and `import-keras` write, to start from. Its
    last layer is left out if it has another number of classes."""
    _factory: Factory | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The model's own settings."""
        return dict(self.model_extra or {})

    @property
    def title(self) -> str:
        """What to call the model where its whole description has no room."""
        return self.name if self._factory is None else Path(self._factory.path).stem

    @property
    def factory_source(self) -> str | None:
        """The text of the factory's file as it was read, if there is a factory."""
        return self._factory.source if self._factory else None

    def build(self, num_classes: int) -> nn.Module:
        """A new model. Raises InputError."""
        if self._factory is not None:
            return self._factory.build(num_classes, self.settings)
        return create_model(self.name, num_classes, **self.settings)

    def build_shape(self, num_classes: int) -> nn.Module:
        """A model to learn shapes from, without values where that is sure to work.

        Other people's constructors may compute with values, which the meta device hasn't got, so
        their models are built whole. Raises InputError, also for an unsteady factory.
        """
        if self._factory is not None:
            return self._factory.build_twice(num_classes, self.settings)
        if is_zoo_name(self.name):
            return self.build(num_classes)
        with torch.device("meta"):
            return self.build(num_classes)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.factory is None:
            if not is_zoo_name(self.name):
                check_settings(self.name, self.settings)
        elif self.name != DEFAULT_MODEL:
            raise ValueError(
                f"model.name = {self.name!r} and model.factory = {self.factory!r} are two models: "
                "give one of them"
            )
        else:
            # Read once, here: what every process runs is then the same text.
            self._factory = read_factory(self.factory)
        return self


class DataConfig(Settings):
    train: str
    """Training images: a manifest (train.manifest.json, also behind a URL like s3://), a
    .tar/.tar.gz shard, a folder or pattern of shards (train-*.tar, train-{00000..00006}.tar.gz), a
    folder with one folder of images for each class, idx files as MNIST has them
    (train-images-idx3-ubyte.gz), or a data set of your own, path/to/file.py:function.
    The function is called with split="train" or "val" if it takes that, else with nothing, and
    returns any map-style Dataset of (image, label or labels)."""
    val: str
    """Held-out images, of the same kinds."""
    num_classes: PositiveInt | None = None
    """Classes of the model; without it, the largest label of the training set plus one."""
    image_size: PositiveInt = 299
    """Side of the square that images are resized to, in pixels."""
    batch_size: PositiveInt = 32
    """Images of one gradient of one worker."""
    shuffle_window: PositiveInt = 16384
    """Images that are shuffled among each other (shards are shuffled as well)."""
    resize: ResizeSettings = ResizeSettings()
    augment: AugmentSettings = AugmentSettings()
    max_corrupt: NonNegativeInt = 100
    """Images that may fail to decode before the run stops; they are skipped and counted."""
    max_lost_shards: NonNegativeInt = 0
    """Shards that may be missing or damaged before the run stops; their samples are left out and
    counted. Of sets with a manifest only: others are read whole before the run starts."""
    max_pixels: PositiveInt = 64_000_000
    """Larger images count as corrupt, before they are decoded."""
    fetch: FetchSettings = FetchSettings()
    cached_shards: PositiveInt = 8
    """Compressed shards that each worker keeps decompressed in memory."""
    cache_images_mb: Annotated[float, Field(ge=0)] = 0.0
    """Decoded images that each worker keeps, in 10^6 bytes: for sets smaller than memory."""
    num_threads: PositiveInt = 1
    """Threads that decode images, in each worker."""
    prefetch_batches: PositiveInt = 4
    """Batches decoded ahead, in each worker."""
    lease: Literal["auto", "batches", "window"] = "auto"
    """What a worker takes on at a time. window: all images of a shuffle window, so that each shard
    is read by one worker. batches: lease_batches batches. auto: windows if shards are fetched from
    afar and there are four times as many windows as workers, else batches."""
    lease_batches: PositiveInt = 8
    """Batches of a lease; what a dead worker leaves is handed out again."""
    _functions: Mapping[str, UserFunction] = PrivateAttr(default_factory=dict)

    @property
    def functions(self) -> Mapping[str, UserFunction]:
        """The functions that `train` and `val` name, if they do, as their files were read."""
        return self._functions

    @model_validator(mode="after")
    def _read_functions(self) -> Self:
        # Read once, here: what every process runs is then the same text.
        self._functions = {
            name: read_user_function(path, f"data.{name}")
            for name, path in (("train", self.train), ("val", self.val))
            if is_user_dataset(path)
        }
        return self
