"""
The trainer of distillation: a small network learns to predict an encoder's features at every place of a frame.

This module has the arguments, the dataset, the loss and the trainer. Targets are made by `teacher_features`; `distill` runs all
steps from files to a checkpoint of a [`FeatureGazeModel`].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from ..feature_network_autogaze import STRIDE, FeatureGazeConfig, FeatureGazeNetwork
from .augmentation import vary_light
from .teacher_features import TeacherFeatures, teacher_vectors
from .teachers import check_scales
from .trainer import MetricsTrainer


@dataclass
class DistillationArguments(TrainingArguments):
    """
    Arguments of [`DistillationTrainer`]: those of [`~transformers.TrainingArguments`] and its own.

    Args:
        scales (`list[int]`, *optional*, defaults to `[2, 4, 7, 14]`):
            Rows and columns of patches at each scale that the network supports, coarse to fine; the last is the size of crops.
        num_components (`int`, *optional*, defaults to 96): size of the vector of a place.
        whitening (`float`, *optional*, defaults to 0.5):
            Each component is divided by its standard deviation to this power, 0..1; higher values give weak components more
            weight.
        hidden_sizes (`list[int]`, *optional*, defaults to `[48, 96, 192]`), depths (`list[int]`, *optional*, defaults to
            `[1, 2, 6]`): size of the network; see [`FeatureGazeConfig`].
        coarse_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the error of each scale but the finest, at least 0; that of the finest is 1.
        change_loss_weight (`float`, *optional*, defaults to 3):
            Weight of the error of the difference between the crops of a pair, at least 0.
        crops_per_video (`int`, *optional*, defaults to 96), crops_per_picture (`int`, *optional*, defaults to 16):
            Crops of each file, even numbers of at least 2.
        eval_share (`float`, *optional*, defaults to 0.1):
            Share of the files, above 0 and below 1, that are held out, at least one: the network is evaluated on them, and
            calibrated on them and some of the others.
        cache_dir (`str`, *optional*):
            Folder for crops and the encoder's features, from which an interrupted run is resumed and later runs can train. They
            are kept in memory by default.
        cache_size_gb (`float`, *optional*, defaults to 8.0): maximum size of crops and features, in 1e9 bytes.
        learning_rate (`float`, *optional*, defaults to 2e-3), per_device_train_batch_size (`int`, *optional*, defaults to
            12, counted in pairs of crops), lr_scheduler_type (*optional*, defaults to `"cosine"`), warmup_steps (`float`,
            *optional*, defaults to 50), weight_decay (`float`, *optional*, defaults to 0.05), remove_unused_columns
            (`bool`, *optional*, defaults to `False`), label_names (`list[str]`, *optional*, defaults to `["vectors"]`):
            as in [`~transformers.TrainingArguments`].

    Raises:
        ValueError: if one of them is out of range.

    Example:

    ```python
    >>> from transformers_autogaze.training.distillation_trainer import DistillationArguments

    >>> DistillationArguments("gaze", scales=[14, 7])
    Traceback (most recent call last):
    ValueError: `scales` must be rows of patches of each scale, whole numbers from coarse to fine such as 2 4 7 14, got [14, 7]

    ```
    """

    output_dir: str | None = HfArg(  # type: ignore[assignment]  # declared to return a `Field`, as `field` is not
        aliases=["-o", "--output"], default=None, help="Folder to write to."
    )
    scales: list[int] = field(
        default_factory=lambda: [2, 4, 7, 14], metadata={"help": "Rows of patches of each scale, coarse to fine."}
    )
    num_components: int = field(default=96, metadata={"help": "Size of the vector of a place."})
    whitening: float = field(
        default=0.5, metadata={"help": "Power of its standard deviation that each component is divided by, 0..1."}
    )
    hidden_sizes: list[int] = field(
        default_factory=lambda: [48, 96, 192], metadata={"help": "Channels of the network's three stages."}
    )
    depths: list[int] = field(default_factory=lambda: [1, 2, 6], metadata={"help": "Blocks of the three stages."})
    coarse_loss_weight: float = field(
        default=0.25, metadata={"help": "Weight of the error of each scale but the finest."}
    )
    change_loss_weight: float = field(
        default=3.0, metadata={"help": "Weight of the error of the difference between the two crops of a pair."}
    )
    crops_per_video: int = field(default=96, metadata={"help": "Crops of each video."})
    crops_per_picture: int = field(default=16, metadata={"help": "Crops of each picture."})
    eval_share: float = field(default=0.1, metadata={"help": "Share of the files that are held out for evaluation."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for crops and features, which are kept in memory if it is not given."}
    )
    cache_size_gb: float = field(default=8.0, metadata={"help": "Maximum size of crops and features, in 1e9 bytes."})
    learning_rate: float = field(default=2e-3, metadata={"help": "The initial learning rate."})
    per_device_train_batch_size: int = field(default=12, metadata={"help": "Pairs of crops in a batch."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=50, metadata={"help": "Number or share of warm-up steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that the model's forward does not accept."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["vectors"], metadata={"help": "Keys of an item that are labels."}
    )

    def __post_init__(self):
        check_scales(self.scales)
        for name in ("coarse_loss_weight", "change_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        if not isinstance(self.num_components, int) or self.num_components < 1:
            raise ValueError(f"`num_components` must be a whole number of at least 1, got {self.num_components!r}")
        if not 0 <= self.whitening <= 1:
            raise ValueError(f"`whitening` must lie in 0..1, got {self.whitening}")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"`eval_share` must lie above 0 and below 1, got {self.eval_share}")
        for name in ("crops_per_video", "crops_per_picture"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 2 or number % 2:
                raise ValueError(f"`{name}` must be an even number of at least 2, got {number!r}")
        if self.per_device_train_batch_size < 1:
            raise ValueError(
                f"`per_device_train_batch_size` must be at least 1, got {self.per_device_train_batch_size}"
            )
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be a number of at least 0, got {self.learning_rate}")
        if not self.cache_size_gb > 0:
            raise ValueError(f"`cache_size_gb` must be above 0, got {self.cache_size_gb}")
        self.network_config()
        # transformers accepts mixed precision on a CPU only with `use_cpu`.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

    def network_config(self) -> FeatureGazeConfig:
        """Returns the configuration of the network to train."""
        return FeatureGazeConfig(
            scales=[STRIDE * self.scales[-1]],
            scale_factors=[scale / self.scales[-1] for scale in self.scales],
            hidden_sizes=self.hidden_sizes,
            depths=self.depths,
            feature_size=self.num_components,
        )


def new_network(args: DistillationArguments) -> FeatureGazeNetwork:
    """
    Makes a network that predicts the mean feature everywhere, to start training from.

    From random predictions, the first hundreds of steps would only learn the mean.

    Args:
        args ([`DistillationArguments`]): scales and sizes.

    Returns:
        [`FeatureGazeNetwork`]
    """
    network = FeatureGazeNetwork(args.network_config())
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()  # the small initial weights of transformers learn slowly
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return network


class CropPairDataset(Dataset):
    """
    Pairs of crops and the vectors to predict for them.

    Args:
        features ([`TeacherFeatures`]): the crops and features of all files, filled.
        sources (`Sequence[int]`): indices of the files whose crops to use.
        whitening (`float`, *optional*, defaults to 0.5): see [`DistillationArguments`].
    """

    def __init__(self, features: TeacherFeatures, sources: Sequence[int], whitening: float = 0.5):
        self.features = features
        self.weights = features.components.weights(whitening)
        grid = features.teacher.grid
        self._patch_at = grid.patches_at(*grid.grids[-1])
        self._first = [
            row for source in sources for row in range(features.first_row[source], features.first_row[source + 1], 2)
        ]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns one pair.

        Returns:
            `dict` with `levels`, a `torch.ByteTensor` of shape `(2, height, width, 3)`, and `vectors`, a
            `torch.FloatTensor` of shape `(2, scales, feature_size, rows, columns)`.
        """
        rows = slice(self._first[index], self._first[index] + 2)
        levels, features = (
            torch.from_numpy(array[rows].copy()) for array in (self.features.levels, self.features.features)
        )
        return {"levels": levels, "vectors": teacher_vectors(features, self.weights, self._patch_at)}


