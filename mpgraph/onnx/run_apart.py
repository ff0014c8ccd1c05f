"""Run a file in onnxruntime in a process of its own: ``python run_apart.py FOLDER``.

A crash inside of onnxruntime then ends this process, and not the user's; and neither torch nor
mpgraph is loaded here. The folder holds ``call.json`` and one array per input; results go there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such dtype, so its bits travel as uint16


def main(folder: Path) -> None:
    """Run the call that the folder describes."""
    numpy: Any = importlib.import_module("numpy")
    onnxruntime: Any = importlib.import_module("onnxruntime")
    onnxruntime.set_default_logger_severity(4)
    call: dict[str, Any] = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    name, settings = call["provider"]
    session = onnxruntime.InferenceSession(call["file"], options, providers=[(name, settings)])
    if name not in session.get_providers():
        (folder / "result.json").write_text(json.dumps({"unavailable": True}))
        return
    make = onnxruntime.OrtValue
    feed = {}
    for index, (name, is_bf16) in enumerate(call["inputs"]):
        array = numpy.load(folder / f"input_{index}.npy")
        feed[name] = (
            make.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
            if is_bf16
            else make.ortvalue_from_numpy(array)
        )
    kinds = []
    for index, value in enumerate(session.run_with_ort_values(None, feed)):
        kinds.append(value.data_type())
        numpy.save(folder / f"output_{index}.npy", _array(value, numpy))
    (folder / "result.json").write_text(json.dumps({"outputs": kinds}))


def _array(value: Any, numpy: Any) -> Any:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    count = 1
    for size in shape:
        count *= size
    bits = ctypes.string_at(value.data_ptr(), 2 * count)
    return numpy.frombuffer(bits, numpy.uint16).reshape(shape)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
