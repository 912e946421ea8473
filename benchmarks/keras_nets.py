"""A variant as the network of Keras that its tutorials train, on TensorFlow (`pip install tensorflow-cpu`)."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from alexnet_cuda import variants
from alexnet_cuda.variants import Variant


def keras_network(variant: Variant) -> Any:
    """A keras.Model (N, H, W, C) -> class scores with the layers of the variant, which has no groups."""
    import keras
    import tensorflow as tf

    kl = keras.layers
    net = keras.Sequential([keras.Input((variant.input_size, variant.input_size, variant.channels))])
    for layer in (*variant.features, "flatten", *variant.classifier):
        match layer:
            case "flatten":
                net.add(kl.Flatten())
            case variants.Conv(filters, kernel_size, stride, padding, _, ceil_mode):
                after = padding + (ceil_mode and -(net.output_shape[1] + 2 * padding - kernel_size) % stride)
                net.add(kl.ZeroPadding2D(((padding, after), (padding, after))))
                net.add(kl.Conv2D(filters, kernel_size, stride, use_bias=layer.bias))
            case variants.LRN(size, alpha, beta, k):
                alpha = alpha / size if layer.divide_alpha else alpha
                arguments = {"depth_radius": size // 2, "bias": k, "alpha": alpha, "beta": beta}
                net.add(kl.Lambda(tf.nn.local_response_normalization, arguments=arguments))
            case variants.MaxPool(kernel_size, stride, ceil_mode):
                net.add(kl.MaxPooling2D(kernel_size, stride, "same" if ceil_mode else "valid"))
            case variants.BatchNorm(eps, momentum):
                net.add(kl.BatchNormalization(momentum=1 - momentum, epsilon=eps))
            case variants.Dropout(p):
                net.add(kl.Dropout(p))
            case variants.ReLU():
                net.add(kl.ReLU())
            case variants.Linear(units):
                net.add(kl.Dense(units or variant.num_classes))
    return net


def keras_training_step(variant: Variant, batch: int) -> Callable[[], Any]:
    """One step of `fit` on a batch: forward, cross-entropy, backward and SGD with momentum and weight decay."""
    os.environ |= {"TF_NUM_INTRAOP_THREADS": str(torch.get_num_threads()), "TF_NUM_INTEROP_THREADS": "1"}
    import keras
    import tensorflow as tf

    net = keras_network(variant)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.SGD(1e-6, momentum=0.9, weight_decay=5e-4), loss)
    shape = (batch, variant.input_size, variant.input_size, variant.channels)
    x = tf.constant(np.random.default_rng(0).standard_normal(shape, np.float32))
    labels = tf.constant(np.arange(batch) % 10)
    return lambda: net.train_on_batch(x, labels)