class DistillationTrainer(MetricsTrainer):
    """
    Trains a [`FeatureGazeNetwork`] to predict an encoder's features.

    The network sees each crop with random changes of light, and predicts the encoder's features of the unchanged crop. The loss
    is the squared distance of its vectors from the encoder's, plus that of the differences between the two crops of a pair, since
    selectors compare the features of a place over time. Predicting the mean feature everywhere has a loss of 1.

    Everything else is as in [`~transformers.Trainer`]. It logs `finest_loss` (of the finest scale) and `change_loss`, averaged
    since the last log. Random numbers depend on `seed`, the step and the process only.

    Args:
        model ([`FeatureGazeNetwork`]): the network to train.
        args ([`DistillationArguments`]): the arguments.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets have items as in [`CropPairDataset`].

    Raises:
        ValueError: if the arguments are not [`DistillationArguments`].
    """

    args: DistillationArguments

    def __init__(self, model: FeatureGazeNetwork, args: DistillationArguments, **kwargs):
        if not isinstance(args, DistillationArguments):
            raise ValueError(f"`args` must be DistillationArguments, got {type(args).__name__}")
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Computes the loss of a batch.

        Args:
            model (`nn.Module`): the network, as wrapped by the trainer.
            inputs (`Mapping`): items of a [`CropPairDataset`], stacked.
            return_outputs (`bool`, *optional*, defaults to `False`): whether to return the vectors as well.
            num_items_in_batch (*optional*): not used; batches are averaged.

        Returns:
            `torch.FloatTensor` of shape `()`, or a `tuple` of it and the predicted vectors.
        """
        levels = inputs["levels"].flatten(0, 1).permute(0, 3, 1, 2)
        pixels = levels.float().div_(255)
        if model.training:
            pixels = vary_light(pixels, self.step_generator())
        vectors = model(FeatureGazeNetwork.normalize(pixels)).float()
        errors = vectors.unflatten(0, (-1, 2)) - inputs["vectors"]
        scale_losses = errors.square().sum(3).mean((0, 1, 3, 4))
        change_loss = (errors[:, 0, -1] - errors[:, 1, -1]).square().sum(1).mean() / 2
        self.add_metric("finest_loss", scale_losses[-1])
        self.add_metric("change_loss", change_loss)
        loss = scale_losses[-1] + self.args.coarse_loss_weight * scale_losses[:-1].sum()
        loss = loss + self.args.change_loss_weight * change_loss
        return (loss, vectors) if return_outputs else loss
