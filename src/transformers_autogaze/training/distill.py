"""Distillation from files to the checkpoint of a [`FeatureGazeModel`]: crops, features, training, calibration and model card."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from transformers.utils import CONFIG_NAME

from ..feature_gaze_autogaze import FeatureGazeModel
from ..feature_network_autogaze import FeatureGazeNetwork
from ..processing_autogaze import AutoGazeProcessor
from ..utils.output_files import replacing_files
from .calibration import PredictionQuality, calibrate, measure_predictions
from .crops import Source, find_sources
from .distillation_card import make_card
from .distillation_trainer import CropPairDataset, DistillationArguments, DistillationTrainer, new_network
from .teacher_features import TeacherFeatures
from .teachers import load_teacher


def distill(
    encoder: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    args: DistillationArguments,
    credits: str | None = None,
) -> FeatureGazeModel:
    """
    Distills a selector from an encoder, and saves it to `args.output_dir` with its processor and a model card.

    Args:
        encoder (`str` or `os.PathLike`): folder or Hub repository of an image tower or a Qwen-VL; see [`load_teacher`].
        inputs (`Sequence` of `str` or `os.PathLike`): videos and pictures; see [`find_sources`].
        args ([`DistillationArguments`]): the arguments; `bf16` and `fp16` apply to the encoder as well.
        credits (`str`, *optional*): section of the card on data and licences, in Markdown.

    Returns:
        [`FeatureGazeModel`]: the saved selector, its weights rounded to float16.

    Raises:
        ValueError: if no file can be read, the encoder is not supported, or the arguments do not fit.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import ViTConfig, ViTImageProcessor, ViTModel
    >>> from transformers_autogaze import write_video
    >>> from transformers_autogaze.training import DistillationArguments, distill

    >>> config = ViTConfig(
    ...     hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    ... )
    >>> ViTModel(config).save_pretrained("encoder")
    >>> _ = ViTImageProcessor().save_pretrained("encoder")
    >>> for name in "ab":
    ...     _ = write_video(f"{name}.mp4", np.random.randint(255, size=(4, 48, 64, 3), dtype=np.uint8), fps=5)
    >>> args = DistillationArguments(
    ...     "gaze", scales=[2], num_components=4, hidden_sizes=[8, 8, 8], depths=[1, 1, 1], crops_per_video=4, max_steps=1,
    ...     eval_share=0.5, use_cpu=True, report_to="none", disable_tqdm=True,
    ... )
    >>> distill("encoder", ["a.mp4", "b.mp4"], args).num_parameters() > 0  # doctest: +ELLIPSIS
    {...}
    True

    ```
    """
    if args.push_to_hub:
        raise ValueError(
            "`push_to_hub` must be False, as checkpoints of the training are not selectors, got True; upload the result with "
            "examples/push_to_hub.py"
        )
    set_seed(args.seed)
    sources = find_sources(inputs)
    held_out = choose_held_out(sources, args.eval_share, args.seed)
    start = time.perf_counter()
    features = _prepare_features(encoder, sources, args).fill()
    teacher_seconds = time.perf_counter() - start
    datasets = [
        CropPairDataset(features, [i for i in range(len(sources)) if (i in held_out) == is_held_out], args.whitening)
        for is_held_out in (False, True)
    ]
    network = new_network(args)
    trainer = DistillationTrainer(network, args, train_dataset=datasets[0], eval_dataset=datasets[1])
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = {"teacher_seconds": teacher_seconds, "train_seconds": trained.metrics["train_runtime"]}
    network = trainer.accelerator.unwrap_model(trainer.model)
    # Weights are saved in half precision, so the rounded ones are evaluated.
    network.half().float()
    if trainer.is_world_process_zero():
        quality = measure_predictions(network, datasets[1])
        trained_on = [source for number, source in enumerate(sources) if number not in held_out]
        network.config.loss_knots = calibrate(network, features, [sources[i] for i in sorted(held_out)], trained_on)
        facts = _collect_facts(features, sources, held_out, datasets, network, quality)
        _save(network, args, facts | seconds | {"steps": trained.global_step}, credits)
    features.barrier()
    return FeatureGazeModel.from_pretrained(args.output_dir).eval()


def choose_held_out(sources: Sequence[Source], share: float, seed: int = 0) -> set[int]:
    """
    Chooses the files that are held out from training: a share of the videos and of the pictures, at least one of each kind that
    has several files.

    Args:
        sources (`Sequence[Source]`): all files.
        share (`float`): share to hold out, above 0 and below 1.
        seed (`int`, *optional*, defaults to 0): seed of the random numbers.

    Returns:
        `set[int]`: indices of the held-out files.

    Raises:
        ValueError: if there are not two videos or two pictures.
    """
    generator, chosen = np.random.default_rng(seed), set()
    for is_video in (True, False):
        numbers = [number for number, source in enumerate(sources) if source.is_video == is_video]
        if len(numbers) > 1:
            count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
            chosen |= {int(number) for number in generator.permutation(numbers)[:count]}
    if not chosen:
        raise ValueError(
            "`inputs` must hold at least two videos or two pictures, as one is held out to calibrate on, got "
            + ", ".join(source.path for source in sources)
        )
    return chosen


def _prepare_features(
    encoder: str | os.PathLike, sources: Sequence[Source], args: DistillationArguments
) -> TeacherFeatures:
    """Loads the encoder and opens the cache, on all processes."""
    rank, world_size = args.process_index, args.world_size
    if world_size > 1 and args.cache_dir is None:
        raise ValueError(f"`cache_dir` must be given for several processes, got none for {world_size} processes")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    teacher = load_teacher(encoder, args.scales, args.device, dtype)

    def barrier() -> None:
        if world_size > 1:
            torch.distributed.barrier()

    counts = [args.crops_per_video if source.is_video else args.crops_per_picture for source in sources]
    return TeacherFeatures(
        teacher,
        sources,
        [count // 2 for count in counts],
        args.num_components,
        args.cache_dir,
        args.cache_size_gb,
        args.seed,
        (rank, world_size),
        barrier,
    )


def _save(
    network: FeatureGazeNetwork, args: DistillationArguments, facts: dict[str, Any], credits: str | None
) -> None:
    """Saves the selector in float16, with a configuration that loads it in float32, its processor and its card."""
    model = FeatureGazeModel(network.config)
    model.network.load_state_dict(network.state_dict())
    with replacing_files(args.output_dir) as unfinished:
        model.half().save_pretrained(unfinished)
        path = unfinished / CONFIG_NAME
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        AutoGazeProcessor().save_pretrained(unfinished)
        (unfinished / "README.md").write_text(make_card(args, facts, credits), encoding="utf-8")


def _collect_facts(
    features: TeacherFeatures,
    sources: Sequence[Source],
    held_out: set[int],
    datasets: Sequence[CropPairDataset],
    network: FeatureGazeNetwork,
    quality: PredictionQuality,
) -> dict[str, Any]:
    """Collects the facts of a run that the card lists."""
    return {
        "encoder": features.teacher.name,
        "patch_size": features.teacher.grid.patch_size,
        "videos": sum(source.is_video for source in sources),
        "pictures": sum(not source.is_video for source in sources),
        "held_out": [os.path.basename(sources[number].path) for number in sorted(held_out)],
        "crops": [2 * len(dataset) for dataset in datasets],
        "explained": features.components.explained,
        "parameters": network.num_parameters(),
        "r2": quality.r2,
        "change_r2": quality.change_r2,
        "knots": network.config.loss_knots,
    }
