"""Networks in the formats of other programs: Caffe's weights, ONNX files, torch.export programs."""
