"""Networks of Caffe in this package and in OpenCV 4: the same scores, and the time for 32 images.

    pip install 'opencv-python-headless<5'
    python benchmarks/caffe_nets.py [NAME...] [--photos DIR] [--images N] [--batch 0] [--threads T] [--output FILE]

The networks are python_tests/caffe_nets/*.prototxt, with weights drawn at random. Both programs read the same two
files, so that the comparison begins with them. FILE keeps what it has: a network that it holds with as many images is
not measured again, so that the same command goes on where it was stopped. Prints the table of docs/caffe.md.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from alexnet_cuda import caffe
from alexnet_cuda.files import write_text
from alexnet_cuda.formats.caffe import parameters, schema

NETS = Path(__file__).parent.parent / "python_tests" / "caffe_nets"
MEAN = torch.tensor([104.0, 117.0, 123.0])[:, None, None]  # BGR
AT_ONCE = 10  # images


def names() -> list[str]:
    return sorted(path.stem for path in NETS.glob("*.prototxt"))


def text_of(name: str) -> str:
    """The text of a network. LRN gets its default k of 1, because OpenCV's reader does not know that field."""
    return re.sub(r" k: \d", "", (NETS / f"{name}.prototxt").read_text())


def random_images(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    """Smooth images of a standard deviation of about 50."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 50 * torch.randn(count, shape[0], 6, 6, generator=generator)
    return F.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)


def photos(folder: Path, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The .jpg files in a folder, by name, cropped to the size: (1, 3, H, W), BGR, 0..255 minus the mean."""
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            image.draft("RGB", shape[:0:-1])
            cropped = ImageOps.fit(image.convert("RGB"), shape[:0:-1])
        yield (torch.from_numpy(np.array(cropped)).permute(2, 0, 1).flip(0) - MEAN)[None]


@torch.no_grad()
def draw_weights(prototxt: Path, caffemodel: Path, images: Tensor | None = None, seed: int = 0) -> None:
    """Writes a .caffemodel with random weights. For `images` the outputs of convolutions and linear layers have the
    images' scale, so that LRN has an effect; those of the last one have mean 0 for each class and standard deviation
    0.25, so that the first class differs from image to image and softmax does not magnify differences."""
    torch.manual_seed(seed)
    net = caffe.load(prototxt)
    layers = {name: net.layer(name) for name in net.layers}
    blobs = {
        name: [_values(module, target) for target in parameters.targets(module)] for name, module in layers.items()
    }
    for name, module in layers.items():
        if blobs[name]:
            parameters.load(module, blobs[name])
    trained = [module for module in layers.values() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in trained:
        last = module is trained[-1] and module.bias is not None
        module.register_forward_hook(_center if last else _scale)
    net(random_images(net.input_shapes[0][1:], 8) if images is None else images)
    message = schema.NetParameter(name=net.name)
    for name, module in layers.items():
        layer = message.layer.add(name=name, type=net.layers[name][0])
        if isinstance(module, nn.Conv2d | nn.Linear):
            blobs[name] = [getattr(module, target).numpy() for target in parameters.targets(module)]
        for array in blobs[name]:
            layer.blobs.add(data=array.ravel().tolist()).shape.dim.extend(array.shape)
    caffemodel.write_bytes(message.SerializeToString())


def _values(module: nn.Module, target: str) -> np.ndarray:
    own = getattr(module, target, torch.ones(1))
    values = torch.randn(own.shape)
    if target == "weight" and own.dim() > 1:
        return (values * (2 / own[0].numel()) ** 0.5).numpy()
    if target in ("running_var", "factor"):
        return (1 + values**2).numpy()
    if target == "bias" and isinstance(module, nn.Conv2d | nn.Linear):
        return (5 * values).numpy()
    return (0.1 * values + (target == "weight")).numpy()


def _scale(module: nn.Conv2d | nn.Linear, inputs: tuple, output: Tensor, size: float = 50) -> Tensor:
    """Changes the parameters so that the root of the mean square of the output is `size`."""
    factor = size / output.square().mean().sqrt()
    for parameter in module.parameters():
        parameter *= factor
    return output * factor


def _center(module: nn.Conv2d | nn.Linear, inputs: tuple, output: Tensor) -> Tensor:
    """Changes the parameters so that each channel has mean 0, and the output standard deviation 0.25."""
    mean = output.transpose(0, 1).flatten(1).mean(1)
    module.bias -= mean
    return _scale(module, inputs, output - mean.reshape(-1, *(1,) * (output.dim() - 2)), 0.25)


def opencv(prototxt: Path, caffemodel: Path):
    """{input: array} -> {output: array} of OpenCV's reader and its CPU code."""
    import cv2

    net = cv2.dnn.readNetFromCaffe(str(prototxt), str(caffemodel))
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)

    def run(images: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
        net.setInput(images)
        return list(net.forward(outputs or net.getUnconnectedOutLayersNames()))

    return run


@torch.no_grad()
def compare(prototxt: Path, caffemodel: Path, batches: Iterable[Tensor]) -> dict[str, float]:
    """The largest difference as a share of the largest output of its image, between the two programs and, for two
    images, of each from float64; the share of first classes that are the same; and how many classes are first for an
    image (or a pixel)."""
    ours, theirs = caffe.load(prototxt, caffemodel), opencv(prototxt, caffemodel)
    images, difference, same, first, errors = 0, 0.0, 0.0, set(), {}
    for x in batches:
        a, b = ours(x), torch.from_numpy(theirs(x.numpy())[0])
        assert a.shape == b.shape, f"{a.shape} and {b.shape}"
        if not images:
            exact = copy.deepcopy(ours).double()(x[:2].double())
            errors = {"error": _share(a[:2], exact), "opencv_error": _share(b[:2], exact)}
        difference = max(difference, _share(a, b))
        same += (a.argmax(1) == b.argmax(1)).float().mean().item() * len(x)
        images += len(x)
        first |= set(b.argmax(1).unique().tolist())
    return {
        "images": images,
        "largest_difference": difference,
        "same_first_class": same / images,
        "first_classes": len(first),
        **errors,
    }


def _share(a: Tensor, b: Tensor) -> float:
    return ((a - b).flatten(1).abs().amax(1) / b.flatten(1).abs().amax(1)).max().item()


@torch.no_grad()
def times(prototxt: Path, caffemodel: Path, batch: int = 32, repeats: int = 3) -> dict[str, float]:
    """Median seconds for a batch in each program, in turns: processor time with one thread, which other programs on
    the machine do not change."""
    ours, theirs = caffe.load(prototxt, caffemodel), opencv(prototxt, caffemodel)
    x = random_images(ours.input_shapes[0][1:], batch)
    runs = {"alexnet_cuda": lambda: ours(x), "opencv": lambda: theirs(x.numpy())}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    return {**medians, "ratio": medians["opencv"] / medians["alexnet_cuda"]}


def table(results: dict[str, dict]) -> str:
    """The table of docs/caffe.md."""
    lines = [
        "| network | images | difference | error against float64 (ours, OpenCV) | same first class | first classes | "
        "seconds (ours, OpenCV) | OpenCV / ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    compared = {name: r for name, r in sorted(results.items()) if "images" in r}
    for name, r in compared.items():
        timed = "ratio" in r
        cells = [
            f"[{name}](../python_tests/caffe_nets/{name}.prototxt)",
            f"{r['images']:,}",
            f"{r['largest_difference']:.1e}",
            f"{r['error']:.1e}, {r['opencv_error']:.1e}",
            f"{100 * r['same_first_class']:.6g} %",
            f"{r['first_classes']:,}",
            f"{r['alexnet_cuda']:.2f}, {r['opencv']:.2f}" if timed else "-",
            f"**{r['ratio']:.2f}**" if timed else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; none: all")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="a folder of .jpg files to compare with")
    parser.add_argument("--images", type=int, default=1000, help="images for the comparison; 0: no comparison")
    parser.add_argument("--batch", type=int, default=32, help="images of the timed batch; 0: no times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the results")
    options = parser.parse_args()
    import cv2

    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    output = options.output
    results = json.loads(output.read_text())["networks"] if output and output.exists() else {}
    machine = common.machine("cpu") | {"opencv": cv2.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or names():
            result = results.setdefault(name, {})
            if result.get("images", 0) >= options.images and ("ratio" in result or not options.batch):
                continue
            prototxt, caffemodel = Path(folder) / f"{name}.prototxt", Path(folder) / f"{name}.caffemodel"
            prototxt.write_text(text_of(name))
            shape = caffe.load(prototxt).input_shapes[0][1:]
            images = photos(options.photos, shape) if options.photos else random_images(shape, options.images).split(1)
            batches = _batches(images, options.images)
            first = next(batches, None)
            draw_weights(prototxt, caffemodel, first)
            if first is not None and result.get("images", 0) < options.images:
                result |= compare(prototxt, caffemodel, (batch for some in ([first], batches) for batch in some))
                _save(output, machine, results)
            if options.batch and "ratio" not in result:
                result |= times(prototxt, caffemodel, options.batch)
                _save(output, machine, results)
            caffemodel.unlink()
            print(name, json.dumps({key: float(f"{value:.3g}") for key, value in result.items()}), flush=True)
    print(table(results))


def _save(output: Path | None, machine: dict, results: dict[str, dict]) -> None:
    if output:
        write_text(output, json.dumps({"machine": machine, "networks": results}, indent=1) + "\n")


def _batches(images: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    some: list[Tensor] = []
    for i, image in enumerate(images):
        if i == count:
            break
        some.append(image)
        if len(some) == AT_ONCE:
            yield torch.cat(some)
            some = []
    if some:
        yield torch.cat(some)


if __name__ == "__main__":
    sys.exit(main())
