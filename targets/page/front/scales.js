// Colours of the subgraphs by cost, depth, angle or loss, and the legend. Sequential scales go by lightness in one hue,
// the angle from blue (descends) to orange (ascends): both are read by every kind of sight. A closed group has the
// colour of its subgraphs' mean, so that it can be compared with them.

const RAMPS = {
  light: { more: ["#f3f7fc", "#c9def3", "#86b6e0", "#3d83c4", "#0f4a8a"], turn: ["#1b62b0", "#8db9e4", "#f4f4f2", "#f3b27a", "#b84a00"] },
  dark: { more: ["#202a36", "#25456b", "#2f69a8", "#5b9be0", "#b5d6ff"], turn: ["#5fa4f2", "#2c5586", "#2b3138", "#8a4f22", "#ff9d57"] },
};
const DEPTHS = { light: ["#e3e7ec", "#fbd5b5", "#e3c6ee", "#bfe6d8"], dark: ["#333d49", "#6e3c14", "#57306b", "#14553f"] };

const COLOURS = {
  cost: { name: "cost (FLOPs)", of: (list) => total(list, "flops") / list.length, ramp: "more", legend: "FLOPs of one forward pass" },
  parameters: { name: "parameters", of: (list) => total(list, "parameters") / list.length, ramp: "more", legend: "Parameters" },
  depth: { name: "recursion depth", of: (list) => Math.max(...list.map(depthOf)), legend: "Recursion depth of the error that arrives" },
  angle: { name: "alignment angle", of: (list) => mean(list, "angle"), ramp: "turn", legend: "Angle between update and gradient", needs: "angle" },
  loss: { name: "local loss", of: (list) => mean(list, "loss"), ramp: "more", legend: "Local loss", needs: "loss" },
  none: { name: "none", of: () => null, legend: "" },
};

function mean(list, key) {
  const known = list.map((item) => item[key]).filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

const incoming = new Map();
for (const connection of content.connections) {
  if (!incoming.has(connection.to)) incoming.set(connection.to, []);
  incoming.get(connection.to).push(connection);
}

/** The deepest connection that reaches a subgraph; -1 without an error neuron. */
function depthOf(subgraph) {
  return subgraph.neuron ? Math.max(0, ...(incoming.get(subgraph.id) || []).map((c) => c.depth)) : -1;
}

let theme = "light";
let themeColours = new Map();

/** A colour of the theme; looked up once, since the browser then has to compute the page's style. */
function css(name) {
  if (!themeColours.has(name)) themeColours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return themeColours.get(name);
}

/** Colour of a node now, and the range that the colours stand for. */
function colouring() {
  const scale = COLOURS[state.colour];
  const shown = visibleNodes().filter((node) => !(node.kind === "group" && isOpen(node.id)) && subgraphsIn(node).length);
  const values = new Map(shown.map((node) => [node.id, scale.of(subgraphsIn(node))]));
  const known = [...values.values()].filter((value) => value !== null);
  const range = state.colour === "angle" ? [0, 180] : [state.colour === "loss" ? Math.min(...known, Infinity) : 0, Math.max(...known, 0)];
  const fill = (id) => {
    const value = values.get(id);
    if (value === null || value === undefined) return css("card");
    if (state.colour === "depth") return value < 0 ? css("card") : DEPTHS[theme][Math.min(value, 3)];
    const share = range[1] > range[0] ? (value - range[0]) / (range[1] - range[0]) : 0;
    return mixed(RAMPS[theme][scale.ramp], share);
  };
  return { scale, range, fill, values };
}

function mixed(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  const mix = (k) => Math.round(part(stops[i], k) + (at - i) * (part(stops[i + 1], k) - part(stops[i], k)));
  return `#${[0, 1, 2].map((k) => mix(k).toString(16).padStart(2, "0")).join("")}`;
}

/** Whether white letters are read better on a colour than black ones (WCAG's contrast). */
function isDark(hex) {
  const light = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
    .map((c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4));
  return .2126 * light[0] + .7152 * light[1] + .0722 * light[2] < .18;
}
