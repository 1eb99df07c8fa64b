// One line over the steps, on a canvas as wide as its place.

const LIMIT = 2000; // points; with more, every other one goes
const LEFT = 44, RIGHT = 12, TOP = 8, BOTTOM = 22; // room for the labels, in CSS pixels

/** A whole step of 1, 2 or 5 times a power of ten, at most `count` of which fit into `range`. */
function tick(range, count) {
  const power = 10 ** Math.floor(Math.log10(range / count));
  return [1, 2, 5, 10].map((digit) => digit * power).find((step) => range / step <= count);
}

export class Curve {
  /** canvas: where to draw. colour: a custom property of the page. top: highest value, default that of the data. */
  constructor(canvas, { colour, top = null, label = String }) {
    Object.assign(this, { canvas, colour, top, label, points: [] });
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  add(step, value) {
    this.points.push([step, value]);
    if (this.points.length > LIMIT) this.points = this.points.filter((_, i) => i % 2 === 0 || i === LIMIT);
    this.draw();
  }

  clear() {
    this.points = [];
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    Object.assign(this.canvas, { width: width * devicePixelRatio, height: height * devicePixelRatio });
    const pen = this.canvas.getContext("2d");
    pen.scale(devicePixelRatio, devicePixelRatio);
    const steps = Math.max(100, this.points.at(-1)?.[0] ?? 0);
    const top = this.top ?? 1.05 * Math.max(1, ...this.points.map(([, value]) => value));
    const x = (step) => LEFT + (step / steps) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - (value / top) * (height - TOP - BOTTOM);
    this.#axes(pen, x, y, steps, top);
    this.#line(pen, x, y);
    const last = this.points.at(-1);
    const said = last ? `${this.label(last[1])} after ${last[0]} steps, ${this.label(this.points[0][1])} at first` : "no data yet";
    this.canvas.setAttribute("aria-label", `${this.canvas.parentElement.innerText.trim()}: ${said}`);
  }

  #colour(name) {
    return getComputedStyle(this.canvas).getPropertyValue(name);
  }

  #axes(pen, x, y, steps, top) {
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = this.#colour("--muted");
    pen.strokeStyle = this.#colour("--line");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const up = tick(top, 5);
    for (let i = 0; i * up <= top * 1.001; i++) {
      const level = Math.round(y(i * up)) + 0.5;
      pen.beginPath();
      pen.moveTo(x(0), level);
      pen.lineTo(x(steps), level);
      pen.stroke();
      pen.fillText(this.label(i * up), LEFT - 8, level);
    }
    pen.textAlign = "center";
    const along = tick(steps, 6);
    for (let i = 0; i * along <= steps; i++) {
      const place = Math.min(x(i * along), x(steps) - 8);
      pen.fillText((i * along).toLocaleString("en"), place, y(0) + 14);
    }
  }

  #line(pen, x, y) {
    pen.strokeStyle = pen.fillStyle = this.#colour(this.colour);
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.beginPath();
    for (const [step, value] of this.points) pen.lineTo(x(step), y(value));
    pen.stroke();
    if (!this.points.length) return;
    const [step, value] = this.points.at(-1);
    pen.beginPath();
    pen.arc(x(step), y(value), 3.5, 0, 2 * Math.PI);
    pen.fill();
  }
}
