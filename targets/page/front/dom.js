// Small helpers. Text from the model only ever becomes text nodes and attribute values, never markup.

const byId = (id) => document.getElementById(id);

/** An element; attributes that begin with `on` are listeners, `style` is an object, null children are left out. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A path of modules that may go on in the next line after a dot. */
const dotted = (name) => String(name).split(/(?<=[.:])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));

/** A stroke as the graph draws it, for legends. */
function stroke(colour, dashes, mark) {
  const make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const svg = make("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
  svg.append(make("path", { d: "M0 5H26", stroke: colour, "stroke-width": 2, "stroke-dasharray": dashes, fill: "none" }));
  if (mark) svg.append(make("path", { d: "M13 0l5 5-5 5-5-5z", fill: colour }));
  return svg;
}
