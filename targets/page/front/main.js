// Starts the page, and the few changes of state that everything goes through.

/** Draw all that depends on the state. */
function changed() {
  redraw();
  drawPanel();
  followSchedule();
}

/** Select a node or operation where it is visible, without moving anything but the view. */
function pick(id) {
  state.selected = id;
  state.note = "";
  if (state.overlay === "selection" || drawn.left.edges || drawn.left.errors) redraw();
  else {
    lightUp();
    markSelected(false);
  }
  drawPanel();
  followSchedule();
  announce();
  if (id) bringIntoView(id);
}

/** Select a node, opening the groups around it. */
function select(id) {
  const visible = id === null || drawn.boxes.has(id);
  state.note = "";
  if (!visible) {
    reveal(id);
    state.selected = id;
    changed();
    bringIntoView(id);
    announce();
  } else pick(id);
}

/** Open the operation's subgraph, turn to its page, and select it. */
function selectOperation(index) {
  const owner = nodes.get(operationOwner.get(index));
  state.pages.set(owner.id, Math.floor(owner.operations.indexOf(index) / OPERATIONS_AT_ONCE));
  open(owner.id, false);
  state.selected = `o${index}`;
  changed();
  bringIntoView(owner.id);
  announce();
}

/** Open what is closed and close what is open. */
function toggle(id, keepOthers = false) {
  const node = nodes.get(id);
  if (node.kind !== "group" && node.kind !== "subgraph") return;
  const before = drawn.boxes.get(id), focused = byId("labels").contains(document.activeElement);
  if (isOpen(id)) {
    state.open.delete(id);
    state.note = "";
  } else open(id, keepOthers);
  state.selected = id;
  changed();
  const after = drawn.boxes.get(id);
  if (before && after) cy.panBy({ x: (before.x - after.x) * cy.zoom(), y: (before.y - after.y) * cy.zoom() });
  bringIntoView(id);
  markSelected(focused);
  announce();
}

function turnPage(node, step) {
  const page = (state.pages.get(node.id) || 0) + step;
  state.pages.set(node.id, Math.min(Math.max(page, 0), pagesOf(node) - 1));
  changed();
  bringIntoView(node.id);
}

function announce() {
  const element = state.selected && byId(`label-${state.selected}`);
  byId("announcer").textContent = [element ? element.getAttribute("aria-label") : "", state.note].filter(Boolean).join(". ");
}

function setOverlay(value) {
  state.overlay = value;
  for (const input of document.getElementsByName("overlay")) input.checked = input.value === value;
  redraw();
}

function setColour(value) {
  state.colour = value;
  byId("colour").value = value;
  redraw();
}

function setTheme(value) {
  theme = value;
  document.documentElement.dataset.theme = value;
  themeColours = new Map();
  if (!cy) return;
  cy.style(styles());
  redraw();
  if (!byId("schedule").hidden) drawSchedule();
}

function listen() {
  cy.on("tap", (event) => {
    if (event.target === cy) return select(null);
    const id = event.target.id();
    if (!event.target.isNode()) return undefined;
    const node = nodes.get(id);
    if (!node || node.kind === "input" || node.kind === "output") return pick(id);
    return toggle(id, event.originalEvent.shiftKey);
  });
  cy.on("mouseover", "node", (event) => {
    byId("graph").style.cursor = "pointer";
    const node = nodes.get(event.target.id()), operation = content.operations[Number(event.target.id().slice(1))];
    byId("graph").title = node ? node.name : operation ? `${operation.name} ${operation.type || ""}` : "";
  });
  cy.on("mouseout", "node", () => {
    byId("graph").style.cursor = "";
    byId("graph").title = "";
  });
  cy.on("render pan zoom", follow);
  byId("colour").addEventListener("change", (event) => setColour(event.target.value));
  byId("overlay").addEventListener("change", (event) => setOverlay(event.target.value));
  byId("zoom-in").addEventListener("click", () => zoomBy(1.25));
  byId("zoom-out").addEventListener("click", () => zoomBy(.8));
  byId("fit").addEventListener("click", fit);
  byId("show-schedule").addEventListener("click", toggleSchedule);
  byId("theme").addEventListener("click", () => setTheme(theme === "dark" ? "light" : "dark"));
  byId("show-help").addEventListener("click", () => byId("help").showModal());
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  addEventListener("resize", () => {
    cy.resize();
    fit();
  });
  listenSearch();
  listenSchedule();
  listenKeys();
  listenPrint();
}

function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const parameters = total(content.states.filter((s) => s.kind === "parameter"), "size");
  byId("facts").textContent = [count(content.operations.length, "operation"), `${short(parameters)} parameters`, count(subgraphs.length, "subgraph"), content.rule.text].filter(Boolean).join(" · ");
  for (const [key, scale] of Object.entries(COLOURS)) {
    if (!scale.needs || content.measured[scale.needs]) byId("colour").append(h("option", { value: key }, scale.name));
  }
  cy = cytoscape({
    container: byId("graph"), elements: [], layout: { name: "preset" }, autoungrabify: true, autounselectify: true, boxSelectionEnabled: false,
    minZoom: .05, maxZoom: 3, style: styles(),
  });
  byId("colour").value = state.colour;
  for (const input of document.getElementsByName("overlay")) input.checked = input.value === state.overlay;
  changed();
  fit();
  listen();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
