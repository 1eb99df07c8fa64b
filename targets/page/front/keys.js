// The keyboard: along the edges, open and close, search.

/** What comes after (`right`) or before (`left`) a visible node or operation; nearest first. */
function neighbours(id, side) {
  const lines = cy.edges(".data").filter((edge) => edge.data(side === "right" ? "from" : "to") === id);
  const box = drawn.boxes.get(id), middle = (b) => b.y + b.h / 2;
  return [...new Set(lines.map((edge) => edge.data(side === "right" ? "to" : "from")))]
    .sort((a, b) => far(box, drawn.boxes.get(a)) - far(box, drawn.boxes.get(b)) || middle(drawn.boxes.get(a)) - middle(drawn.boxes.get(b)));
}

const far = (a, b) => Math.hypot(a.x + a.w / 2 - b.x - b.w / 2, a.y + a.h / 2 - b.y - b.h / 2);

/** The nearest box above or below. */
function beside(id, side) {
  const box = drawn.boxes.get(id), sign = side === "down" ? 1 : -1;
  const inside = box.index !== undefined;
  const candidates = [...drawn.boxes].filter(([other, at]) => other && other !== id && (at.index !== undefined) === inside
    && (!inside || at.parent === box.parent) && !(nodes.get(other)?.kind === "group" && isOpen(other))
    && sign * (at.y + at.h / 2 - box.y - box.h / 2) > 8);
  const cost = ([, at]) => Math.abs(at.y - box.y) + 2 * Math.abs(at.x + at.w / 2 - box.x - box.w / 2);
  return candidates.sort((a, b) => cost(a) - cost(b)).map(([other]) => other);
}

/** What an arrow key leads to: edges first, so that in an opened subgraph operations are walked too. */
function arrow(key) {
  const start = state.selected && drawn.boxes.has(state.selected) ? state.selected : null;
  if (!start) return content.nodes.find((node) => drawn.boxes.has(node.id))?.id;
  const operation = drawn.boxes.get(start).index !== undefined;
  const forward = operation ? "ArrowDown" : "ArrowRight", back = operation ? "ArrowUp" : "ArrowLeft";
  if (key === forward) return neighbours(start, "right")[0];
  if (key === back) return neighbours(start, "left")[0] || (operation ? drawn.boxes.get(start).parent : null);
  if (operation) return sideways(start, key === "ArrowRight" ? 1 : -1);
  const opened = nodes.get(start)?.kind === "subgraph" && isOpen(start);
  if (opened && key === "ArrowDown") return insideOf(nodes.get(start)).boxes[0]?.id;
  return beside(start, key === "ArrowDown" ? "down" : "up")[0];
}

function sideways(id, sign) {
  const box = drawn.boxes.get(id);
  const same = [...drawn.boxes].filter(([other, at]) => other !== id && at.parent === box.parent && at.index !== undefined && sign * (at.x - box.x) > 4);
  return same.sort(([, a], [, b]) => far(a, box) - far(b, box))[0]?.[0];
}

function graphKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) {
    const next = arrow(event.key);
    if (next) pick(next);
    markSelected(true);
  } else if (event.key === "Enter" || event.key === " ") {
    if (state.selected && nodes.has(state.selected)) toggle(state.selected, event.shiftKey);
  } else return;
  event.preventDefault();
}

function escape() {
  const node = selectedNode();
  if (!node) return;
  const close = [node.id, ...groupsAround(node.id)].find((id) => isOpen(id) && (id === node.id || !nodes.get(id).open));
  if (close) {
    state.open.delete(close);
    state.selected = close;
    state.note = "";
    changed();
    bringIntoView(close);
  } else select(null);
}

const KEYS = {
  "/": () => byId("search").focus(),
  Escape: escape,
  e: () => setOverlay({ none: "selection", selection: "all", all: "none" }[state.overlay]),
  c: () => {
    const options = [...byId("colour").options].map((option) => option.value);
    setColour(options[(options.indexOf(state.colour) + 1) % options.length]);
  },
  s: () => toggleSchedule(),
  "+": () => zoomBy(1.25),
  "-": () => zoomBy(.8),
  0: () => fit(),
  "?": () => byId("help").showModal(),
};

function pageKey(event) {
  const typing = event.target instanceof HTMLInputElement && event.target.type === "search" || event.target instanceof HTMLSelectElement;
  if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
}

function zoomBy(factor) {
  const stage = byId("stage").getBoundingClientRect();
  cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: stage.width / 2, y: stage.height / 2 } });
}

function listenKeys() {
  byId("labels").addEventListener("keydown", graphKey);
  document.addEventListener("keydown", pageKey);
}
