// How lines run: straight to the next node where nothing is between, else through the lanes between the bands.
// Values travel in the lane above a band, errors in the one below it, so that the two never cover each other.

const LANE = { above: 10, below: 17, aside: 10 };

/** Routes over the boxes of `places()`. */
class Router {
  constructor(boxes) {
    this.boxes = boxes;
    this.bands = new Map(); // `group band` -> {top, bottom}
    this.columns = new Map(); // `group band column` -> {left, right}
    this.obstacles = [];
    for (const [id, box] of boxes) {
      if (id === "" || id.startsWith("o") && id !== "out") continue;
      const key = `${box.parent} ${box.band}`, band = this.bands.get(key) || { top: Infinity, bottom: -Infinity };
      this.bands.set(key, { top: Math.min(band.top, box.y), bottom: Math.max(band.bottom, box.y + box.h) });
      const place = `${key} ${box.column}`, column = this.columns.get(place) || { left: Infinity, right: -Infinity };
      this.columns.set(place, { left: Math.min(column.left, box.x), right: Math.max(column.right, box.x + box.w) });
      if (!(nodes.get(id).kind === "group" && isOpen(id))) this.obstacles.push([id, box]);
    }
  }

  /** The innermost group that holds both, and the two of its members that they are in. */
  meeting(a, b) {
    const up = (id) => [id, ...groupsAround(id), ""];
    const left = up(a), right = up(b);
    while (left.length > 1 && right.length > 1 && left[left.length - 2] === right[right.length - 2]) {
      left.pop();
      right.pop();
    }
    return { group: left[left.length - 1], a: left[left.length - 2], b: right[right.length - 2] };
  }

  band(id) {
    const box = this.boxes.get(id);
    return this.bands.get(`${box.parent} ${box.band}`);
  }

  column(box) {
    return this.columns.get(`${box.parent} ${box.band} ${box.column}`);
  }

  free(x1, y1, x2, y2, except) {
    return !this.obstacles.some(([id, { x, y, w, h }]) =>
      !except.includes(id) && crosses(x1, y1, x2, y2, x - 3, y - 3, x + w + 3, y + h + 3));
  }

  /** Points of the path of a value, the ends included. */
  value(from, to) {
    const a = this.boxes.get(from), b = this.boxes.get(to);
    const start = [a.x + a.w, a.y + a.h / 2], end = [b.x, b.y + b.h / 2];
    const meeting = this.meeting(from, to), u = this.boxes.get(meeting.a), v = this.boxes.get(meeting.b);
    const near = end[0] > start[0] && end[0] - start[0] < 420;
    if (near && u.band === v.band && this.free(...start, ...end, [from, to])) return this.bend(start, end);
    const out = this.leave(from, meeting.a, start), enter = this.enter(to, meeting.b, end);
    const [, level] = enter.points[enter.points.length - 1];
    if (u.band === v.band && enter.x > out.x && enter.x - out.x < 60 && this.free(out.x, level, enter.x, level, [])) {
      return tidy([start, ...out.points, [out.x, level], ...enter.points.reverse(), end]);
    }
    const lane = this.band(meeting.b).top - LANE.above;
    const points = [start, ...out.points];
    if (u.band !== v.band && u.band !== v.band - 1) {
      const above = this.bands.get(`${meeting.group} ${u.band + 1}`), margin = this.boxes.get(meeting.group).x + 6;
      const first = above && u.band < v.band ? above.top - LANE.above : this.band(meeting.a).bottom + 6;
      points.push([out.x, first], [margin, first], [margin, lane]);
    } else {
      points.push([out.x, lane]);
    }
    return tidy([...points, [enter.x, lane], ...enter.points.reverse(), end]);
  }

  /** A short way between neighbours: straight, or with one step halfway. */
  bend(start, end) {
    if (Math.abs(start[1] - end[1]) < 2) return [start, end];
    const middle = end[0] - Math.min(14, (end[0] - start[0]) / 2);
    return [start, [middle, start[1]], [middle, end[1]], end];
  }

