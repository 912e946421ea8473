"""`python -m alexnet_cuda.cli`."""

from . import main

main()
