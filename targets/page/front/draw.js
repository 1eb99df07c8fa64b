// From the state to Cytoscape's elements and styles.

let cy = null;
let drawn = { boxes: new Map(), router: null };

/** A path's points as Cytoscape wants them: ends relative to the nodes' middles, bends relative to the line between. */
function path(points, from, to, neurons = false) {
  const middle = (box) => [box.x + box.w / 2, neurons ? box.y + box.h : box.y + box.h / 2];
  const start = points[0], end = points[points.length - 1];
  const along = [end[0] - start[0], end[1] - start[1]], square = along[0] ** 2 + along[1] ** 2 || 1;
  const relative = ([x, y], box) => {
    const [cx, cy] = middle(box);
    return `${(x - cx).toFixed(1)}px ${(y - cy).toFixed(1)}px`;
  };
  const inner = points.slice(1, -1).map(([x, y]) => [x - start[0], y - start[1]]);
  return {
    starts: relative(start, from), ends: relative(end, to), bent: inner.length > 0,
    weights: inner.map(([x, y]) => ((x * along[0] + y * along[1]) / square).toFixed(5)).join(" ") || "0.5",
    distances: inner.map(([x, y]) => ((y * along[0] - x * along[1]) / Math.sqrt(square)).toFixed(2)).join(" ") || "0",
  };
}

/** Everything that is to be seen, at most LIMIT elements; what had to be left out is told in `left`. */
function elements() {
  const boxes = places(), router = new Router(boxes), colours = colouring();
  const shown = visibleNodes(), found = shown.map((node) => nodeElement(node, boxes.get(node.id), colours));
  for (const node of shown.filter(({ id, kind }) => kind === "subgraph" && isOpen(id))) {
    const inside = insideOf(node);
    for (const { id } of inside.boxes) found.push(operationElement(id, boxes.get(id)));
    for (const edge of inside.edges) {
      found.push(edgeElement(`${edge.from} ${edge.to}`, edge.from, edge.to, router.inner(edge.from, edge.to), boxes, "data inner"));
    }
  }
  const own = selectedNode() && shownAs(selectedNode().id);
  const touches = (edge) => edge.from === own || edge.to === own;
  const length = ({ from, to }) => Math.abs(boxes.get(from).x - boxes.get(to).x) + Math.abs(boxes.get(from).y - boxes.get(to).y);
  const all = visibleEdges().map((edge) => ({ ...edge, order: touches(edge) ? -1 : length(edge) })).sort((a, b) => a.order - b.order);
  const edges = all.slice(0, Math.max(0, LIMIT - found.length));
  for (const edge of edges) {
    found.push(edgeElement(edge.id, edge.from, edge.to, router.value(edge.from, edge.to), boxes, "data", edge.items));
  }
  const overlay = connectionElements(router, LIMIT - found.length);
  return { boxes, router, elements: [...found, ...overlay.elements], left: { edges: all.length - edges.length, errors: overlay.left } };
}

function nodeElement(node, { x, y, w, h: tall }, colours) {
  const wide = node.kind === "group" && isOpen(node.id), opened = node.kind === "subgraph" && isOpen(node.id);
  const level = groupsAround(node.id).length;
  return {
    group: "nodes", data: { id: node.id, w, h: tall, fill: colours.fill(node.id), level: wide ? level : opened ? 32 : 45 },
    position: { x: x + w / 2, y: y + tall / 2 },
    classes: wide ? "group wide" : opened ? "subgraph wide" : node.kind,
  };
}

function operationElement(id, { x, y, w, h: tall, index }) {
  const operation = content.operations[index];
  const role = (operation.states || []).length ? "parametric" : operation.pointwise ? "pointwise" : "";
  return { group: "nodes", data: { id, w, h: tall, level: 46 }, position: { x: x + w / 2, y: y + tall / 2 }, classes: `operation ${role}` };
}

function edgeElement(id, from, to, points, boxes, classes, items = []) {
  return { group: "edges", classes, data: { id, source: from, target: to, from, to, items, ...path(points, boxes.get(from), boxes.get(to)) } };
}

