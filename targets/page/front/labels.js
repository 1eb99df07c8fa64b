// The words on the drawing: one element for each visible node, laid over the canvas. They carry the keyboard's focus
// and what a screen reader says; the mouse goes through them to the drawing.

function drawLabels(boxes) {
  const layer = byId("labels"), focused = layer.contains(document.activeElement);
  const colours = colouring();
  const cards = [];
  for (const node of visibleNodes()) cards.push(labelOf(node, boxes.get(node.id), colours.fill(node.id)));
  for (const [id, box] of boxes) {
    if (box.index !== undefined) cards.push(operationLabel(id, box));
  }
  layer.replaceChildren(...cards);
  markSelected(focused);
  follow();
}

function card(id, box, classes, said, ...children) {
  const style = { left: `${box.x}px`, top: `${box.y}px`, width: `${box.w}px`, height: `${box.h}px` };
  return h("div", { class: `card ${classes}`, id: `label-${id}`, "data-id": id, role: "button", tabindex: "-1", "aria-label": said, title: null, style }, ...children);
}

function labelOf(node, box, fill) {
  const opened = isOpen(node.id) && (node.kind === "group" || node.kind === "subgraph");
  const tone = opened || node.kind === "input" || node.kind === "output" ? "" : isDark(fill) ? "on-dark" : "on-light";
  const element = card(node.id, box, `${node.kind} ${opened ? "open" : tone}`, saidOf(node), h("b", {}, dotted(node.label)), ...detailsOf(node, opened).map((text) => h("span", { class: "detail" }, text)));
  if (node.kind === "group" || node.kind === "subgraph") element.setAttribute("aria-expanded", String(isOpen(node.id)));
  return element;
}

/** The small lines below a name. */
function detailsOf(node, opened) {
  if (node.kind === "input" || node.kind === "output") return node.detail ? [node.detail] : [];
  const inside = subgraphsIn(node), parameters = total(inside, "parameters");
  const weight = parameters ? `${short(parameters)} params` : "no params";
  if (node.kind === "group") return opened ? [`${count(inside.length, "subgraph")} · ${weight}`] : [count(inside.length, "subgraph"), weight];
  if (opened) {
    const pages = pagesOf(node), page = state.pages.get(node.id) || 0;
    const part = pages > 1 ? ` · ${page * OPERATIONS_AT_ONCE + 1}–${page * OPERATIONS_AT_ONCE + operationsShown(node).length} shown` : "";
    return [`${count(node.operations.length, "operation")}${part} · ${weight}`];
  }
  const type = node.outputs.length ? node.outputs[0].type : "";
  return [node.summary, [type, parameters ? short(parameters) : ""].filter(Boolean).join(" · ")];
}

function operationLabel(id, box) {
  const operation = content.operations[box.index];
  return card(id, box, "operation", `operation ${operation.name}, ${operation.kind}, ${operation.type || ""}`, h("b", {}, operation.kind));
}

function saidOf(node) {
  if (node.kind === "input") return `model input ${node.name} ${node.detail}`;
  if (node.kind === "output") return `model output ${node.detail}`;
  if (node.kind === "group") return `group ${node.name}, ${count(subgraphsIn(node).length, "subgraph")}`;
  const reads = edgesOf(node.id, "to").length, read = edgesOf(node.id, "from").length;
  return `subgraph ${node.number} of ${subgraphs.length}, ${node.name}, ${count(node.operations.length, "operation")}, reads ${reads}, read by ${read}`;
}

const edgesBy = { from: new Map(), to: new Map() };
for (const side of ["from", "to"]) {
  for (const edge of content.edges) {
    if (!edgesBy[side].has(edge[side])) edgesBy[side].set(edge[side], []);
    edgesBy[side].get(edge[side]).push(edge);
  }
}
const edgesOf = (id, side) => edgesBy[side].get(id) || [];

/** Focus ring and tab stop on what is selected, else on the first node. */
function markSelected(focus) {
  const layer = byId("labels");
  for (const element of layer.children) {
    element.classList.remove("selected");
    element.tabIndex = -1;
  }
  const chosen = state.selected && (byId(`label-${state.selected}`) || byId(`label-${shownAs(selectedNode().id)}`));
  const stop = chosen || layer.firstElementChild;
  if (stop) stop.tabIndex = 0;
  if (chosen) chosen.classList.add("selected");
  if (stop && focus) stop.focus({ preventScroll: true });
}

/** Keep the words over the drawing as it moves. */
function follow() {
  const { x, y } = cy.pan(), zoom = cy.zoom(), layer = byId("labels");
  layer.style.transform = `translate(${x}px, ${y}px) scale(${zoom})`;
  layer.style.setProperty("--zoom", zoom.toFixed(3));
  layer.classList.toggle("far", zoom < .52);
  layer.classList.toggle("farther", zoom < .26);
}

function drawLegend() {
  const { scale, range } = colouring(), legend = byId("legend"), parts = [];
  const unit = state.colour === "angle" ? "°" : "";
  if (state.colour === "depth") {
    const depths = [...new Set(subgraphs.map(depthOf))].sort((a, b) => a - b);
    const swatch = (depth) => h("span", {}, h("i", { class: "swatch", style: { background: depth < 0 ? css("card") : DEPTHS[theme][Math.min(depth, 3)] } }), depth < 0 ? "no error neuron" : depth === 0 ? "exact" : depth >= 3 ? "3 and deeper" : String(depth));
    parts.push(h("div", {}, scale.legend, h("div", { class: "key" }, ...depths.filter((d) => d <= 3).map(swatch))));
  } else if (scale.ramp && Number.isFinite(range[0])) {
    const closed = visibleNodes().some((node) => node.kind === "group" && !isOpen(node.id));
    const ramp = h("span", { class: "ramp", style: { background: `linear-gradient(90deg, ${RAMPS[theme][scale.ramp].join(", ")})` } });
    const ticks = [range[0], (range[0] + range[1]) / 2, range[1]].map((value) => h("span", {}, `${short(value)}${unit}`));
    parts.push(h("div", {}, scale.legend, closed ? " (mean of a closed group)" : "", ramp, h("div", { class: "ticks" }, ...ticks)));
  }
  if (state.overlay !== "none") {
    const kinds = new Map(content.connections.map((c) => [`${c.kind} ${c.kind === "loss" ? 0 : c.depth}`, c]));
    const key = [...kinds.values()].sort((a, b) => a.depth - b.depth).slice(0, 5).map((c) => h("span", {}, stroke(depthColour(c.depth), ERROR_STYLE[c.kind].dashes, false), c.kind === "loss" ? "loss gradient" : c.kind === "vjp" ? "vjp" : `skip-error, depth ${c.depth}`));
    if (key.length) parts.push(h("div", { class: "key" }, h("span", {}, stroke(css("error-1"), "0 26", true), "error neuron"), ...key));
  }
  legend.replaceChildren(...parts);
  legend.hidden = !parts.length;
}
