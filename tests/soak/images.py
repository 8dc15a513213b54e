"""Trains on 5,000 images with augmentation and mixing, kills everything, resumes, and compares bit by bit.

python -m tests.soak.images CIFAR      # CIFAR/train/CLASS/*.jpg; needs torchvision: run it in .venv-extras
"""

import argparse
import hashlib
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

from tests.training.support.faulty_runs import differences, fault
from tests.training.support.train_command import Run, train


def main() -> None:
    """Prints what each of the runs was, and exits with 1 if their ends differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    default = ["augment=randaugment", "mix=both", "averaging.ema=0.99"]
    parser.add_argument("settings", nargs="*", default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        images = _images(asked.source, where / "images", asked.per_class)
        kill = fault(where, "kill_everything", epoch=asked.epochs - 1, batch=images // 128)
        same = (
            *("data=folder", f"data.root={where / 'images'}", "model.width=8", "trainer.devices=2"),
            *(f"data.num_workers={asked.workers}", f"trainer.max_epochs={asked.epochs}", "resume.every_n_steps=7"),
            *(f"data.cache_dir={where / 'cache'}", "data.cache=0.1", "logger=csv", *asked.settings),
        )
        straight = train(where, *same, "run.id=straight", timeout=1200).ended()
        print(f"{images} images; {' '.join(same[2:])}")
        print(f"undisturbed: {_weights(straight)}, {straight.json('result')['steps']} steps")
        killed = train(where, *same, "run.id=resumed", kill, timeout=1200)
        print(f"killed: exit status {killed.code}, at {(where / 'once').read_text(encoding='utf-8').strip()}")
        resumed = train(where, *same, "run.id=resumed", kill, timeout=1200).ended()
        print(f"resumed:     {_weights(resumed)}, {resumed.json('result')['steps']} steps")
        # Lightning 2.6 does not restore ModelCheckpoint's current_score, the score of the last improvement.
        found = [each for each in differences(straight, resumed) if "/current_score: " not in each]
    print("\n".join(found) or "weights, optimizer, running statistics, metrics and test are bitwise the same")
    sys.exit(bool(found))


def _images(source: Path, target: Path, per_class: int) -> int:
    """Links the first images of each class; the number of images."""
    number = 0
    for folder in sorted(each for each in (source / "train").iterdir() if each.is_dir()):
        (target / folder.name).mkdir(parents=True)
        for path in islice(sorted(folder.iterdir()), per_class):
            (target / folder.name / path.name).symlink_to(path.resolve())
            number += 1
    return number


def _weights(run: Run) -> str:
    """A hash of the weights and buffers of the last checkpoint."""
    state = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.numpy().tobytes())
    return f"weights {found.hexdigest()[:16]}"


if __name__ == "__main__":
    main()
