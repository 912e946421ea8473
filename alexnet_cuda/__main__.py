"""`python -m alexnet_cuda`: the command line."""

from .cli import main

main()
