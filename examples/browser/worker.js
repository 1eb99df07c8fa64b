// Trains, evaluates and classifies in ONNX Runtime, beside the page's own thread. One job at a time, in order.
//
//   page -> worker   {do: "start", rate, batch}  {do: "pause"}  {do: "reset"}  {do: "classify", pixels}  {do: "sample"}
//   worker -> page   {ready}  {progress}  {answer}  {sample}  {failure}

import * as ort from "./vendor/ort.wasm.min.mjs";
import { readTensors } from "./safetensors.js";

ort.env.wasm.numThreads = 1; // threads would need a cross-origin isolated page
ort.env.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;

const NEXT = ".next"; // behind a state's name: the step's output with its new value
const OWN = "original."; // before the name of a state that is a weight of the model
const SLICE = 30; // ms of training between two looks at the messages
const REPORT = 150; // ms between two reports

let site, data, step, model; // what was loaded: the description, the images, the two sessions
let first, states; // tensors by name: to start from, and now
let order, next, random; // the epoch: shuffled indices, place in them, state of the random numbers
let rate, batch, running, steps, seen, time, losses, reported;

// Images.

function floats(images, from, count) {
  const size = site.side ** 2;
  return Float32Array.from(images.data.subarray(from * size, (from + count) * size), (shade) => shade / site.shades);
}

function draw(count) {
  const size = site.side ** 2;
  const x = new Float32Array(count * size);
  const y = new BigInt64Array(count);
  for (let row = 0; row < count; row++) {
    if (next === order.length) shuffle();
    const chosen = order[next++];
    for (let i = 0; i < size; i++) x[row * size + i] = data.get("train_x").data[chosen * size + i] / site.shades;
    y[row] = BigInt(data.get("train_y").data[chosen]);
  }
  return { x: new ort.Tensor("float32", x, [count, size]), y: new ort.Tensor("int64", y, [count]) };
}

function shuffle() {
  for (let i = order.length - 1; i > 0; i--) {
    random = (Math.imul(random, 1664525) + 1013904223) >>> 0; // so that a reset repeats the run
    const j = Math.floor((random / 2 ** 32) * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  next = 0;
}

// Training and evaluation.

function reset() {
  states = new Map(first);
  order = Uint32Array.from(data.get("train_y").data.keys());
  random = 0;
  shuffle();
  running = false;
  steps = seen = time = 0;
  losses = [];
  reported = -Infinity;
}

async function trainStep() {
  const { x, y } = draw(batch);
  const lr = new ort.Tensor("float32", [rate], []);
  const results = await step.run({ ...Object.fromEntries(states), x, y, lr });
  for (const [name, value] of Object.entries(results)) {
    if (name.endsWith(NEXT)) states.set(name.slice(0, -NEXT.length), value);
  }
  const loss = results.loss.data[0];
  losses.push(loss);
  steps += 1;
  seen += batch;
  if (!Number.isFinite(loss)) {
    running = false;
    throw new Error("The loss is no longer a number: reset, and take a lower learning rate.");
  }
}

/** The logits of images, row after row. */
async function evaluate(pixels) {
  const [input] = model.inputNames;
  const given = { [input]: new ort.Tensor("float32", pixels, [pixels.length / site.side ** 2, site.side ** 2]) };
  for (const name of model.inputNames.slice(1)) given[name] = states.get(OWN + name);
  return (await model.run(given))[model.outputNames[0]].data;
}

async function accuracy() {
  const labels = data.get("test_y").data;
  const logits = await evaluate(floats(data.get("test_x"), 0, labels.length));
  const width = site.classes.length;
  const right = labels.filter((label, row) => {
    const scores = logits.subarray(row * width, (row + 1) * width);
    return scores.indexOf(Math.max(...scores)) === label;
  });
  return right.length / labels.length;
}

async function report() {
  const loss = losses.length ? losses.reduce((a, b) => a + b) / losses.length : null;
  const epochs = seen / order.length;
  losses = [];
  postMessage({ progress: { steps, epochs, loss, accuracy: await accuracy(), perSecond: steps / (time / 1000), running } });
  reported = performance.now();
}

async function train() {
  if (!running) return;
  const start = performance.now();
  do await trainStep();
  while (running && steps > 1 && performance.now() - start < SLICE); // the first step's loss is reported by itself
  time += performance.now() - start;
  if (steps === 1 || performance.now() - reported > REPORT) await report();
  setTimeout(() => queue(train));
}

async function classify(pixels) {
  const logits = Array.from(await evaluate(Float32Array.from(pixels)));
  const highest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - highest));
  const sum = powers.reduce((a, b) => a + b);
  postMessage({ answer: powers.map((power) => power / sum) });
}

// Messages.

const jobs = {
  start: async (message) => {
    ({ rate, batch } = message);
    if (!running) setTimeout(() => queue(train));
    running = true;
  },
  pause: async () => {
    if (!running) return;
    running = false;
    await report();
  },
  reset: async () => {
    reset();
    await report();
  },
  classify: ({ pixels }) => classify(pixels),
  sample: async () => {
    const chosen = Math.floor(Math.random() * data.get("test_y").data.length);
    postMessage({ sample: { pixels: floats(data.get("test_x"), chosen, 1), label: data.get("test_y").data[chosen] } });
  },
};

let last = load();

function queue(job) {
  last = last.then(job).catch((error) => postMessage({ failure: String(error?.message ?? error) }));
}

async function load() {
  const read = async (name, as) => {
    const response = await fetch(new URL(name, import.meta.url));
    if (!response.ok) throw new Error(`${name} is missing (${response.status})`);
    return response[as]();
  };
  site = await read("site.json", "json");
  data = readTensors(await read("data.safetensors", "arrayBuffer"));
  const tensors = readTensors(await read("step.safetensors", "arrayBuffer"));
  first = new Map([...tensors].map(([name, { type, dims, data }]) => [name, new ort.Tensor(type, data, dims)]));
  step = await ort.InferenceSession.create(await read("step.onnx", "arrayBuffer"));
  model = await ort.InferenceSession.create(await read("model.onnx", "arrayBuffer"));
  const count = (name) => data.get(name).data.length;
  postMessage({ ready: { ...site, train: count("train_y"), test: count("test_y") } });
  reset();
  await report();
}

queue(() => {}); // reports what went wrong while loading
onmessage = ({ data: message }) => queue(() => jobs[message.do](message));
