"""Writes a run's weights as float16, with a card, to alexnet_cuda/pretrained/: `tools/pretrained.py RUN [DATA_PATH]`.

The card has the run's accuracy on the test split, and with one crop that of its weights before and after.
"""

import json
import subprocess
import sys
from pathlib import Path

from alexnet_cuda import pretrained
from alexnet_cuda.cli._app import load_run
from alexnet_cuda.files import write_text
from alexnet_cuda.formats.export import save_safetensors
from alexnet_cuda.recipe import command
from alexnet_cuda.training.evaluation import figures, predict
from alexnet_cuda.weights import load_weights
from alexnet_cuda.words import percent

TERMS = {
    "cifar10": "CIFAR-10 (A. Krizhevsky, 2009) has no formal licence; it is free to use with that citation. Its images "
    "are from 80 Million Tiny Images, which its authors have withdrawn.",
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges) has no formal licence.",
    "digits": "The digits (E. Alpaydin, C. Kaynak, UCI repository, as scikit-learn carries them) are CC BY 4.0.",
}
CARD = """# {name}: AlexNet variant {variant}, {count} classes

| what | value |
|---|---|
| data | {name}: {train:,} images for training, {val:,} for validation, {test:,} for the test |
| command | `{command}` |
| version | alexnet_cuda {alexnet_cuda} of commit {commit}, torch {torch}, {device}, {precision} |
| trained | {epochs} epochs, {seconds:.0f} s |
| test accuracy | {accuracy} in the run, averaging over {views} crop(s) |
| the same with one crop | {before} before, {after} after the weights were rounded to float16 |
| input | {size}x{size}, {channels} channel(s), mean {mean}, standard deviation {std} of pixels in 0..1 |
| classes | {classes} |

`AlexNet("{variant}", weights="{name}")`, or `alexnet-cuda predict PICTURE --weights {name}`.

Licence of the weights: that of this package. {terms}

Limits: {limits} A picture of anything else gets one of these classes as well, at times with a high probability.
"""
GLYPHS = "one bright digit on black, or dark on white, in the middle of the picture."
LIMITS = {
    "cifar10": "photographs with one such object in the middle, seen at 32x32 pixels.",
    "mnist": GLYPHS,
    "digits": GLYPHS,
}


def main(run: Path, data_path: str | None = None) -> None:
    model, recipe, images = load_run(run, data_path)
    centre = recipe.replace({"views": 1})
    before = figures(predict(model, images, centre))["test/accuracy"]
    path = pretrained.FOLDER / f"{recipe.name}.safetensors"
    plain = recipe.replace({"accelerator": "auto", "devices": "auto", "workers": -1})
    save_safetensors(path, model, plain, images.classes, "float16")
    after = figures(predict(load_weights(path)[0], images, centre))["test/accuracy"]
    if before - after > 0.0005:
        raise SystemExit(f"float16 costs {percent(before - after)}")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=pretrained.FOLDER, text=True).strip()
    metrics = json.loads((run / "metrics.json").read_text())
    facts = {key: metrics[key] for key in ("variant", "epochs", "seconds", "device", "precision")} | metrics["images"]
    card = CARD.format(
        **facts, name=recipe.name, count=len(images.classes), classes=", ".join(images.classes),
        command=command(recipe), commit=commit, **metrics["versions"],
        accuracy=percent(metrics["test/accuracy"]),
        views=recipe.views, before=percent(before), after=percent(after), size=recipe.input_size,
        channels=recipe.channels, mean=list(recipe.mean), std=list(recipe.std), terms=TERMS[recipe.name],
        limits=LIMITS[recipe.name],
    )  # fmt: skip
    write_text(path.with_suffix(".md"), card)
    print(f"{path}: {path.stat().st_size:,} bytes, {percent(before)}, {percent(after)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
