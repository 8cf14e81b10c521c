"""
Puts a gaze model on the Hub, with its processor, the code that loads it anywhere and a model card.

    python examples/push_to_hub.py stage2 you/autogaze           # a checkpoint and where to put it
    python examples/push_to_hub.py stage2 --only-write DIR       # writes the files and stops there

The card is the checkpoint's own, if it has one, or says what the checkpoint itself tells; add how it was trained.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoModel

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeProcessor, GazeSelector


TEMPLATE = Path(__file__).parents[1] / "model_card.md"


def card_of(model: GazeSelector, checkpoint: str) -> str:
    """Gives the card that lies beside a checkpoint, or one that holds what its configuration tells."""
    own = Path(checkpoint) / "README.md"
    if own.exists():
        return own.read_text(encoding="utf-8")
    scales = ", ".join(f"{rows}x{columns}" for rows, columns in model.config.grid.grids)
    facts = {"CLASS": type(model).__name__, "PARAMETERS": f"{model.num_parameters():,}", "SCALES": scales}
    card = TEMPLATE.read_text(encoding="utf-8")
    for name, fact in facts.items():
        card = card.replace(f"{{{name}}}", fact)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint")
    parser.add_argument("repository", nargs="?", help="name of the repository, such as you/autogaze")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write the files there and push nothing")
    parser.add_argument("--tiny", action="store_true", help="write a random model of small size to checkpoint/")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.only_write = "tiny", Path("checkpoint")
        model, processor = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)), AutoGazeProcessor()
    elif options.model is None or (options.repository is None and options.only_write is None):
        parser.error("name a checkpoint and the repository, such as you/autogaze")
    else:
        model = AutoModel.from_pretrained(options.model)
        processor = AutoGazeProcessor.from_pretrained(options.model)

    with tempfile.TemporaryDirectory() as folder:
        folder = options.only_write or Path(folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card_of(model, options.model), encoding="utf-8")
        if options.only_write:
            print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))}")
            return
        api = HfApi()
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        print(api.upload_folder(repo_id=options.repository, folder_path=folder))


if __name__ == "__main__":
    main()
