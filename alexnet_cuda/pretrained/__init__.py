"""Weights in safetensors files, with class names and preprocessing in their metadata: reading, writing and sharing.

This folder holds those of three trained networks, each with a card.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AlexNetError, DataError
from ..files import atomic_path, write_text

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
NAMES = ("cifar10", "mnist", "digits")  # of the trained networks in this folder
FILES = ("weights.safetensors", "model.safetensors")  # of a run folder; of `save`
OF_OTHERS = ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def find(source: Path | str, expected: str = "expected a folder or file of weights") -> Path:
    """The weights file of a run folder, of a folder of `save`, of one of NAMES, or the file itself; what exists goes
    before a name. Raises DataError if there is none."""
    path = Path(source)
    if not path.exists() and str(source) in NAMES:
        return FOLDER / f"{source}.safetensors"
    if path.is_dir():
        path = next((path / name for name in (*FILES, *OF_OTHERS) if (path / name).exists()), path / FILES[0])
    if not path.exists():
        raise DataError(f"{path} does not exist; {expected}, or one of {', '.join(NAMES)}")
    if not path.is_file() and not path.is_char_device():  # a pipe would be waited for
        raise DataError(f"{path} is not a file; {expected}")
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, replacing `path` only when the file is complete."""
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata))


def save(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes model.safetensors, and for readers config.json and README.md, which repeat its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / FILES[1], tensors, {"format": "pt"} | metadata)
    config = {"variant": metadata["variant"], "classes": json.loads(metadata["classes"])}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if not (folder / "README.md").exists():
        write_text(folder / "README.md", CARD.format(**config, count=len(config["classes"])))


CARD = """---
library_name: alexnet_cuda
pipeline_tag: image-classification
---
# AlexNet, variant {variant}, {count} classes

`model.safetensors` holds the weights, and in its metadata the class names and the preprocessing.

```python
from alexnet_cuda import AlexNet

model = AlexNet.from_pretrained("owner/name")  # or this folder
```

`alexnet-cuda predict PICTURE --weights FOLDER` classifies pictures with it.
"""


def download(name: str) -> Path:
    """model.safetensors of the repository `name` (owner/name) of the Hugging Face Hub, kept in its cache."""
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(name, FILES[1]))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name} is no folder here and cannot be read from the hub: {reason}") from error


def upload(name: str, tensors: dict[str, Tensor], metadata: dict[str, str], private: bool) -> str:
    """Writes what `save` writes to the repository `name` of the hub, which is made if need be; returns its address."""
    api = _hub().HfApi()
    address = str(api.create_repo(name, private=private, exist_ok=True))
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), tensors, metadata)
        api.upload_folder(repo_id=name, folder_path=folder)
    return address


def _hub():
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        remedy = "`pip install 'alexnet_cuda[hub]'` installs it"
        raise AlexNetError(f"the hub needs huggingface_hub, which is not installed; {remedy}") from error
    return huggingface_hub
