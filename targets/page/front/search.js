// The search box: subgraphs, groups, operations, modules and parameters by any part of their name.

const MOST_FOUND = 40;
let searchIndex = null;

/** All names, made when they are first asked for: {name, low, sort, go}. */
function searchable() {
  if (searchIndex) return searchIndex;
  const found = [], firstOfModule = new Map(), ownerOfState = new Map();
  for (const node of content.nodes) {
    if (node.kind === "subgraph" || node.kind === "group") found.push({ name: node.name, sort: node.kind, go: () => select(node.id) });
  }
  content.operations.forEach((operation, i) => {
    if (operation.module && !firstOfModule.has(operation.module)) firstOfModule.set(operation.module, i);
  });
  for (const [module, i] of firstOfModule) found.push({ name: module, sort: "module", go: () => select(operationOwner.get(i)) });
  for (const subgraph of subgraphs) {
    for (const i of subgraph.states) if (!ownerOfState.has(i)) ownerOfState.set(i, subgraph.id);
  }
  content.states.forEach((item, i) => {
    if (ownerOfState.has(i)) found.push({ name: item.name, sort: item.kind, go: () => select(ownerOfState.get(i)) });
  });
  content.operations.forEach((operation, i) => {
    if (operationOwner.has(i)) found.push({ name: operation.name, sort: "operation", go: () => selectOperation(i) });
  });
  for (const item of found) item.low = item.name.toLowerCase();
  searchIndex = found;
  return found;
}

let results = [], chosenResult = 0;

function search() {
  const wanted = byId("search").value.trim().toLowerCase(), list = byId("found");
  results = wanted ? searchable().filter((item) => item.low.includes(wanted)) : [];
  const rank = (item) => (item.low === wanted ? 0 : item.low.startsWith(wanted) ? 1 : 2);
  results = results.map((item, i) => [rank(item), i, item]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, , item]) => item);
  const more = results.length - MOST_FOUND;
  results = results.slice(0, MOST_FOUND);
  chosenResult = 0;
  const rows = results.map((item, i) => h("li", { role: "option", id: `found-${i}`, onmousedown: (event) => event.preventDefault(), onclick: () => take(i) }, item.name, h("span", {}, item.sort)));
  if (wanted && !results.length) rows.push(h("li", { class: "none" }, "Nothing of that name"));
  if (more > 0) rows.push(h("li", { class: "none" }, `${more} more`));
  list.replaceChildren(...rows);
  list.hidden = !wanted;
  byId("search").setAttribute("aria-expanded", String(Boolean(wanted)));
  markResult();
}

function markResult() {
  results.forEach((_, i) => byId(`found-${i}`).setAttribute("aria-selected", String(i === chosenResult)));
  const chosen = byId(`found-${chosenResult}`);
  if (chosen) {
    byId("search").setAttribute("aria-activedescendant", chosen.id);
    chosen.scrollIntoView({ block: "nearest" });
  } else byId("search").removeAttribute("aria-activedescendant");
}

function take(i) {
  const item = results[i];
  if (!item) return;
  byId("search").value = "";
  closeSearch();
  item.go();
  markSelected(true);
}

function closeSearch() {
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
}

function searchKey(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) chosenResult = (chosenResult + step + results.length) % Math.max(1, results.length);
  else if (event.key === "Enter") take(chosenResult);
  else if (event.key === "Escape") {
    byId("search").value = "";
    closeSearch();
    markSelected(true);
  } else return;
  event.preventDefault();
  event.stopPropagation();
  if (step) markResult();
}

function listenSearch() {
  byId("search").addEventListener("input", search);
  byId("search").addEventListener("focus", search);
  byId("search").addEventListener("blur", closeSearch);
  byId("search").addEventListener("keydown", searchKey);
}
