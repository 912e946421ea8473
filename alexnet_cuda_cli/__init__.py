"""Where the console script `alexnet-cuda` starts.

`import alexnet_cuda` loads torch, which takes seconds and which `--help` does not need. Here Python gets the package
before its `__init__.py` has run, so that a command loads only the modules that it imports.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    spec = find_spec("alexnet_cuda")
    assert spec is not None
    sys.modules[spec.name] = module_from_spec(spec)
    from alexnet_cuda.cli import main as command_line

    command_line()
