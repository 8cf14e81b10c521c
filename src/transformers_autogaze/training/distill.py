"""
The whole way from an encoder and files to a [`FeatureGazeModel`]: crops, features, training, calibration, card.

This module owns the order of these steps and what the card says of them.
"""

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
from .calibration import Foresight, calibrate, measure_foresight
from .crops import Source, find_sources
from .distillation import CropPairDataset, DistillationArguments, DistillationTrainer, new_network
from .distillation_card import make_card
from .teacher_features import TeacherFeatures
from .teachers import load_teacher


def distill(
    encoder: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    args: DistillationArguments,
    credits: str | None = None,
) -> FeatureGazeModel:
    """
    Distills a selector from an encoder, and writes it to `args.output_dir` with its processor and a card.

    Args:
        encoder (`str` or `os.PathLike`): folder or Hub repository of an image tower or a Qwen-VL; see [`load_teacher`].
        inputs (`Sequence` of `str` or `os.PathLike`): videos and pictures; see [`find_sources`].
        args ([`DistillationArguments`]): the arguments; `bf16` holds for the encoder as well.
        credits (`str`, *optional*): what the card says of data and licences, in Markdown.

    Returns:
        [`FeatureGazeModel`]: as it was written, its weights rounded to float16.

    Raises:
        ValueError: if nothing can be read, the encoder is not known, or the arguments do not fit.

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
    # Half precision is what will be loaded, so that is what is measured.
    network.half().float()
    if trainer.is_world_process_zero():
        foresight = measure_foresight(network, datasets[1])
        trained_on = [source for number, source in enumerate(sources) if number not in held_out]
        network.config.loss_knots = calibrate(network, features, [sources[i] for i in sorted(held_out)], trained_on)
        facts = _facts(features, sources, held_out, datasets, network, foresight)
        _save(network, args, facts | seconds | {"steps": trained.global_step}, credits)
    features.wait()
    return FeatureGazeModel.from_pretrained(args.output_dir).eval()


def choose_held_out(sources: Sequence[Source], share: float, seed: int = 0) -> set[int]:
    """
    Chooses the files that are not trained on: of videos and of pictures a share each, at least one of two or more.

    Args:
        sources (`Sequence[Source]`): all files.
        share (`float`): share of them, above 0 and below 1.
        seed (`int`, *optional*, defaults to 0): where random numbers start from.

    Returns:
        `set[int]`: their numbers.

    Raises:
        ValueError: if there are not two videos or two pictures.
    """
    draw, chosen = np.random.default_rng(seed), set()
    for is_video in (True, False):
        numbers = [number for number, source in enumerate(sources) if source.is_video == is_video]
        if len(numbers) > 1:
            count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
            chosen |= {int(number) for number in draw.permutation(numbers)[:count]}
    if not chosen:
        raise ValueError(
            "`inputs` must hold at least two videos or two pictures, as one is held out to calibrate on, got "
            + ", ".join(source.path for source in sources)
        )
    return chosen


def _prepare_features(
    encoder: str | os.PathLike, sources: Sequence[Source], args: DistillationArguments
) -> TeacherFeatures:
    """Loads the encoder and opens the store, on all processes."""
    number, count = args.process_index, args.world_size
    if count > 1 and args.cache_dir is None:
        raise ValueError(f"`cache_dir` must be given where several processes share it, got none for {count} processes")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    teacher = load_teacher(encoder, args.scales, args.device, dtype)

    def wait() -> None:
        if count > 1:
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
        (number, count),
        wait,
    )


def _save(
    network: FeatureGazeNetwork, args: DistillationArguments, facts: dict[str, Any], credits: str | None
) -> None:
    """Writes the selector in float16, as one that loads in float32, its processor and its card."""
    model = FeatureGazeModel(network.config)
    model.network.load_state_dict(network.state_dict())
    with replacing_files(args.output_dir) as unfinished:
        model.half().save_pretrained(unfinished)
        path = unfinished / CONFIG_NAME
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        AutoGazeProcessor().save_pretrained(unfinished)
        (unfinished / "README.md").write_text(make_card(args, facts, credits), encoding="utf-8")


def _facts(
    features: TeacherFeatures,
    sources: Sequence[Source],
    held_out: set[int],
    datasets: Sequence[CropPairDataset],
    network: FeatureGazeNetwork,
    foresight: Foresight,
) -> dict[str, Any]:
    """Gathers what the card says of a run."""
    return {
        "encoder": features.teacher.name,
        "patch_size": features.teacher.grid.patch_size,
        "videos": sum(source.is_video for source in sources),
        "pictures": sum(not source.is_video for source in sources),
        "held_out": [os.path.basename(sources[number].path) for number in sorted(held_out)],
        "crops": [2 * len(dataset) for dataset in datasets],
        "explained": features.components.explained,
        "parameters": network.num_parameters(),
        "r2": foresight.r2,
        "change_r2": foresight.change_r2,
        "knots": network.config.loss_knots,
    }