function styles() {
  const line = {
    "edge-distances": "endpoints", "source-endpoint": "data(starts)", "target-endpoint": "data(ends)", "curve-style": "straight",
    "target-arrow-shape": "triangle", "arrow-scale": .8, "z-index-compare": "manual",
  };
  return [
    { selector: "node", style: {
      shape: "round-rectangle", "corner-radius": 8, width: "data(w)", height: "data(h)", "z-index-compare": "manual",
      "z-index": "data(level)", "border-width": 1, "border-color": css("strong-line"), "background-color": css("card"),
      "overlay-opacity": 0,
    } },
    { selector: "node.subgraph, node.group", style: { "background-color": "data(fill)" } },
    { selector: "node.group", style: { "border-style": "double", "border-width": 4 } },
    { selector: "node.wide", style: { "background-color": css("group"), "border-width": 1, "border-style": "solid", "border-color": css("group-line") } },
    { selector: "node.subgraph.wide", style: { "background-color": css("surface"), "border-color": css("accent"), "border-width": 1.5 } },
    { selector: "node.input, node.output", style: { "corner-radius": 22, "background-color": css("raised") } },
    { selector: "node.operation", style: { "corner-radius": 5, "background-color": css("raised"), "border-color": css("line") } },
    { selector: "node.operation.parametric", style: { "background-color": css("accent-soft"), "border-color": css("accent") } },
    { selector: "node.operation.pointwise", style: { "corner-radius": 13 } },
    { selector: "node.neuron", style: {
      shape: "diamond", width: 13, height: 13, "z-index": 70, "background-color": css("surface"), "border-width": 2,
      "border-color": css("error-1"), events: "no",
    } },
    { selector: "edge", style: { ...line, width: 1.5, "line-color": css("edge"), "target-arrow-color": css("edge"), "z-index": 30 } },
    { selector: "edge[?bent]", style: {
      "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(distances)", "segment-radii": 7,
    } },
    { selector: "edge.inner", style: { width: 1.2, "z-index": 40, "arrow-scale": .6 } },
    { selector: "edge.error", style: {
      "line-color": "data(colour)", "target-arrow-color": "data(colour)", width: 1.7, "arrow-scale": .7, "z-index": 43, events: "no",
    } },
    { selector: "edge.vjp", style: { "line-style": "dashed" } },
    { selector: "edge.faded", style: { opacity: .4 } },
    { selector: "edge.data.lit", style: { width: 2.6, "line-color": css("accent"), "target-arrow-color": css("accent"), "z-index": 42 } },
    { selector: "edge.error.lit", style: { width: 2.6, "z-index": 44 } },
  ];
}

/** Draw the state anew. */
function redraw() {
  const view = elements();
  drawn = view;
  cy.batch(() => {
    cy.elements().remove();
    cy.add(view.elements);
  });
  byId("graph").dataset.elements = cy.elements().length;
  lightUp();
  drawLabels(view.boxes);
  drawLegend();
  const notes = [state.note];
  if (view.left.edges) notes.push(`${count(view.left.edges, "edge")} not drawn (limit ${LIMIT}): select a subgraph to see its own.`);
  if (view.left.errors) notes.push(`${count(view.left.errors, "error connection")} not drawn (limit ${LIMIT}).`);
  const hidden = visibleNodes().filter((node) => node.kind === "group" && !isOpen(node.id)).length;
  if (hidden && !notes[0]) notes.push(`${count(hidden, "group is", "groups are")} closed; click one to open it.`);
  const note = byId("note");
  note.textContent = notes.filter(Boolean).join(" ");
  note.hidden = !note.textContent;
}

/** Lines of the selection stand out. */
function lightUp() {
  const chosen = state.selected && (cy.getElementById(state.selected).nonempty() ? state.selected : selectedNode() && shownAs(selectedNode().id));
  cy.edges().forEach((edge) => {
    const own = chosen && (edge.data("from") === chosen || edge.data("to") === chosen);
    edge.toggleClass("lit", Boolean(own)).toggleClass("faded", Boolean(chosen) && !own);
  });
}

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Show everything, but no larger than life. */
function fit() {
  const whole = drawn.boxes.get(""), stage = byId("stage").getBoundingClientRect();
  const top = byId("note").hidden ? 0 : 34, free = stage.height - top - 66;
  const zoom = Math.min((stage.width - 56) / whole.w, free / whole.h, 1.5);
  cy.viewport({ zoom, pan: { x: (stage.width - whole.w * zoom) / 2, y: top + Math.max(0, (free - whole.h * zoom) / 2) } });
}

/** Bring a node into view, and as a whole where that fits. */
function bringIntoView(id) {
  const box = drawn.boxes.get(id);
  if (!box) return;
  const stage = byId("stage").getBoundingClientRect(), pad = 40;
  let zoom = Math.max(cy.zoom(), .55);
  zoom = Math.min(zoom, Math.max(.2, Math.min((stage.width - 2 * pad) / box.w, (stage.height - 100) / box.h)));
  const pan = cy.pan();
  const clamp = (value, low, high) => (low > high ? (low + high) / 2 : Math.min(Math.max(value, low), high));
  const kept = { x: stage.width / 2 - (stage.width / 2 - pan.x) / cy.zoom() * zoom, y: stage.height / 2 - (stage.height / 2 - pan.y) / cy.zoom() * zoom };
  const target = {
    x: clamp(kept.x, pad - box.x * zoom, stage.width - pad - (box.x + box.w) * zoom),
    y: clamp(kept.y, pad - box.y * zoom, stage.height - 64 - (box.y + box.h) * zoom),
  };
  if (calm()) cy.viewport({ zoom, pan: target });
  else cy.animate({ zoom, pan: target }, { duration: 180 });
}
