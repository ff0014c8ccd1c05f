"""From a rewritten graph to an ONNX file that stock runtimes load.

Inside this package ``import onnx`` is the library: it is imported in the functions that need it.
"""
