// Where everything stands. Positions were computed when the page was written; where something opens or closes,
// the bands around it make room, and keep their members.

/** Absolute boxes {x, y, w, h} of all visible nodes by id, upper left corners; `""` is the whole. */
function places() {
  const found = new Map();
  const whole = packed("");
  found.set("", { x: 0, y: 0, ...whole.size });
  spread("", whole, found);
  return found;
}

function spread(group, { at }, found) {
  const origin = found.get(group);
  for (const node of members.get(group)) {
    const { x, y } = at.get(node.id), inner = sizeOf(node);
    found.set(node.id, { x: origin.x + x, y: origin.y + y, w: inner.size.w, h: inner.size.h, band: node.band, column: node.column, parent: group });
    if (inner.at) spread(node.id, inner, found);
    if (inner.boxes) {
      for (const box of inner.boxes) {
        found.set(box.id, { ...box, x: origin.x + x + box.x, y: origin.y + y + box.y, parent: node.id });
      }
    }
  }
}

/** The size of a node as it is now, with what is in it. */
function sizeOf(node) {
  if (node.kind === "group" && isOpen(node.id)) return packed(node.id);
  if (node.kind === "subgraph" && isOpen(node.id)) {
    const inside = insideOf(node);
    return { size: { w: Math.max(inside.width, 190), h: inside.height }, boxes: inside.boxes };
  }
  return { size: { w: node.closed[0], h: node.closed[1] } };
}

/** A group's size, and its members' places in it. */
function packed(group) {
  const inside = members.get(group);
  const sizes = new Map(inside.map((node) => [node.id, sizeOf(node).size]));
  const asWritten = inside.every((node) => {
    const { w, h } = sizes.get(node.id);
    const [width, height] = group === "" || nodes.get(group).open ? [node.w, node.h] : node.closed;
    return w === width && h === height;
  });
  return asWritten ? written(group, inside) : repacked(inside, sizes);
}

function written(group, inside) {
  const right = Math.max(...inside.map((node) => node.x + node.w)), bottom = Math.max(...inside.map((node) => node.y + node.h));
  const [w, h] = group ? nodes.get(group).inner : [right + content.spacing.padX, bottom + content.spacing.padY];
  return { size: { w, h }, at: new Map(inside.map(({ id, x, y }) => [id, { x, y }])) };
}

function repacked(inside, sizes) {
  const gap = content.spacing;
  const bands = [];
  for (const node of inside) ((bands[node.band] ||= [])[node.column] ||= []).push(node);
  const at = new Map();
  let y = gap.padY, right = gap.padX;
  for (const columns of bands) {
    const heights = columns.map((column) => column.reduce((sum, node) => sum + sizes.get(node.id).h + gap.y, -gap.y));
    const tall = Math.max(...heights);
    let x = gap.padX;
    columns.forEach((column, i) => {
      const wide = Math.max(...column.map((node) => sizes.get(node.id).w));
      let top = y + (tall - heights[i]) / 2;
      for (const node of [...column].sort((a, b) => a.y - b.y)) {
        at.set(node.id, { x: x + (wide - sizes.get(node.id).w) / 2, y: top });
        top += sizes.get(node.id).h + gap.y;
      }
      x += wide + gap.x;
    });
    right = Math.max(right, x - gap.x);
    y += tall + gap.band;
  }
  return { size: { w: right + gap.padX, h: y - gap.band + gap.padY }, at };
}
