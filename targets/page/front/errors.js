// Error neurons and the connections between them, as an overlay.

const ERROR_STYLE = {
  loss: { dashes: "", name: "gradient of the loss" },
  vjp: { dashes: "6 3", name: "vector-Jacobian product" },
  feedback: { dashes: "", name: "feedback map E (skip-error)" },
};
const depthColour = (depth) => css(`error-${Math.min(depth, 3)}`);

/** The connections to draw between visible nodes, those of the selection first: all, none, or the selection's. */
function overlayConnections() {
  if (state.overlay === "none") return [];
  const all = joined(content.connections, ({ kind, depth }) => `${kind} ${depth}`);
  const chosen = selectedNode();
  const own = new Set(chosen ? [shownAs(chosen.id)] : []);
  const touches = ({ from, to }) => own.has(from) || own.has(to);
  return state.overlay === "selection" ? all.filter(touches) : [...all.filter(touches), ...all.filter((c) => !touches(c))];
}

/** Visible nodes that hold an error neuron; the output holds the loss's gradient. */
function hasNeuron(node) {
  return node.kind === "output" ? content.connections.some((c) => c.from === node.id) : subgraphsIn(node).some((s) => s.neuron);
}

function connectionElements(router, room) {
  const found = overlayConnections();
  const elements = [], drawn = new Set();
  let left = 0;
  const add = (id) => {
    if (drawn.has(id)) return;
    drawn.add(id);
    const { x, y, w, h: tall } = router.boxes.get(id);
    elements.push({ group: "nodes", data: { id: `n ${id}`, of: id }, classes: "neuron", position: { x: x + w / 2, y: y + tall } });
  };
  for (const { id, from, to, sort, items } of found) {
    const missing = [from, to].filter((end) => !drawn.has(end)).length;
    if (elements.length + missing + 1 > room) {
      left += 1;
      continue;
    }
    add(from);
    add(to);
    const [kind, depth] = sort.split(" ");
    elements.push({
      group: "edges", classes: `error ${kind}`,
      data: { id: `x ${id}`, source: `n ${from}`, target: `n ${to}`, colour: depthColour(Number(depth)), from, to, items,
        ...path(router.error(from, to, Number(depth)), router.boxes.get(from), router.boxes.get(to), true) },
    });
  }
  if (state.overlay === "all") {
    for (const node of visibleNodes()) {
      const drawnInside = node.kind === "group" && isOpen(node.id);
      if (!drawnInside && hasNeuron(node) && elements.length < room) add(node.id);
    }
  }
  return { elements, left };
}
