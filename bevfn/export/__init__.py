"""A trained model as a file for other runtimes: `bevfn export`. Source: ONNX's operator reference, opset 18."""
