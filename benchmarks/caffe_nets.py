"""Networks of Caffe in this package and in OpenCV 4: the same scores, and the time for 32 images.

    pip install 'opencv-python-headless<5'
    python benchmarks/caffe_nets.py [NAME...] [--images N] [--threads T] [--output FILE]

The networks are python_tests/caffe_nets/*.prototxt, with weights drawn at random. Both programs read the same two
files, so that the comparison begins with them.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from alexnet_cuda import caffe
from alexnet_cuda.formats.caffe import parameters, schema

NETS = Path(__file__).parent.parent / "python_tests" / "caffe_nets"


def names() -> list[str]:
    return sorted(path.stem for path in NETS.glob("*.prototxt"))


def text_of(name: str) -> str:
    """The text of a network. LRN gets its default k of 1, because OpenCV's reader does not know that field."""
    return re.sub(r" k: \d", "", (NETS / f"{name}.prototxt").read_text())


def narrowed(text: str, divisor: int) -> str:
    """The network with a fraction of the channels and units; those of grouped transposed convolutions stay equal."""

    def smaller(found: re.Match) -> str:
        return f"{found[1]}: {max(4, int(found[2]) // divisor // 4 * 4)}"

    return re.sub(r"(num_output|(?<=32 stride: 16 )group): (\d+)", smaller, text)


@torch.no_grad()
def draw_weights(prototxt: Path, caffemodel: Path, seed: int = 0) -> None:
    """Writes a .caffemodel with random weights that keep the scale of the activations, and scores of a standard
    deviation of 3 for images of 50."""
    net = caffe.load(prototxt)
    generator = torch.Generator().manual_seed(seed)
    blobs: dict[str, list[np.ndarray]] = {}
    last = None
    for name in net.layers:
        module = net.layer(name)
        blobs[name] = [_values(module, target, generator) for target in parameters.targets(module)]
        if blobs[name]:
            last = name
            parameters.load(module, blobs[name])
    if last:
        images = 50 * torch.randn(1, *net.input_shapes[0][1:], generator=generator)
        scale = 3 / net.blobs(images)[net.layers[last][2][0]].std().item()
        blobs[last] = [scale * blob for blob in blobs[last]]
    message = schema.NetParameter(name=net.name)
    for name, arrays in blobs.items():
        layer = message.layer.add(name=name, type=net.layers[name][0])
        for array in arrays:
            layer.blobs.add(data=array.ravel()).shape.dim.extend(array.shape)
    caffemodel.write_bytes(message.SerializeToString())


def _values(module: torch.nn.Module, target: str, generator: torch.Generator) -> np.ndarray:
    own = getattr(module, target, torch.ones(1))
    values = torch.randn(own.shape, generator=generator)
    if target == "weight" and own.dim() > 1:
        return (values * (2 / own[0].numel()) ** 0.5).numpy()
    if target in ("running_var", "factor"):
        return (1 + values**2).numpy()
    return (0.1 * values + (target == "weight")).numpy()


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
def compare(prototxt: Path, caffemodel: Path, images: int, seed: int = 0) -> dict[str, float]:
    """The largest difference as a share of the largest output, and the share of images with the same first class."""
    ours, theirs = caffe.load(prototxt, caffemodel), opencv(prototxt, caffemodel)
    shape = ours.input_shapes[0]
    assert shape is not None
    generator = torch.Generator().manual_seed(seed)
    difference, same = 0.0, 0.0
    for _ in range(images):
        x = 50 * torch.randn(1, *shape[1:], generator=generator)
        a, b = ours(x), torch.from_numpy(theirs(x.numpy())[0])
        assert a.shape == b.shape, f"{a.shape} and {b.shape}"
        difference = max(difference, ((a - b).abs().max() / b.abs().max()).item())
        same += (a.argmax(1) == b.argmax(1)).float().mean().item()
    return {"images": images, "largest_difference": difference, "same_first_class": same / images}


@torch.no_grad()
def times(prototxt: Path, caffemodel: Path, batch: int = 32, repeats: int = 5) -> dict[str, float]:
    """Median seconds for a batch in each program, in turns."""
    ours, theirs = caffe.load(prototxt, caffemodel), opencv(prototxt, caffemodel)
    shape = ours.input_shapes[0]
    assert shape is not None
    x = torch.randn(batch, *shape[1:])
    runs = {"alexnet_cuda": lambda: ours(x), "opencv": lambda: theirs(x.numpy())}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    return {**medians, "ratio": medians["opencv"] / medians["alexnet_cuda"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; none: all")
    parser.add_argument("--images", type=int, default=1000, help="random images for the comparison of scores")
    parser.add_argument("--batch", type=int, default=32, help="images of the timed batch; 0: no times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    import cv2

    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or names():
            prototxt, caffemodel = Path(folder) / f"{name}.prototxt", Path(folder) / f"{name}.caffemodel"
            prototxt.write_text(text_of(name))
            draw_weights(prototxt, caffemodel)
            results[name] = compare(prototxt, caffemodel, options.images)
            if options.batch:
                results[name] |= times(prototxt, caffemodel, options.batch)
            caffemodel.unlink()
            print(name, json.dumps({key: float(f"{value:.3g}") for key, value in results[name].items()}), flush=True)
    if options.output:
        facts = {"opencv": cv2.__version__, "torch": torch.__version__, "threads": options.threads}
        options.output.write_text(json.dumps({"environment": facts, "networks": results}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
