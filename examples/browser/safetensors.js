// Reads a safetensors file: eight bytes of length, a JSON header, then the numbers.

const KINDS = {
  F32: ["float32", Float32Array],
  U8: ["uint8", Uint8Array],
  I64: ["int64", BigInt64Array],
};

/** Tensors by name, each {type, dims, data}, from an ArrayBuffer. */
export function readTensors(buffer) {
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  const tensors = new Map();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (!(entry.dtype in KINDS)) throw new Error(`${name} holds ${entry.dtype}, which this page does not read`);
    const [type, Numbers] = KINDS[entry.dtype];
    const [from, to] = entry.data_offsets;
    const data = new Numbers(buffer.slice(start + from, start + to)); // a copy starts at an aligned address
    tensors.set(name, { type, dims: entry.shape, data });
  }
  return tensors;
}
