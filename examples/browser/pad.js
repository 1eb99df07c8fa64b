// A pad to draw on. Strokes are kept as lines, so that they can be fitted to the size of the images of the data set
// and drawn with the width that its strokes have.

const FINE = 8; // pixels of the fine drawing for one of the image, in each direction
const KEY = 1 / 20; // how far an arrow key moves the pen, of the pad's side
const SMALLEST = 0.15; // of the pad's side: what is smaller is not enlarged to the whole image
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function trace(pen, strokes, place) {
  for (const stroke of strokes) {
    pen.beginPath();
    pen.moveTo(...place(stroke[0]));
    for (const point of stroke) pen.lineTo(...place(point)); // a line to the first point makes a dot
    pen.stroke();
  }
}

/** Draw with round ends: strokes of points in [0, 1]^2, place(point) on the canvas. */
function ink(canvas, strokes, width, colour, place) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  Object.assign(pen, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: colour });
  trace(pen, strokes, place);
  return pen;
}

/** The strokes as an image of side x side values in [0, 1], in `shades` steps, fitted to the side less the margins. */
export function rasterise(strokes, { side, margin, stroke, shades }) {
  const canvas = new OffscreenCanvas(side * FINE, side * FINE);
  const points = strokes.flat();
  const low = [0, 1].map((axis) => Math.min(...points.map((point) => point[axis])));
  const high = [0, 1].map((axis) => Math.max(...points.map((point) => point[axis])));
  const extent = Math.max(high[0] - low[0], high[1] - low[1], SMALLEST);
  const scale = (side - 2 * margin - stroke) / extent;
  const place = (point) => point.map((v, axis) => FINE * (side / 2 + scale * (v - (low[axis] + high[axis]) / 2)));
  const { data } = ink(canvas, strokes, stroke * FINE, "#000", place).getImageData(0, 0, side * FINE, side * FINE);
  const image = new Float32Array(side * side);
  for (let i = 0; i < (side * FINE) ** 2; i++) {
    const row = Math.floor(i / (side * FINE) / FINE);
    const column = Math.floor((i % (side * FINE)) / FINE);
    image[row * side + column] += data[4 * i + 3] / 255 / FINE ** 2;
  }
  return image.map((value) => Math.round(value * shades) / shades);
}

export class Pad {
  /** canvas: square. changed(strokes): called after each change; without strokes the pad is empty. */
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, strokes: [], pen: null, down: false });
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.down = false));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#lift());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.draw();
  }

  clear() {
    this.strokes = [];
    this.down = false;
    this.draw();
    this.changed(this.strokes);
  }

  draw() {
    const { canvas } = this;
    const style = getComputedStyle(canvas);
    const place = ([x, y]) => [x * canvas.width, y * canvas.height];
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    ink(canvas, this.strokes, canvas.width / 14, style.getPropertyValue("--text"), place);
    if (this.pen) {
      const pen = canvas.getContext("2d");
      pen.beginPath();
      pen.arc(...place(this.pen), canvas.width / 24, 0, 2 * Math.PI);
      pen.lineWidth = 3;
      pen.strokeStyle = style.getPropertyValue(this.down ? "--warm" : "--accent");
      pen.stroke();
    }
  }

  #press(event) {
    if (event.button !== 0) return;
    this.pen = null;
    this.down = true;
    this.canvas.setPointerCapture(event.pointerId);
    this.strokes.push([]);
    this.#to(this.#point(event));
  }

  #drag(event) {
    if (!this.down || this.pen) return;
    for (const part of event.getCoalescedEvents?.() ?? []) this.strokes.at(-1).push(this.#point(part));
    this.#to(this.#point(event));
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value) => Math.min(1, Math.max(0, value));
    return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
  }

  #to(point) {
    this.strokes.at(-1).push(point);
    this.draw();
    this.changed(this.strokes);
  }

  #key(event) {
    const arrow = ARROWS[event.key];
    if (arrow) {
      const from = this.pen ?? [0.5, 0.2];
      this.pen = this.pen ? from.map((v, axis) => Math.min(1, Math.max(0, v + KEY * arrow[axis]))) : from;
      if (this.down) this.#to(this.pen);
    } else if (event.key === " ") {
      this.pen ??= [0.5, 0.2];
      this.down = !this.down;
      if (this.down) {
        this.strokes.push([]);
        this.#to(this.pen);
      }
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
    this.draw();
  }

  #lift() {
    this.pen = null;
    this.down = false;
    this.draw();
  }
}
