"""The operators, one file each: fake kernel, autograd formula and batching rule, then the public function.

Every function has a twin of the same signature in `reference`. What no kernel covers (device, dtype, geometry) goes to
the twin, which uses torch's own operators.
"""

from .conv2d import conv2d
from .conv2d_relu_lrn_max_pool2d import conv2d_relu_lrn_max_pool2d
from .local_response_norm import local_response_norm
from .max_pool2d import max_pool2d
from .relu_lrn_max_pool2d import relu_lrn_max_pool2d

__all__ = ["conv2d", "conv2d_relu_lrn_max_pool2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d"]
