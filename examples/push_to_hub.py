"""
Pushes a gaze model to the Hub, with its processor, its remote code and its model card.

    python examples/push_to_hub.py stage2 you/autogaze                 # a checkpoint of `autogaze train` or `autogaze distill`
    python examples/push_to_hub.py stage2 --only-write DIR             # writes the files without pushing them
    python examples/push_to_hub.py --tiny                              # a quick run: a small model with random weights

The card is the checkpoint's README.md. Without one, a card is made from the checkpoint's configuration.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeProcessor
from transformers_autogaze.hub.checkpoints import load_selector
from transformers_autogaze.hub.model_cards import make_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint, a folder")
    parser.add_argument("repository", nargs="?", help="name of the repository, such as you/autogaze")
    parser.add_argument("--card", type=Path, help="model card, Markdown, in place of the checkpoint's own")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write the files there and push nothing")
    parser.add_argument("--tiny", action="store_true", help="write a small model with random weights to checkpoint/")
    options = parser.parse_args()
    if options.tiny:
        options.only_write = options.only_write or Path("checkpoint")
        model, processor = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)), AutoGazeProcessor()
    elif options.model is None or (options.repository is None and options.only_write is None):
        parser.error("name a checkpoint and a repository, such as stage2 you/autogaze")
    else:
        model, processor = load_selector(options.model)  # raises an error for an incomplete checkpoint

    own = Path(options.model or "", "README.md")
    card = options.card or (own if options.model and own.exists() else None)
    if card is None:
        text = make_card(model, Path(options.repository or options.only_write).name)
    else:
        text = card.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        folder = options.only_write or Path(folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
        print(f"{type(model).__name__}, card {'made from the checkpoint' if card is None else f'of {card}'}")
        if options.only_write:
            print(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))}")
            return
        api = HfApi()
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        print(api.upload_folder(repo_id=options.repository, folder_path=folder))


if __name__ == "__main__":
    main()
