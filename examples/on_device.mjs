// Trains from an exported folder in JavaScript, as on_device.py does in Python.
//
//     node on_device.mjs FOLDER [onnxruntime-node | onnxruntime-web]

import { readFileSync, writeFileSync } from "node:fs";

const BATCH = 32;
const TYPES = {
  BOOL: ["bool", Uint8Array],
  F32: ["float32", Float32Array],
  F64: ["float64", Float64Array],
  I32: ["int32", Int32Array],
  I64: ["int64", BigInt64Array],
  U8: ["uint8", Uint8Array],
};
const [folder, runtime = "onnxruntime-node"] = process.argv.slice(2);
const { InferenceSession, Tensor } = await import(runtime);

const mapped = (object, change) =>
  Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
const picked = (object, names) => Object.fromEntries(names.map((name) => [name, object[name]]));

/** The tensors of a safetensors file: the length of a header, the header in JSON, the values. */
function readTensors(name) {
  const { buffer, byteOffset } = readFileSync(`${folder}/${name}.safetensors`);
  const length = Number(new DataView(buffer, byteOffset).getBigUint64(0, true));
  const text = new TextDecoder().decode(new Uint8Array(buffer, byteOffset + 8, length));
  const { __metadata__, ...header } = JSON.parse(text);
  const first = byteOffset + 8 + length;
  return mapped(header, ({ dtype, shape, data_offsets: [start, end] }) => {
    const [type, Values] = TYPES[dtype];
    return new Tensor(type, new Values(buffer.slice(first + start, first + end)), shape);
  });
}

/** BATCH rows of a tensor, from one row on; fewer at the end. */
function rows({ type, data, dims: [count, ...sizes] }, start) {
  const end = Math.min(start + BATCH, count);
  const size = sizes.reduce((a, b) => a * b, 1);
  return new Tensor(type, data.slice(start * size, end * size), [end - start, ...sizes]);
}

const manifest = JSON.parse(readFileSync(`${folder}/step/manifest.json`));
const load = (file) => InferenceSession.create(readFileSync(`${folder}/step/${file}`));
const state = readTensors("step/state");
if (manifest.frozen.length) Object.assign(state, readTensors("step/frozen"));
const reads = (file) => picked(state, manifest.graphs[file].reads);
const numbers = {}; // the learning rate among them: set one anew, and the next step takes it
for (const { name, dtype, value } of manifest.numbers) {
  numbers[name] = new Tensor(dtype, [value], []);
}

const [train, test, losses] = [readTensors("train"), readTensors("test"), []];
const step = await load("train_step.onnx");
for (let start = 0; start < Object.values(train)[0].dims[0]; start += BATCH) {
  const batch = mapped(train, (tensor) => rows(tensor, start));
  const given = reads("train_step.onnx");
  // A step takes and returns large tensors in pieces: the same numbers in another shape.
  for (const { name, pieces } of manifest.state) {
    if (pieces.length) given[name] = given[name].reshape(pieces);
  }
  const results = await step.run({ ...batch, ...numbers, ...given });
  for (const { name, output, shape } of manifest.state) {
    state[name] = results[output].reshape(shape);
  }
  losses.push(results.loss.data[0]);
}
writeFileSync(`${folder}/losses-${runtime}.json`, JSON.stringify(losses));

const evaluate = await load("evaluate.onnx");
const { loss, accuracy } = await evaluate.run({ ...test, ...reads("evaluate.onnx") });
const [reached, right] = [loss, accuracy].map(({ data }) => data[0].toFixed(3));
console.log(`${runtime}: loss ${reached}, accuracy ${right}`);
