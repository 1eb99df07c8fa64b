// The schedule: a row for each stream, a column for each step. Only the cells in view exist.

const CELL = { width: 38, height: 28, left: 66, top: 18 };
const ACTIONS = { F: ["forward", "runs forward"], D: ["displacement", "forms its error"], U: ["update", "computes its update"] };
const actionsBySubgraph = new Map();
content.schedule.forEach((action, index) => {
  if (!actionsBySubgraph.has(action[3])) actionsBySubgraph.set(action[3], []);
  actionsBySubgraph.get(action[3]).push(index);
});

function drawSchedule() {
  const section = byId("schedule"), title = section.querySelector(".schedule-title"), grid = section.querySelector(".schedule-grid");
  const steps = Math.max(-1, ...content.schedule.map((a) => a[0])) + 1, streams = Math.max(-1, ...content.schedule.map((a) => a[1])) + 1;
  const key = Object.entries(ACTIONS).map(([kind, [name]]) => h("span", {}, h("i", { class: "swatch", style: { background: css(name) } }), `${kind} ${name}`));
  title.replaceChildren(h("b", {}, "Schedule"), `${count(steps, "step")} on ${count(streams, "stream")}`, ...key);
  grid.style.width = `${CELL.left + steps * CELL.width}px`;
  grid.style.height = `${CELL.top + streams * CELL.height}px`;
  grid.setAttribute("aria-colcount", steps);
  grid.setAttribute("aria-rowcount", streams);
  fillSchedule();
}

/** Make the cells that are in view. */
function fillSchedule() {
  const scroll = document.querySelector(".schedule-scroll"), grid = document.querySelector(".schedule-grid");
  if (byId("schedule").hidden) return;
  const first = (scroll.scrollLeft - CELL.left) / CELL.width - 4, last = first + scroll.clientWidth / CELL.width + 8;
  const rows = new Map(), chosen = selectedNode(), focused = document.activeElement && document.activeElement.dataset.action;
  const steps = new Set();
  content.schedule.forEach(([step, stream, kind, id], index) => {
    if (step < first || step > last) return;
    steps.add(step);
    if (!rows.has(stream)) rows.set(stream, h("div", { role: "row", "aria-rowindex": stream + 1 }, h("span", { class: "row-name", role: "rowheader", style: { top: 0, transform: `translateY(${CELL.top + stream * CELL.height + 3}px)` } }, `stream ${stream}`)));
    const node = nodes.get(id), own = chosen && subgraphsIn(chosen).some((s) => s.id === id);
    rows.get(stream).append(h("button", {
      type: "button", class: kind, role: "gridcell", "data-action": index, "aria-colindex": step + 1, "aria-selected": String(Boolean(own)), tabindex: own || (!chosen && index === 0) ? "0" : "-1",
      title: `${node.name} ${ACTIONS[kind][1]} in step ${step}`, "aria-label": `${ACTIONS[kind][0]} of ${node.name}, step ${step}, stream ${stream}`,
      style: { left: `${CELL.left + step * CELL.width}px`, top: `${CELL.top + stream * CELL.height}px`, width: `${CELL.width - 4}px` }, onclick: () => select(id),
    }, `${kind}${node.number}`));
  });
  const marks = [...steps].filter((step) => step % 5 === 0).map((step) => h("span", { class: "step", "aria-hidden": "true", style: { left: `${CELL.left + step * CELL.width + 2}px`, top: 0 } }, step));
  grid.replaceChildren(...marks, ...rows.values());
  if (focused !== undefined) grid.querySelector(`[data-action="${focused}"]`)?.focus({ preventScroll: true });
}

/** Scroll to the selected subgraph's first action that is not in view, and mark all of them. */
function followSchedule() {
  if (byId("schedule").hidden) return;
  const scroll = document.querySelector(".schedule-scroll"), chosen = selectedNode();
  const own = chosen ? subgraphsIn(chosen).flatMap((s) => actionsBySubgraph.get(s.id) || []) : [];
  const lefts = own.map((index) => CELL.left + content.schedule[index][0] * CELL.width);
  const seen = (left) => left > scroll.scrollLeft + CELL.left && left + CELL.width < scroll.scrollLeft + scroll.clientWidth;
  if (lefts.length && !lefts.some(seen)) scroll.scrollLeft = lefts[0] - scroll.clientWidth / 2;
  fillSchedule();
}

function scheduleKey(event) {
  const index = Number(event.target.dataset.action), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (Number.isNaN(index) || !step) return;
  event.preventDefault();
  event.stopPropagation();
  const next = content.schedule[index + step];
  if (!next) return;
  const scroll = document.querySelector(".schedule-scroll");
  scroll.scrollLeft = Math.max(0, CELL.left + next[0] * CELL.width - scroll.clientWidth / 2);
  fillSchedule();
  document.querySelector(`[data-action="${index + step}"]`)?.focus({ preventScroll: true });
}

function toggleSchedule() {
  const section = byId("schedule");
  section.hidden = !section.hidden;
  byId("show-schedule").setAttribute("aria-expanded", String(!section.hidden));
  if (!section.hidden) drawSchedule();
  followSchedule();
  cy.resize();
  fit();
}

function listenSchedule() {
  document.querySelector(".schedule-scroll").addEventListener("scroll", fillSchedule);
  document.querySelector(".schedule-grid").addEventListener("keydown", scheduleKey);
}