  leave(id, last, [, y]) {
    const points = [];
    let box = this.boxes.get(id), x = this.column(box).right + LANE.aside;
    points.push([x, y]);
    for (; id !== last; id = box.parent, box = this.boxes.get(id)) {
      const right = this.column(this.boxes.get(box.parent)).right + LANE.aside;
      if (!this.free(x, y, right, y, [])) {
        const lane = this.band(id).top - LANE.above;
        points.push([x, lane]);
        y = lane;
      }
      x = right;
      points.push([x, y]);
    }
    return { points, x };
  }

  enter(id, last, [, y]) {
    const points = [];
    let box = this.boxes.get(id), x = this.column(box).left - LANE.aside;
    points.push([x, y]);
    for (; id !== last; id = box.parent, box = this.boxes.get(id)) {
      const left = this.column(this.boxes.get(box.parent)).left - LANE.aside;
      if (!this.free(left, y, x, y, [])) {
        const lane = this.band(id).top - LANE.above;
        points.push([x, lane]);
        y = lane;
      }
      x = left;
      points.push([x, y]);
    }
    return { points, x };
  }

  /** Points of the path of an error, from below one node to below another; `depth` keeps lanes apart. */
  error(from, to, depth) {
    const offset = LANE.below + 5 * (depth % 3);
    const meeting = this.meeting(from, to);
    const up = this.climb(from, meeting.a, offset), down = this.climb(to, meeting.b, offset).reverse();
    const [, y1] = up[up.length - 1], [, y2] = down[0];
    const whole = this.boxes.get(meeting.group), right = whole.x + whole.w + (meeting.group ? -9 : 8) + 5 * (depth % 3);
    const across = Math.abs(y1 - y2) < 1 ? [] : [[right, y1], [right, y2]];
    return tidy([...up, ...across, ...down]);
  }

  climb(id, last, offset) {
    let box = this.boxes.get(id), x = box.x + box.w / 2, y = this.band(id).bottom + offset;
    const points = [[x, box.y + box.h], [x, y]];
    while (id !== last) {
      id = box.parent;
      box = this.boxes.get(id);
      x = this.column(box).right + LANE.aside - 3;
      points.push([x, y]);
      y = this.band(id).bottom + offset;
      points.push([x, y]);
    }
    return points;
  }

  /** The way of a value between operations of one subgraph. */
  inner(from, to) {
    const a = this.boxes.get(from), b = this.boxes.get(to);
    if (a.column === b.column) {
      const start = [a.x + a.w / 2, a.y + a.h], end = [b.x + b.w / 2, b.y];
      const near = end[1] - start[1] < 2 * OPERATION.rank;
      if (near) {
        const middle = (start[1] + end[1]) / 2;
        return tidy([start, [start[0], middle], [end[0], middle], end]);
      }
      const side = Math.max(a.x + a.w, b.x + b.w) + 9;
      return tidy([[a.x + a.w, a.y + a.h / 2], [side, a.y + a.h / 2], [side, b.y + b.h / 2], [b.x + b.w, b.y + b.h / 2]]);
    }
    const start = [a.x + a.w, a.y + a.h / 2], end = [b.x, b.y + b.h / 2], middle = end[0] - OPERATION.between / 2;
    return tidy([start, [middle, start[1]], [middle, end[1]], end]);
  }
}

/** Without points that lie on the line between their neighbours. */
function tidy(points) {
  return points.filter((point, i) => {
    if (i === 0 || i === points.length - 1) return true;
    const before = points[i - 1], after = points[i + 1];
    const same = Math.abs(point[0] - before[0]) < .5 && Math.abs(point[1] - before[1]) < .5;
    const straight = (k) => Math.abs(before[k] - point[k]) < .5 && Math.abs(point[k] - after[k]) < .5;
    return !same && !straight(0) && !straight(1);
  });
}

/** Whether a line meets a rectangle. */
function crosses(x1, y1, x2, y2, left, top, right, bottom) {
  let from = 0, to = 1;
  for (const [start, change, low, high] of [[x1, x2 - x1, left, right], [y1, y2 - y1, top, bottom]]) {
    if (Math.abs(change) < 1e-9) {
      if (start < low || start > high) return false;
    } else {
      const a = (low - start) / change, b = (high - start) / change;
      from = Math.max(from, Math.min(a, b));
      to = Math.min(to, Math.max(a, b));
    }
  }
  return from <= to;
}
