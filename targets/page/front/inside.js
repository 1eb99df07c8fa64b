// The inside of an opened subgraph: its operations, laid out by dagre and folded into columns.

const OPERATION = { width: 116, height: 26, gap: 14, rank: 20, between: 40 };
const insideCache = new Map();

/** {width, height, boxes: [{id, index, x, y, w, h}], edges: [{from, to, column step}]}, relative to the subgraph. */
function insideOf(subgraph) {
  const key = `${subgraph.id} ${state.pages.get(subgraph.id) || 0}`;
  if (!insideCache.has(key)) insideCache.set(key, layInside(subgraph));
  return insideCache.get(key);
}

function layInside(subgraph) {
  const shown = operationsShown(subgraph), inside = new Set(shown);
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: OPERATION.gap, ranksep: OPERATION.rank });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const index of shown) {
    for (const input of content.operations[index].inputs || []) {
      const source = operationIndex.get(input);
      if (!inside.has(source) || source === index) continue;
      for (const end of [source, index]) graph.setNode(`o${end}`, { width: OPERATION.width, height: OPERATION.height });
      graph.setEdge(`o${source}`, `o${index}`);
    }
  }
  dagre.layout(graph);
  const linked = shown.filter((index) => graph.hasNode(`o${index}`)), alone = shown.filter((index) => !graph.hasNode(`o${index}`));
  const placed = linked.map((index) => ({ id: `o${index}`, index, x: graph.node(`o${index}`).x, y: graph.node(`o${index}`).y }));
  const { boxes, width, height } = folded(placed);
  const strip = aside(alone, placed.length ? width : content.spacing.padX, height, boxes);
  return { ...strip, edges: graph.edges().map(({ v, w }) => ({ from: v, to: w })) };
}

/** Operations without an edge to the others (such as BatchNorm's counters) beside them, no taller than they are. */
function aside(alone, left, height, boxes) {
  const step = OPERATION.height + OPERATION.rank, top = content.spacing.padY + 4;
  const fits = Math.max(Math.floor((height - 2 * content.spacing.padY + OPERATION.rank) / step), Math.ceil(Math.sqrt(alone.length)), 1);
  const column = (i) => Math.floor(i / fits), across = OPERATION.width + OPERATION.gap;
  const added = alone.map((index, i) => ({
    id: `o${index}`, index, column: 1000 + column(i), x: left + column(i) * across, y: top + (i % fits) * step, w: OPERATION.width, h: OPERATION.height,
  }));
  const all = [...boxes, ...added], pad = content.spacing;
  return {
    boxes: all,
    width: Math.max(...all.map((box) => box.x + box.w)) + pad.padX, height: Math.max(...all.map((box) => box.y + box.h)) + pad.padY,
  };
}

/** The ranks cut into columns side by side, so that the whole is about as wide as a screen. */
function folded(placed) {
  if (!placed.length) return { boxes: [], width: 0, height: 0 };
  const ranks = [...new Set(placed.map((box) => Math.round(box.y)))].sort((a, b) => a - b);
  const width = Math.max(...placed.map((box) => box.x)) - Math.min(...placed.map((box) => box.x)) + OPERATION.width;
  const height = ranks.length * (OPERATION.height + OPERATION.rank);
  const parts = Math.max(1, Math.min(ranks.length, Math.round(Math.sqrt(height * 1.5 / (width + OPERATION.between)))));
  const perColumn = Math.ceil(ranks.length / parts);
  const boxes = [];
  let left = content.spacing.padX, tall = 0;
  for (let column = 0; column * perColumn < ranks.length; column++) {
    const own = ranks.slice(column * perColumn, (column + 1) * perColumn);
    const here = placed.filter((box) => own.includes(Math.round(box.y)));
    const west = Math.min(...here.map((box) => box.x)), east = Math.max(...here.map((box) => box.x));
    for (const { id, index, x, y } of here) {
      const down = own.indexOf(Math.round(y)) * (OPERATION.height + OPERATION.rank);
      boxes.push({ id, index, column, x: left + x - west, y: content.spacing.padY + 4 + down, w: OPERATION.width, h: OPERATION.height });
    }
    tall = Math.max(tall, own.length * (OPERATION.height + OPERATION.rank) - OPERATION.rank);
    left += east - west + OPERATION.width + OPERATION.between;
  }
  return { boxes, width: left - OPERATION.between + content.spacing.padX, height: tall + 2 * content.spacing.padY };
}
