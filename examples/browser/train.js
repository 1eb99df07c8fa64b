// The page: its controls, curves and drawing pad. The training itself runs in worker.js.

import { Curve } from "./curve.js";
import { Pad, rasterise } from "./pad.js";

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const send = (message) => worker.postMessage(message);
const curves = {
  loss: new Curve($("loss-curve"), { colour: "--warm", label: (value) => value.toFixed(1) }),
  accuracy: new Curve($("accuracy-curve"), { colour: "--accent", top: 1, label: (share) => `${Math.round(100 * share)} %` }),
};
const pad = new Pad($("pad"), drawn);
let site = null; // what site.json says
let pixels = null; // the image that the answer is about
let running = false;
let started = null; // the loss of the first step
let best = 0;

// What the worker says.

const heard = {
  ready(about) {
    site = about;
    const layers = about.layers.join("–");
    $("about").textContent =
      `A ${layers} network with ${number(about.parameters)} parameters learns ${about.data} by ${about.rule}, without ` +
      `a backward pass: ${about.operators} ONNX operators a step, ${about.optimizer}, ` +
      `${number(about.train)} images to train on and ${number(about.test)} to test.`;
    if (about.data === "fashion-mnist") $("try").textContent = "Draw a garment";
    $("seen-size").textContent = `${about.side} × ${about.side} pixels`;
    $("rate").value = Math.log10(about.rate);
    $("batch").value = about.batch;
    for (const control of document.querySelectorAll("[disabled]")) control.disabled = false;
    for (const name of about.classes) $("bars").append(bar(name));
    showRate();
    showSeen();
  },

  progress({ steps, epochs, loss, accuracy, perSecond, running: still }) {
    setRunning(still);
    if (steps === 0) clearCurves();
    best = Math.max(best, accuracy);
    if (loss !== null) {
      started ??= loss;
      $("loss").textContent = loss.toFixed(3);
      $("loss-first").textContent = `${started.toFixed(3)} at the first step`;
      curves.loss.add(steps, loss);
    }
    curves.accuracy.add(steps, accuracy);
    $("accuracy").textContent = percent(accuracy);
    $("accuracy-best").textContent = `best ${percent(best)}`;
    $("steps").textContent = number(steps);
    $("epochs").textContent = `${epochs.toFixed(1)} epochs`;
    $("speed").textContent = steps ? number(Math.round(perSecond)) : "–";
    if (pixels) send({ do: "classify", pixels });
  },

  answer(shares) {
    if (!pixels) return; // cleared meanwhile
    const top = shares.indexOf(Math.max(...shares));
    for (const [i, item] of [...$("bars").children].entries()) {
      item.classList.toggle("top", i === top);
      item.querySelector("progress").value = shares[i];
      item.querySelector("output").textContent = percent(shares[i]);
    }
    say("answer", `It looks like: ${site.classes[top]}`);
  },

  sample({ pixels: image, label }) {
    pad.clear();
    pixels = image;
    $("truth").textContent = `(a test image, labelled ${site.classes[label]})`;
    showSeen();
    send({ do: "classify", pixels });
  },

  failure(text) {
    setRunning(false);
    say("message", text);
  },
};

worker.onmessage = ({ data }) => {
  for (const [name, value] of Object.entries(data)) heard[name](value);
};
worker.onerror = (event) => heard.failure(`The training can't run here: ${event.message ?? "the worker did not load"}`);

// Only what is new, so that a screen reader does not repeat itself.
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function setRunning(now) {
  running = now;
  $("run").textContent = now ? "Pause" : "Start";
}

function clearCurves() {
  started = null;
  best = 0;
  for (const curve of Object.values(curves)) curve.clear();
  $("loss").textContent = "–";
  $("loss-first").textContent = "";
  say("message", "");
}

function bar(name) {
  const item = document.createElement("li");
  const label = document.createElement("span");
  const share = document.createElement("progress");
  share.value = 0;
  label.textContent = name;
  share.setAttribute("aria-label", name);
  item.append(label, share, document.createElement("output"));
  return item;
}

// Controls.

const rate = () => 10 ** Number($("rate").value);
const start = () => send({ do: "start", rate: rate(), batch: Number($("batch").value) });

function showRate() {
  $("rate-value").textContent = rate().toPrecision(2);
  $("rate").setAttribute("aria-valuetext", $("rate-value").textContent);
}

$("run").addEventListener("click", () => {
  if (running) {
    send({ do: "pause" });
  } else {
    say("message", "");
    start();
  }
});
$("reset").addEventListener("click", () => send({ do: "reset" }));
$("rate").addEventListener("input", showRate);
for (const id of ["rate", "batch"]) $(id).addEventListener("change", () => running && start());
$("clear").addEventListener("click", () => pad.clear());
$("sample").addEventListener("click", () => send({ do: "sample" }));

// Drawing.

function drawn(strokes) {
  if (!site) return;
  $("truth").textContent = "";
  pixels = strokes.length ? rasterise(strokes, site) : null;
  showSeen();
  if (pixels) {
    send({ do: "classify", pixels });
    return;
  }
  say("answer", "Nothing is drawn yet.");
  for (const item of $("bars").children) {
    item.classList.remove("top");
    item.querySelector("progress").value = 0;
    item.querySelector("output").textContent = "";
  }
}

/** The image as the model sees it: light ink on a dark ground, as in the data. */
function showSeen() {
  const canvas = $("seen");
  canvas.width = canvas.height = site.side;
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(site.side, site.side);
  for (let i = 0; i < site.side ** 2; i++) image.data.set([...Array(3).fill(255 * (pixels?.[i] ?? 0)), 255], 4 * i);
  pen.putImageData(image, 0, 0);
}
