// What is open, selected and shown; and which elements follow from that, within the limit.

const state = {
  open: new Set(content.nodes.filter((node) => node.open).map((node) => node.id)), // in the order of opening
  pages: new Map(), // of opened subgraphs with many operations
  selected: null, // id of a node, or `o` and the index of an operation
  overlay: content.connections.length <= 12 ? "all" : "selection",
  colour: "cost",
  note: "",
};
const OPERATIONS_AT_ONCE = 60;

const isOpen = (id) => state.open.has(id);

/** The subgraph or group that stands for a node now: itself, or the outermost closed group around it. */
function shownAs(id) {
  const closed = groupsAround(id).filter((group) => !isOpen(group));
  return closed.length ? closed[closed.length - 1] : id;
}

/** All nodes that are visible, groups before what is in them. */
function visibleNodes(group = "") {
  return members.get(group).flatMap((node) =>
    node.kind === "group" && isOpen(node.id) ? [node, ...visibleNodes(node.id)] : [node]);
}

/** One edge for each pair of visible nodes that values go between. */
function visibleEdges() {
  return joined(content.edges, () => "");
}

/** Items `from`, `to`, of one sort and between the same visible nodes, as one: {from, to, sort, items}. */
function joined(items, sort) {
  const found = new Map();
  for (const item of items) {
    const from = shownAs(item.from), to = shownAs(item.to);
    if (from === to) continue;
    const key = `${from} ${to} ${sort(item)}`;
    if (!found.has(key)) found.set(key, { id: `e ${key}`, from, to, sort: sort(item), items: [] });
    found.get(key).items.push(item);
  }
  return [...found.values()];
}

/** The operations of an opened subgraph that are on its page. */
function operationsShown(subgraph) {
  const page = state.pages.get(subgraph.id) || 0;
  return subgraph.operations.slice(page * OPERATIONS_AT_ONCE, (page + 1) * OPERATIONS_AT_ONCE);
}

const pagesOf = (subgraph) => Math.ceil(subgraph.operations.length / OPERATIONS_AT_ONCE);

function elementsShown() {
  const shown = visibleNodes();
  const inside = shown.filter((node) => node.kind === "subgraph" && isOpen(node.id)).map(insideOf);
  return shown.length + inside.reduce((sum, { boxes, edges }) => sum + boxes.length + edges.length, 0) + visibleEdges().length;
}

/** Open a node and all groups around it; close the others that were opened, or as many as the limit asks. */
function open(id, keepOthers = true) {
  const wanted = [id, ...groupsAround(id)].reverse();
  const closed = [];
  if (!keepOthers) {
    for (const other of [...state.open]) {
      if (nodes.get(other).kind === "subgraph" && other !== id) state.open.delete(other);
    }
  }
  for (const one of wanted) {
    state.open.delete(one);
    state.open.add(one);
  }
  const around = new Set(wanted);
  for (const other of [...state.open]) {
    if (elementsShown() <= LIMIT) break;
    if (around.has(other) || !visibleNodes().some((node) => node.id === other)) continue;
    state.open.delete(other);
    closed.push(nodes.get(other).label);
  }
  state.note = closed.length ? `Closed ${listed(closed)} to stay within ${LIMIT} elements.` : "";
}

function listed(names) {
  return names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ");
}

/** Make a node visible, not necessarily open. */
function reveal(id) {
  const [group] = groupsAround(id);
  if (group && shownAs(id) !== id) open(group);
}

/** The node that is selected, or the subgraph of the operation that is. */
function selectedNode() {
  if (!state.selected) return null;
  return nodes.get(state.selected) || nodes.get(operationOwner.get(Number(state.selected.slice(1))));
}
