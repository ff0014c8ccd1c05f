"""From mpgraph's graphs to ONNX files of standard operators."""
