"""
Puts a gaze model on the Hub, with its processor, the code that loads it anywhere and a model card.

    python examples/push_to_hub.py you/autogaze                    # the weights that come with the package
    python examples/push_to_hub.py you/autogaze --model stage2     # your own
    python examples/push_to_hub.py you/autogaze --only-write DIR   # writes the files and stops there
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeProcessor


CARD = Path(__file__).parents[1] / "model_card.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", help="name of the repository, such as you/autogaze")
    parser.add_argument("--model", help="checkpoint; by default the weights that come with the package")
    parser.add_argument("--card", type=Path, default=CARD, help="model card, Markdown")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write the files there and push nothing")
    parser.add_argument("--tiny", action="store_true", help="write a random model of small size to checkpoint/")
    options = parser.parse_args()
    if options.tiny:
        options.only_write = Path("checkpoint")
    elif options.repository is None:
        parser.error("name the repository, such as you/autogaze")

    processor = AutoGazeProcessor()
    if options.tiny:
        model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    elif options.model is None:
        model = AutoGazeModel.from_default()
    else:
        model = AutoGazeModel.from_pretrained(options.model)
        processor = AutoGazeProcessor.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        folder = options.only_write or Path(folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        ModelCard.load(options.card).save(folder / "README.md")
        if options.only_write:
            print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))}")
            return
        api = HfApi()
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        print(api.upload_folder(repo_id=options.repository, folder_path=folder))


if __name__ == "__main__":
    main()
