"""Text of Caffe networks for the tests."""


def input_layer(*shape, name="data"):
    dims = " ".join(f"dim: {size}" for size in shape)
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {dims} }} }} }}\n'


def layer(name, type_, parameters="", bottoms="data", tops=None):
    bottom = " ".join(f'bottom: "{blob}"' for blob in bottoms.split())
    top = " ".join(f'top: "{blob}"' for blob in (tops or name).split())
    return f'layer {{ name: "{name}" type: "{type_}" {bottom} {top} {parameters} }}\n'
